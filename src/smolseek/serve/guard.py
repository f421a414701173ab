"""Refuses requests before they reach the application: foreign hosts, pages and keys, and bodies that are too large."""

import asyncio
import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from smolseek import console
from smolseek.serve.errors import ApiError
from smolseek.serve.metrics import Metrics
from smolseek.serve.settings import Settings, is_loopback

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_BODY = 4 << 20
"""Largest body in bytes."""
DISCARDED = 64 << 20
"""Bytes of a body that is too large which are read before the connection is closed, so that the client sees why."""
BODY_SECONDS = 30.0
"""Seconds for a body to arrive."""
OPEN_PATHS = ("/", "/docs", "/openapi.json", "/health")
"""Paths that need no API key; the playground's files need none either."""
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics", *OPEN_PATHS)
DETAILS = "smolseek.details"
"""Key of a request's scope under which the application leaves a text for the log."""
PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Private-Network": "true",  # a page of the internet may use a server at 127.0.0.1
    "Access-Control-Max-Age": "600",
}


class Guard:
    """An ASGI application around the server's application. It also counts and logs the requests.

    Args:
        app: the application.
        settings: who may use the server.
        metrics: where requests are counted.
    """

    def __init__(self, app: App, settings: Settings, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._key = None if settings.api_key is None else settings.api_key.encode("utf-8")
        self._hosts = {settings.host.strip("[]").lower(), *(_host_name(host) for host in settings.allowed_host)}
        self._origins = {origin.rstrip("/").lower() for origin in settings.allowed_origin}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it to the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 0
        headers = _header_map(scope)
        cors = self._cors(headers)

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = {"X-Content-Type-Options": "nosniff", **cors}
                raw = [(name.lower().encode(), value.encode()) for name, value in added.items()]
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(one for one in raw if one[0] not in present)]
            await send(message)

        try:
            error = self._refusal(scope, headers)
            # Also before a refusal, which a client that is still sending would not see.
            # The memory of a body is for those who may use the server: no other request needs a body.
            used = error is None and scope["method"] == "POST" and not _is_open(scope["path"])
            body = await _read_body(receive, keep=used)
            if body is None:  # the client has gone
                return
            if error is not None:
                await _send_error(counting_send, error)
            elif isinstance(body, ApiError):
                await _send_error(counting_send, body)
            elif scope["method"] == "OPTIONS" and cors:
                await _send(counting_send, 204, b"", PREFLIGHT | _allowed_headers(headers))
            else:
                await self._app(scope, _replayed(body, receive), counting_send)
        finally:
            self._report(scope, status, time.monotonic() - start)

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> ApiError | None:
        host = headers.get("host", "")
        name = _host_name(host)
        # The address at which the connection arrived is no name that another site could have chosen.
        if not (is_loopback(name) or name in self._hosts or name == (scope.get("server") or ("",))[0]):
            message = f"the host {host[:100]!r} is not this server: use its address, or start it with --allowed-host"
            return ApiError(403, message, code="host_not_allowed")
        origin = headers.get("origin", "").lower()
        if origin and origin not in (f"http://{host.lower()}", f"https://{host.lower()}", *self._origins):
            message = f"pages of {origin[:100]!r} may not use this server: start it with --allowed-origin to let them"
            return ApiError(403, message, code="origin_not_allowed")
        if self._key is not None and scope["method"] != "OPTIONS" and not _is_open(scope["path"]):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            # All bytes are compared, so that the time says nothing about the key.
            if not (hmac.compare_digest(key.strip(" \t").encode("latin-1"), self._key) and scheme.lower() == "bearer"):
                message = "the API key is missing or wrong: send it in the header Authorization: Bearer KEY"
                return ApiError(401, message, code="invalid_api_key")
        if scope["method"] == "POST" and not _is_json(headers.get("content-type", "")):
            message = "the body must be JSON: set the header Content-Type: application/json"
            return ApiError(415, message, code="unsupported_media_type")
        return None

    def _cors(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return the headers that let a page of another origin read the answer."""
        origin = headers.get("origin", "")
        if origin.lower() not in self._origins:
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": "retry-after",
            "Vary": "Origin",
        }

    def _report(self, scope: Scope, status: int, seconds: float) -> None:
        """Count and log a request. A status of 0 stands for a client that has gone before the answer."""
        path = scope["path"]
        self._metrics.count_request(path if path in ENDPOINTS else "other", status or 499, seconds)
        if path in ("/health", "/metrics") and status == 200:  # programs ask for these all the time
            return
        details = scope.get(DETAILS, "")
        what = f"{scope['method'][:20]} {console.printable(path)[:200]} {status or 'client gone'} {seconds:.3f} s"
        console.say(f"{time.strftime('%H:%M:%S')} {what}{details and ', '}{details}")


async def _read_body(receive: Receive, *, keep: bool) -> bytes | ApiError | None:
    """Return the body, the error of a body that cannot be read, or None if the client has gone.

    Without `keep` the body is read, but not stored.
    """
    error = ApiError(413, f"the body is larger than {LARGEST_BODY:,} bytes: shorten the prompt", code="body_too_large")
    body, size, more = bytearray(), 0, True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more and size <= DISCARDED:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                more = message.get("more_body", False)
                size += len(message.get("body", b""))
                if keep and size <= LARGEST_BODY:
                    body += message.get("body", b"")
                else:
                    body.clear()
    except TimeoutError:
        return ApiError(408, f"the body did not arrive in {BODY_SECONDS:.0f} s: send it again", code="body_too_slow")
    return error if size > LARGEST_BODY else bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once, and then what `receive` gives: the client's end."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _send_error(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body(), ensure_ascii=False).encode("utf-8")
    headers = {"Content-Type": "application/json", "Connection": "close", **error.headers}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    await _send(send, error.status, body, headers)


async def _send(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _header_map(scope: Scope) -> dict[str, str]:
    """Return the headers; a header that comes twice has both values."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _host_name(host: str) -> str:
    """Return the name in a header Host, without the port and without the brackets of an IPv6 address."""
    match = re.fullmatch(r"\[([^\]]*)\](:\d*)?|([^:]*)(:\d*)?", host.strip())
    return "" if match is None else (match[1] or match[3] or "").lower().rstrip(".")


def _allowed_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the answer to a preflight about headers: all that it asks for, such as those of OpenAI's client."""
    requested = headers.get("access-control-request-headers", "")
    allowed = requested if re.fullmatch(r"[\w\-, ]+", requested, re.ASCII) else "authorization, content-type"
    return {"Access-Control-Allow-Headers": allowed}


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith("/playground/")


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
