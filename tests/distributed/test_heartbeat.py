"""After a collective has failed every process that is left names the same missing one."""

import time

import pytest
import torch.distributed as dist

from smolseek.distributed.heartbeat import Heartbeat


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, 1, is_master=True)


@pytest.fixture
def watches(store):
    """Three processes that give a life sign every 0.2 seconds."""
    found = [Heartbeat(store, rank, 3, 2.0) for rank in range(3)]
    deadline = time.monotonic() + 10
    while not store.check([f"life/{rank}" for rank in range(3)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    yield found
    for watch in found:
        watch.close(left=False)


def later(watches):
    """Count a step that begins now: no collective has waited for long."""
    for watch in watches:
        watch.beat()


def test_who_gives_no_sign_of_life_is_named_by_all(watches):
    watches[2].close(left=False)
    later(watches)
    assert watches[0].lost() == "nothing is heard of process 2 any more"
    watches[0].close(left=False)  # it has found the reason, and is not missing itself
    assert watches[1].lost() == "nothing is heard of process 2 any more"


def test_nobody_is_named_where_all_live(watches):
    later(watches)
    assert watches[1].lost() is None


def test_who_has_done_its_work_is_not_missing(watches):
    watches[2].close(left=True)
    later(watches)
    assert watches[0].lost() is None


def test_who_lives_and_does_not_come_is_named(watches, store):
    time.sleep(watches[0].timeout)  # a collective's end
    store.set("waits/1", "")
    assert watches[0].lost().startswith("process 2 did not come to the same point in ")


def test_a_reason_that_was_told_holds(watches):
    watches[1].blame("process 1 has failed (TypeError: why)")
    watches[2].blame("process 2 has failed as well")
    assert watches[0].lost() == "process 1 has failed (TypeError: why)"


def test_a_store_that_is_gone_is_a_reason():
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False)
    watch = Heartbeat(client, 1, 2, 0.5)
    del store
    assert "the store that torchrun keeps does not answer" in watch.lost()
    watch.close(left=True)


def test_who_is_late_is_named_before_the_time_is_over(watches, capfd):
    watches[2].close(left=False)
    watches[1].beat()
    until = time.monotonic() + 10
    said = ""
    while "warning" not in said and time.monotonic() < until:
        time.sleep(0.05)
        said += capfd.readouterr().err
    assert "process 2 gives no sign of life" in said
