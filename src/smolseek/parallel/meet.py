"""Processes that start together find one another, and not what those before them left.

torchrun keeps one store over all restarts. A process that starts anew could read in it where a dead one listened, and
wait for it or be refused. How often torchrun has started is not the same number on every machine. So process 0 gives
each life a name, and tells it to those that are alive: they ask with a word that nobody used before.
"""

import datetime
import time
import uuid

import torch.distributed as dist

from smolseek.errors import SmolseekError

_POLL = 0.02
"""Seconds between two looks for those who ask."""


def meet(store: dist.Store, rank: int, size: int, timeout: float) -> dist.Store:
    """Return a part of `store` that the `size` processes of this life share, and no earlier one wrote to.

    Raises:
        SmolseekError: if some are not there after `timeout` seconds; they are named.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        _gather(store, mine, size, timeout)
        return dist.PrefixStore(f"life/{mine}", store)
    store.set(f"asks/{rank}", mine)
    try:
        store.wait([f"answer/{mine}"], datetime.timedelta(seconds=timeout))
    except RuntimeError:
        raise SmolseekError(
            f"process {rank} heard nothing of process 0 in {timeout:g} seconds: start them all, or raise --mesh.timeout"
        ) from None
    life = store.get(f"answer/{mine}").decode()
    store.set(f"here/{life}/{rank}", "")
    return dist.PrefixStore(f"life/{life}", store)


def _gather(store: dist.Store, life: str, size: int, timeout: float) -> None:
    """Answer all who ask, the dead too, until everyone has heard."""
    missing, until = set(range(1, size)), time.monotonic() + timeout
    while missing:
        for rank in sorted(missing):
            if store.check([f"asks/{rank}"]):
                store.set(f"answer/{store.get(f'asks/{rank}').decode()}", life)
        missing = {rank for rank in missing if not store.check([f"here/{life}/{rank}"])}
        if missing and time.monotonic() > until:
            raise SmolseekError(
                f"no word of process {', '.join(map(str, sorted(missing)))} in {timeout:g} seconds: "
                "start them all, or raise --mesh.timeout"
            )
        time.sleep(_POLL if missing else 0)
