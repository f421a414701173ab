"""Processes find those of their own life in a store that outlives them."""

from threading import Thread

import pytest
import torch.distributed as dist

from smolseek.distributed.rendezvous import wait_for_peers
from smolseek.errors import PeerLost


def life(store, word, ranks=(0, 1, 2)):
    """Start these processes as threads; each leaves `word` and returns what the others left."""
    found = {}

    def be(rank):
        shared = wait_for_peers(store, rank, 3, 10.0)
        shared.set(f"word/{rank}", word)
        found[rank] = [shared.get(f"word/{other}").decode() for other in range(3)]

    threads = [Thread(target=be, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_second_life_reads_nothing_of_the_first():
    store = dist.HashStore()
    for word in ("first", "second", "third"):
        store.set("asks/2", "a word of one who died while it asked")
        assert life(store, word) == {rank: [word] * 3 for rank in range(3)}


def test_who_does_not_come_is_named_by_all_that_did():
    store = dist.HashStore()
    said = []

    def be():
        with pytest.raises(PeerLost, match=r"process 2: no word of process 1 in") as lost:
            wait_for_peers(store, 2, 3, 10.0)
        said.append(lost)

    other = Thread(target=be)
    other.start()
    with pytest.raises(PeerLost, match=r"process 0: no word of process 1 in 0\.5 seconds"):
        wait_for_peers(store, 0, 3, 0.5)
    other.join(5.0)
    assert said
    with pytest.raises(PeerLost, match=r"process 1: no word of process 0 in 0\.2 seconds"):
        wait_for_peers(dist.HashStore(), 1, 3, 0.2)


def test_when_process_0_ends_in_the_middle_the_others_name_who_is_not_there(monkeypatch):
    monkeypatch.setattr("smolseek.distributed.rendezvous._LONGER", 0.0)
    store = dist.HashStore()
    answering = Thread(target=answer, args=(store, 1))
    answering.start()
    with pytest.raises(PeerLost, match="process 1: no word of process 2 in"):
        wait_for_peers(store, 1, 3, 0.5)
    answering.join()


def answer(store, rank):
    """Be process 0 until it has answered `rank`."""
    store.wait([f"asks/{rank}"])
    store.set(f"answer/{store.get(f'asks/{rank}').decode()}", "life")
