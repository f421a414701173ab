"""Prefetching: a thread reads documents into a bounded queue."""

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
    """Reads chunks of documents in a thread; `next` raises the exceptions of this thread.

    A thread is enough, and no second process is needed: reading waits for the network, and encoding uses all cores
    without holding Python's GIL.
    """

    def __init__(self, chunks: Callable[[threading.Event], Iterator[list[T]]], depth: int) -> None:
        """Begin to read `chunks(stop)`, up to `depth` chunks ahead. Setting the event `stop` ends the reading."""
        self._queue: queue.Queue[list[T] | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._chunk: deque[T] = deque()
        self._thread = threading.Thread(target=self._run, args=(chunks,), daemon=True, name="data")
        self._thread.start()
        # A thread that returns from C code during the exit of the interpreter would abort the process.
        atexit.register(self.close)

    def next(self, stopped: Callable[[], object] | None = None) -> T:
        """Return the next document.

        Raises:
            HubUnavailable: when `stopped` returns true while waiting for the document.
        """
        while not self._chunk:
            try:
                item = self._queue.get(timeout=0.1 if stopped else None)
            except queue.Empty:
                if stopped and stopped():
                    raise HubUnavailable("stopped while waiting for data") from None
                continue
            if isinstance(item, BaseException):
                self._queue.put(item)  # for the next call
                raise item
            self._chunk.extend(item)
        return self._chunk.popleft()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                while True:
                    self._queue.get_nowait()  # wakes the thread if the queue was full
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
