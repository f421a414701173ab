"""After a failed collective, every remaining process names the same missing process."""

import time
from threading import Thread

import pytest
import torch.distributed as dist

from smolseek.distributed.heartbeat import FIRST_HEARTBEAT, Heartbeat


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, 1, is_master=True)


@pytest.fixture
def heartbeats(store):
    """Three processes that send a heartbeat every 0.2 seconds."""
    for rank in range(3):
        store.set(f"heartbeat/{rank}", FIRST_HEARTBEAT)
    heartbeats = [Heartbeat(store, rank, 3, 2.0) for rank in range(3)]
    yield heartbeats
    for heartbeat in heartbeats:
        heartbeat.close(left=False)


def begin_step(heartbeats):
    """Record that a step begins now, so that no collective seems to have waited for long."""
    for heartbeat in heartbeats:
        heartbeat.begin_step()


def test_a_process_without_heartbeats_is_named_by_all(heartbeats):
    heartbeats[2].close(left=False)
    begin_step(heartbeats)
    assert heartbeats[0].lost() == "no heartbeat from process 2"
    heartbeats[0].close(left=False)  # process 0 knows the reason, and does not count as missing
    assert heartbeats[1].lost() == "no heartbeat from process 2"


def test_no_process_is_named_if_all_send_heartbeats(heartbeats):
    begin_step(heartbeats)
    assert heartbeats[1].lost() is None


def test_a_finished_process_is_not_missing(heartbeats):
    heartbeats[2].close(left=True)
    begin_step(heartbeats)
    assert heartbeats[0].lost() is None


def test_a_process_that_never_calls_the_collective_is_named(heartbeats):
    time.sleep(heartbeats[0].timeout)  # wait for the timeout of a collective
    other = Thread(target=heartbeats[1].lost)
    other.start()
    assert heartbeats[0].lost().startswith("process 2 did not reach the same collective in ")
    other.join()


def test_the_first_reason_counts(heartbeats):
    heartbeats[1].blame("process 1 has failed (TypeError: why)")
    heartbeats[2].blame("process 2 has failed as well")
    assert heartbeats[0].lost() == "process 1 has failed (TypeError: why)"


def test_a_missing_store_is_named():
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False)
    heartbeat = Heartbeat(client, 1, 2, 0.5)
    del store
    assert "the store that torchrun keeps does not answer" in heartbeat.lost()
    heartbeat.close(left=True)


def test_a_late_process_is_named_before_the_timeout(heartbeats, capfd):
    heartbeats[2].close(left=False)
    heartbeats[1].begin_step()
    until = time.monotonic() + 10
    warnings = ""
    while "warning" not in warnings and time.monotonic() < until:
        time.sleep(0.05)
        warnings += capfd.readouterr().err
    assert "process 2 sends no heartbeat" in warnings
