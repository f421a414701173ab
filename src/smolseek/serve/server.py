"""Runs a server: the socket, the threads, and the end after a signal."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from smolseek import console
from smolseek.api import Model
from smolseek.errors import SmolseekError
from smolseek.generate.scheduler import Scheduler
from smolseek.serve.app import Service, create_app
from smolseek.serve.metrics import Metrics
from smolseek.serve.settings import Settings
from smolseek.serve.worker import Worker

UNREAD = 1 << 17
"""Bytes that the system stores for a client that does not read."""
UNREAD_SECONDS = 60.0
"""Seconds after which a connection is closed whose client reads nothing of what is to be sent."""
SPARE_CONNECTIONS = 256
"""Number of connections beside those of requests that wait or run: pages, monitoring, idle ones."""
LAST_SECONDS = 2.0
"""Seconds after the end of the last text for its client to read it."""


def bind(settings: Settings) -> socket.socket:
    """Return a socket that is bound to the address, but does not listen yet.

    Raises:
        SmolseekError: for an address that is not this machine's, or is used already.
    """
    host = settings.host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)
        listener.bind(address)
    except OSError as error:
        raise SmolseekError(
            f"cannot listen at {settings.host} port {settings.port} ({error.strerror}): choose another --host or --port"
        ) from None
    return listener


def url(listener: socket.socket) -> str:
    """Return the address of a server for browsers and clients on this machine."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Protocol(H11Protocol):
    """uvicorn's protocol, which closes the connection of a client that does not read."""

    _unread: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """Begin to wait for the client: the operating system and the transport store no more."""
        super().pause_writing()
        # Without an abort the connection would stay open until the client has read the rest.
        self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on after the client has read."""
        self._stop_waiting()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the wait for the client."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class _Uvicorn(uvicorn.Server):
    """uvicorn without its handling of signals, which would end the process by the signal itself."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield

    def abort_connections(self) -> None:
        """Close all connections, also those whose clients do not read."""
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


class Server:
    """A server of one model.

    Args:
        model: the model.
        settings: the options.
        listener: a bound socket, which listens from now on.

    Raises:
        SmolseekError: for numbers out of range.
    """

    def __init__(self, model: Model, settings: Settings, listener: socket.socket) -> None:
        self._settings, self._listener = settings, listener
        metrics = Metrics()
        scheduler = Scheduler(
            model.model,
            max_sequences=settings.max_sequences,
            cache_tokens=settings.cache_tokens,
            max_queue=settings.max_queue,
        )
        self.cache_bytes = scheduler.cache_bytes
        """Memory of the cache."""
        self.worker = Worker(scheduler, model.tokenizer, metrics)
        self.service = Service(model, self.worker, settings, metrics)
        config = uvicorn.Config(
            create_app(self.service),
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            http=_Protocol,
            limit_concurrency=settings.max_queue + settings.max_sequences + SPARE_CONNECTIONS,
            server_header=False,
            timeout_keep_alive=30,  # longer than clients keep idle connections, so that none is closed under a request
            timeout_graceful_shutdown=5,
        )
        self._uvicorn = _Uvicorn(config)
        self._stop = asyncio.Event()
        self._signals = 0
        listener.listen(1024)  # from now on, connections wait for `run`

    async def run(self, handle_signals: bool = True) -> None:
        """Serve until SIGTERM, SIGINT or `stop`. Running requests may end, new ones are refused.

        Raises:
            RuntimeError: if the thread that generates text has failed.
        """
        if handle_signals:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: loop.call_soon_threadsafe(self.stop))
        self.worker.start()
        serving = asyncio.ensure_future(self._uvicorn.serve(sockets=[self._listener]))
        try:
            while not self._stop.is_set() and self.worker.failure is None and not serving.done():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), 0.2)
            await self._drain()
        finally:
            self._uvicorn.should_exit = True
            await serving
            self.worker.stop()
        if self.worker.failure is not None:
            raise RuntimeError("the thread that generates text has failed") from self.worker.failure

    def stop(self) -> None:
        """Refuse new requests, and end when the running ones have ended. The second call does not wait for them."""
        self._signals += 1
        self._stop.set()

    async def _drain(self) -> None:
        """Wait for the running requests, then cancel them."""
        service = self.service
        service.draining = True
        if service.active:
            console.say(f"waiting for {len(service.active)} running requests (up to {self._settings.drain:g} s)")
        await self._wait_for_requests(self._settings.drain)
        for ticket in list(service.active):
            self.worker.cancel(ticket)
        self._signals = 1
        await self._wait_for_requests(LAST_SECONDS)
        self._uvicorn.should_exit = True
        await asyncio.sleep(0.2)
        if service.active:
            self._uvicorn.abort_connections()

    async def _wait_for_requests(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self.service.active and loop.time() < end and self._signals < 2:
            await asyncio.sleep(0.02)
