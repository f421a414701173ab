"""Answers that end when the client goes: server-sent events, and answers in one object."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from fastapi.responses import Response

from smolseek.serve.errors import ApiError

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Server-sent events.

    Args:
        events: one or several events at a time. An `ApiError` that is raised there becomes the last event.
        leave: called if the client goes before the end.
        close: called at the end, in any case.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], leave: Callable[[], None], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._leave, self._close = events, leave, close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            with when_client_goes(receive, self._leave):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    async for data in self._events:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                except ApiError as error:
                    await send({"type": "http.response.body", "body": event(error.body()), "more_body": True})
                await send({"type": "http.response.body", "body": DONE, "more_body": False})
        finally:
            self._close()


def event(one: dict[str, Any]) -> bytes:
    """Return an object as a server-sent event."""
    return f"data: {json.dumps(one, ensure_ascii=False)}\n\n".encode()


@contextlib.contextmanager
def when_client_goes(receive: Callable[[], Awaitable[Any]], leave: Callable[[], None]) -> Iterator[None]:
    """Context in which `leave` is called as soon as the client has closed the connection, or the task is cancelled."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        leave()

    waiting = asyncio.ensure_future(wait())
    try:
        yield
    except BaseException:
        leave()
        raise
    finally:
        waiting.cancel()
