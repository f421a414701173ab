"""The processes of one life find one another in a store that dead processes have written to.

torchrun keeps one TCPStore over all restarts, and its restart count differs between machines: a new process could read
the address of a dead one. So process 0 gives each life a name and answers whoever asks, under a key that nobody used
before. `monitored_barrier` cannot say who is missing here: it needs a process group, which connects only when all are
there.
"""

import time
import uuid

import torch.distributed as dist

from smolseek.distributed.heartbeat import FIRST_SIGN
from smolseek.errors import PeerLost, Stopped

_POLL = 0.02
"""Seconds between two looks into the store."""


def wait_for_peers(store: dist.Store, rank: int, size: int, timeout: float) -> dist.Store:
    """Return a part of `store` that the `size` processes of this life share, and no earlier one wrote to.

    It holds `sign/RANK` for each of them. The store is polled, since no signal would end a wait inside it.

    Raises:
        PeerLost: in every process, if some are not there after `timeout` seconds, or when a SIGTERM ends the wait;
            they are named.
    """
    nonce, begun = uuid.uuid4().hex, time.monotonic()
    life = dist.PrefixStore(f"life/{nonce}", store) if rank == 0 else None
    others = [other for other in range(size) if other != rank]
    if life is None:
        store.set(f"asks/{rank}", nonce)
    else:
        life.set("sign/0", FIRST_SIGN)
    try:
        while time.monotonic() - begun < timeout:
            if rank == 0:
                for other in others:
                    if store.check([f"asks/{other}"]):  # it may be a dead one's question: the answer is read by nobody
                        store.set(f"answer/{store.get(f'asks/{other}').decode()}", nonce)
            elif life is None and store.check([f"answer/{nonce}"]):
                life = dist.PrefixStore(f"life/{store.get(f'answer/{nonce}').decode()}", store)
                life.set(f"sign/{rank}", FIRST_SIGN)
            if life is not None and life.check([f"sign/{other}" for other in others]):
                return life
            time.sleep(max(_POLL, size / 5000))
    except Stopped:
        pass
    missing = [0] if life is None else [other for other in others if not life.check([f"sign/{other}"])]
    raise PeerLost(
        f"process {rank}: no word of process {', '.join(map(str, missing))} in {time.monotonic() - begun:.1f} seconds: "
        "start all processes, or raise --mesh.timeout"
    )
