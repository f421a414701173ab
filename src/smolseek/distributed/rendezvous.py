"""Processes that start together find one another, and not what those before them left.

torchrun keeps one store over all restarts. A process that starts anew could read in it where a dead one listened, and
wait for it or be refused. How often torchrun has started is not the same number on every machine. So process 0 gives
each life a name, and tells it to those that are alive: they ask with a word that nobody used before. It also tells
them when all are there, or who is not.
"""

import time
import uuid

import torch.distributed as dist

from smolseek.errors import PeerLost, Stopped

_POLL = 0.02
"""Seconds between two looks for those who ask."""
_LONGER = 2.0
"""Seconds that the others wait longer than process 0, which knows who is missing."""


def wait_for_peers(store: dist.Store, rank: int, size: int, timeout: float) -> dist.Store:
    """Return a part of `store` that the `size` processes of this life share, and no earlier one wrote to.

    Raises:
        PeerLost: in every process, if some are not there after `timeout` seconds, or when a SIGTERM ends the wait;
            they are named.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        missing, waited = _gather(store, mine, size, timeout)
        store.set(f"met/{mine}", missing)
        if missing:
            raise _lost(rank, missing, waited)
        return dist.PrefixStore(f"life/{mine}", store)
    store.set(f"asks/{rank}", mine)
    begun = time.monotonic()
    life = _told(store, f"answer/{mine}", timeout, size)
    if life is None:
        raise _lost(rank, "0", time.monotonic() - begun)
    store.set(f"here/{life}/{rank}", "")
    told = _told(store, f"met/{life}", timeout + _LONGER, size)
    away = [str(other) for other in range(1, size) if told is None and not store.check([f"here/{life}/{other}"])]
    missing = ", ".join(away) or "0" if told is None else told
    if missing:
        raise _lost(rank, missing, time.monotonic() - begun)
    return dist.PrefixStore(f"life/{life}", store)


def _gather(store: dist.Store, life: str, size: int, timeout: float) -> tuple[str, float]:
    """Answer all who ask, the dead too, until everyone has heard. Returns who has not, and the seconds waited."""
    missing, begun = set(range(1, size)), time.monotonic()
    try:
        while missing and time.monotonic() - begun < timeout:
            for rank in sorted(missing):
                if store.check([f"asks/{rank}"]):
                    store.set(f"answer/{store.get(f'asks/{rank}').decode()}", life)
            missing = {rank for rank in missing if not store.check([f"here/{life}/{rank}"])}
            time.sleep(_POLL if missing else 0)
    except Stopped:
        if not missing:
            raise
    return ", ".join(map(str, sorted(missing))), time.monotonic() - begun


def _told(store: dist.Store, key: str, timeout: float, size: int) -> str | None:
    """Return what `key` comes to hold; None if `timeout` seconds pass, or a SIGTERM comes, before.

    It looks again and again, since no signal would end a wait inside the store; the more ask, the less often.
    """
    until = time.monotonic() + timeout
    try:
        while not store.check([key]):
            if time.monotonic() > until:
                return None
            time.sleep(max(_POLL, size / 5000))
    except Stopped:
        return None
    return store.get(key).decode()


def _lost(rank: int, missing: str, waited: float) -> PeerLost:
    return PeerLost(
        f"process {rank}: no word of process {missing} in {waited:.1f} seconds: start all processes, "
        "or raise --mesh.timeout"
    )
