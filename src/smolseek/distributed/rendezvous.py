"""How the processes of one launch find each other in a store that also has entries of dead processes.

torchrun keeps one TCPStore over all restarts, and its restart count differs between machines. A new process could
therefore read the address of a dead process. To prevent this mistake, process 0 gives each launch a new name, and
answers every request under a key of its own. `monitored_barrier` cannot say which process is missing, because it needs
a process group, which connects only when all processes exist.
"""

import time
import uuid

import torch.distributed as dist

from smolseek.distributed.heartbeat import FIRST_HEARTBEAT
from smolseek.errors import PeerLost, Stopped

_POLL = 0.02
"""Seconds between two readings of the store."""


def wait_for_peers(store: dist.Store, rank: int, size: int, timeout: float) -> dist.Store:
    """Return the part of `store` for the `size` processes of this launch; earlier launches did not write to it.

    The first heartbeat of each process is in this part. The store is polled, since no signal would end a wait inside
    the store.

    Raises:
        PeerLost: in every process, after `timeout` seconds or on a SIGTERM. The error names the missing processes.
    """
    nonce, begun = uuid.uuid4().hex, time.monotonic()
    launch = dist.PrefixStore(f"launch/{nonce}", store) if rank == 0 else None
    others = [other for other in range(size) if other != rank]
    if launch is None:
        store.set(f"request/{rank}", nonce)
    else:
        launch.set("heartbeat/0", FIRST_HEARTBEAT)
    try:
        while time.monotonic() - begun < timeout:
            if rank == 0:
                for other in others:
                    if store.check([f"request/{other}"]):  # if the process is dead, nobody reads the answer
                        store.set(f"answer/{store.get(f'request/{other}').decode()}", nonce)
            elif launch is None and store.check([f"answer/{nonce}"]):
                launch = dist.PrefixStore(f"launch/{store.get(f'answer/{nonce}').decode()}", store)
                launch.set(f"heartbeat/{rank}", FIRST_HEARTBEAT)
            if launch is not None and launch.check([f"heartbeat/{other}" for other in others]):
                return launch
            time.sleep(max(_POLL, size / 5000))
    except Stopped:
        pass
    missing = [0] if launch is None else [other for other in others if not launch.check([f"heartbeat/{other}"])]
    raise PeerLost(
        f"process {rank}: process {', '.join(map(str, missing))} did not join in {time.monotonic() - begun:.1f} "
        "seconds: start all processes with torchrun, or raise --mesh.timeout"
    )
