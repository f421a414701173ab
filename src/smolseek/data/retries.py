"""Repeats a request until it succeeds, the run stops, or the request has failed for too long."""

import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeVar

from smolseek import console
from smolseek.errors import Stopped

T = TypeVar("T")

FIRST_PAUSE = 0.5
"""Seconds to wait before the first retry. The waiting time doubles with each further retry."""
LONGEST_PAUSE = 60.0
UNAVAILABLE = 75
"""Exit code EX_TEMPFAIL of sysexits.h, which Python's `os` has on POSIX systems only."""


class HubUnavailable(Stopped):
    """The hub gave no valid response for `data.give_up_after` seconds, or the run stopped waiting for data.

    The same command continues the work later, so no work is lost. `what` is the message without the advice to run the
    same command again.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: run the same command again later to continue", UNAVAILABLE)
        self.what = what


class RetryableError(Exception):
    """A failed request that may be repeated after `pause` seconds, the time that the server asks for."""

    def __init__(self, what: str, pause: float = 0.0) -> None:
        super().__init__(what)
        self.pause = pause


class ReadStatistics:
    """Counts of the bytes and retries in all threads that read from the network."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Any] = {"bytes": 0, "retries": 0}

    def received(self, n: int) -> None:
        """Count `n` bytes of valid responses."""
        with self._lock:
            self._counts["bytes"] += n

    def retried(self, why: str) -> None:
        """Count a retry."""
        with self._lock:
            self._counts["retries"] += 1
            self._counts["last_retry"] = why

    def reset(self) -> dict[str, Any]:
        """Return the bytes, the retries and the last retry's reason since the last call, in JSON types."""
        with self._lock:
            counts, self._counts = self._counts, {"bytes": 0, "retries": 0}
        return counts


def retry(
    request: Callable[[], T],
    what: str,
    give_up_after: float,
    stop: threading.Event | None = None,
    statistics: ReadStatistics | None = None,
) -> T:
    """Call `request` and return its result. After a RetryableError, warn, wait and repeat the call.

    The waiting time grows with each retry.

    Raises:
        HubUnavailable: after `give_up_after` seconds without success, or as soon as `stop` is set.
    """
    began, pause = time.monotonic(), FIRST_PAUSE
    stop = stop or threading.Event()
    while not stop.is_set():
        # The request runs in a thread, which is abandoned when `stop` is set, because a silent server blocks it until
        # the timeout.
        future: futures.Future[T] = futures.Future()
        threading.Thread(target=_run, args=(future, request), daemon=True, name="request").start()
        while not stop.is_set() and not futures.wait([future], timeout=0.1).done:
            pass
        if stop.is_set():
            break
        try:
            return future.result()
        except RetryableError as error:
            wait = max(pause, error.pause)
            spent = time.monotonic() - began
            if spent + wait > give_up_after:
                raise HubUnavailable(f"the hub has not delivered {what} for {spent:.0f} s ({error})") from None
            console.warn(f"hub: {what}: {error}; trying again in {wait:g} s")
            if statistics is not None:
                statistics.retried(f"{what}: {error}")
            stop.wait(wait)
            pause = min(2 * pause, LONGEST_PAUSE)
    raise HubUnavailable(f"{what} is no longer needed")


def _run(future: "futures.Future[T]", request: Callable[[], T]) -> None:
    try:
        future.set_result(request())
    except BaseException as error:
        future.set_exception(error)
