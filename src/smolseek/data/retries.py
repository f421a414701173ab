"""Requests that are made again until they succeed, are no longer wanted, or have failed for too long."""

import os
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeVar

from smolseek import console
from smolseek.errors import Stopped

T = TypeVar("T")

FIRST_PAUSE = 0.5
"""Seconds before the first new try; each further one in a row doubles it."""
LONGEST_PAUSE = 60.0


class HubUnavailable(Stopped):
    """The hub gave no sound answer for longer than `data.give_up_after`, or the data are no longer waited for.

    Nothing is lost, and it can be gone on from later. `what` is the message without the advice.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: give the same command again when it is back; it goes on", os.EX_TEMPFAIL)
        self.what = what


class RetryableError(Exception):
    """A request that may succeed when it is made again; `pause` is what the server asked for, in seconds."""

    def __init__(self, what: str, pause: float = 0.0) -> None:
        super().__init__(what)
        self.pause = pause


class ReadStatistics:
    """What went over the network, counted by the threads that read and told to the one that trains."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes, self._retries, self._last = 0, 0, ""

    def received(self, n: int) -> None:
        """Count `n` bytes that came as they should."""
        with self._lock:
            self._bytes += n

    def retried(self, why: str) -> None:
        """Count a request that is made again."""
        with self._lock:
            self._retries, self._last = self._retries + 1, why

    def tell(self) -> dict[str, Any]:
        """Return the bytes and retries since the last call, with the reason of the last retry, in JSON types."""
        with self._lock:
            told: dict[str, Any] = {"bytes": self._bytes, "retries": self._retries}
            if self._retries:
                told["last_retry"] = self._last
            self._bytes, self._retries = 0, 0
        return told


def retry(
    request: Callable[[], T],
    what: str,
    give_up_after: float,
    stop: threading.Event | None = None,
    statistics: ReadStatistics | None = None,
) -> T:
    """Return what `request` returns; call it again after each RetryableError, with growing pauses and a line each.

    Raises:
        HubUnavailable: when no try has succeeded for `give_up_after` seconds, or as soon as `stop` is set.
    """
    began, pause = time.monotonic(), FIRST_PAUSE
    stop = stop or threading.Event()
    while True:
        try:
            return _unless(stop, request, what)
        except RetryableError as error:
            wait = max(pause, error.pause)
            spent = time.monotonic() - began
            if spent + wait > give_up_after:
                raise HubUnavailable(f"the hub has not delivered {what} for {spent:.0f} s ({error})") from None
            console.warn(f"hub: {what}: {error}; trying again in {wait:g} s")
            if statistics is not None:
                statistics.retried(f"{what}: {error}")
            if stop.wait(wait):
                raise HubUnavailable(f"{what} is no longer wanted") from None
            pause = min(2 * pause, LONGEST_PAUSE)


def _unless(stop: threading.Event, request: Callable[[], T], what: str) -> T:
    """Return what `request` returns from a thread of its own, which is left to itself once `stop` is set.

    A server that has gone silent holds a request for its whole time-out, and nobody should wait along for data that
    are not wanted any more.
    """
    future: futures.Future[T] = futures.Future()

    def work() -> None:
        try:
            future.set_result(request())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True, name="request").start()
    while not stop.is_set():
        if futures.wait([future], timeout=0.1).done:
            return future.result()
    raise HubUnavailable(f"{what} is no longer wanted")
