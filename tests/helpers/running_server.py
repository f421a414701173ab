"""Runs `smolseek serve` in a thread, with a small random model."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
from small_models import MLA, small_tokenizer

from smolseek import console
from smolseek.api import Model
from smolseek.model.transformer import new_model
from smolseek.serve.server import Server, bind, url
from smolseek.serve.settings import Settings

TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)


def small_chat_model(**changes: object) -> Model:
    """Return a random model with MLA and experts, and a chat template."""
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = replace(MLA, vocab_size=266, max_position_embeddings=512, **changes)
    built = new_model(config).eval()
    return Model(SimpleNamespace(model=built, tokenizer=tokenizer, config=built.config), "models/small")


class RunningServer:
    """A server in a thread of this process."""

    def __init__(self, model: Model, **settings: object) -> None:
        self.settings = Settings(**{"port": 0, "drain": 0.0, "cache_tokens": 8192, **settings})
        self.log: list[str] = []
        """The lines that the server has printed."""
        listener = bind(self.settings)
        self.url, self.port = url(listener), listener.getsockname()[1]
        self.server = Server(model, self.settings, listener)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.until(lambda: self._answers())

    @property
    def stats(self):
        return self.server.worker.stats

    def stop(self) -> None:
        """Begin to drain."""
        self._loop.call_soon_threadsafe(self.server.stop)

    def close(self) -> None:
        """End the server."""
        if self._thread.is_alive():
            self.stop()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        """Wait for a condition."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.error is None, self.error
            time.sleep(0.005)

    def until_idle(self) -> None:
        """Wait until no text is running, and check that all pages of the cache are free."""
        self.until(lambda: not self.server.service.active and self.stats.running == self.stats.waiting == 0)
        assert self.stats.cache_tokens_used == 0

    def request(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request. `body` is bytes, or an object for JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        defaults = {"Content-Type": "application/json"} if data is not None else {}
        try:
            connection.request(method, path, data, {**defaults, **(headers or {})})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return self.request("GET", "/health")[0] == 200
        return False

    def _run(self) -> None:
        async def run() -> None:
            self._loop = asyncio.get_running_loop()
            await self.server.run(handle_signals=False)

        try:
            with mock.patch.object(console, "say", self.log.append):
                asyncio.run(run())
        except BaseException as error:
            self.error = error


@contextlib.contextmanager
def running(model: Model, **settings: object) -> Iterator[RunningServer]:
    """Context with a running server."""
    server = RunningServer(model, **settings)
    try:
        yield server
    finally:
        server.close()
