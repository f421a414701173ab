"""Processes find those of their own life in a store that outlives them."""

from threading import Thread

import pytest
import torch.distributed as dist

from smolseek.errors import SmolseekError
from smolseek.parallel.meet import meet


def life(store, word, ranks=(0, 1, 2)):
    """Start these processes as threads; each leaves `word` and returns what the others left."""
    found = {}

    def be(rank):
        shared = meet(store, rank, 3, 10.0)
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


def test_who_does_not_come_is_named():
    store = dist.HashStore()
    other = Thread(target=meet, args=(store, 2, 3, 10.0))
    other.start()
    with pytest.raises(SmolseekError, match=r"no word of process 1 in 0\.5 seconds"):
        meet(store, 0, 3, 0.5)
    other.join()
    with pytest.raises(SmolseekError, match="process 1 heard nothing of process 0"):
        meet(dist.HashStore(), 1, 3, 0.2)
