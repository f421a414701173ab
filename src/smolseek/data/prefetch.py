"""Reading in a thread, a bounded queue ahead of the model."""

import atexit
import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from smolseek.data.retries import HubUnavailable

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Reads chunks of documents in a thread; what the thread raises is raised in its place.

    A thread is enough: reading waits for the network, and encoding happens in all cores outside of Python's lock.
    """

    def __init__(self, chunks: Callable[[threading.Event], Iterator[list[T]]], depth: int) -> None:
        """Begin to read what `chunks` yields, `depth` chunks ahead; it is given an event that ends its waiting."""
        self._queue: queue.Queue[list[T] | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._chunk: deque[T] = deque()
        self._thread = threading.Thread(target=self._run, args=(chunks,), daemon=True, name="data")
        self._thread.start()
        # A thread that comes back from foreign code into an interpreter that ends would abort the process.
        atexit.register(self.close)

    def next(self, stopped: Callable[[], object] | None = None) -> T:
        """Return the next document; raises again what ended the thread.

        Raises:
            HubUnavailable: when `stopped` returns true while there is none.
        """
        while not self._chunk:
            if self._failure is not None:
                raise self._failure
            try:
                got = self._queue.get(timeout=0.1 if stopped else None)
            except queue.Empty:
                if stopped and stopped():
                    raise HubUnavailable("the data are no longer waited for") from None
                continue
            if isinstance(got, BaseException):
                self._failure = got
            else:
                self._chunk.extend(got)
        return self._chunk.popleft()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                while True:
                    self._queue.get_nowait()  # wakes the thread if it waits for room
            self._thread.join(0.02)
        atexit.unregister(self.close)

    def _run(self, chunks: Callable[[threading.Event], Iterator[list[T]]]) -> None:
        try:
            for chunk in chunks(self._stop):
                self._queue.put(chunk)
                if self._stop.is_set():
                    return
        except BaseException as error:
            self._queue.put(error)
