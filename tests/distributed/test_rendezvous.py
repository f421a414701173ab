"""Processes of one launch find each other in a store that earlier launches have used."""

from threading import Thread

import pytest
import torch.distributed as dist

from smolseek.distributed.rendezvous import wait_for_peers
from smolseek.errors import PeerLost, Stopped


def launch(store, word, ranks=(0, 1, 2)):
    """Start the processes as threads; each thread stores `word` and returns the words of the other threads."""
    words = {}

    def join(rank):
        shared = wait_for_peers(store, rank, 3, 10.0)
        shared.set(f"word/{rank}", word)
        words[rank] = [shared.get(f"word/{other}").decode() for other in range(3)]

    threads = [Thread(target=join, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return words


def test_a_second_launch_reads_nothing_of_the_first():
    store = dist.HashStore()
    for word in ("first", "second", "third"):
        store.set("request/2", "a request of a process that has died")
        assert launch(store, word) == {rank: [word] * 3 for rank in range(3)}


def test_all_processes_name_the_one_that_does_not_join():
    store = dist.HashStore()
    errors = {}

    def wait(rank):
        with pytest.raises(PeerLost) as lost:
            wait_for_peers(store, rank, 3, 0.5)
        errors[rank] = str(lost.value)

    threads = [Thread(target=wait, args=(rank,)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(errors[rank].startswith(f"process {rank}: process 1 did not join in 0.5 seconds") for rank in (0, 2))
    with pytest.raises(PeerLost, match=r"process 1: process 0 did not join in 0\.2 seconds"):
        wait_for_peers(dist.HashStore(), 1, 3, 0.2)


def test_a_sigterm_ends_the_wait_and_the_missing_ones_are_named():
    class Interrupted(dist.HashStore):
        def check(self, keys):
            raise Stopped("stopped by SIGTERM", 143)

    with pytest.raises(PeerLost, match="process 1: process 0 did not join in"):
        wait_for_peers(Interrupted(), 1, 3, 10.0)
