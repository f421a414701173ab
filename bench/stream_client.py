"""A client of OpenAI's interface that streams, and notes when each token arrives. Many run in one event loop.

Both servers send each event as a whole number of lines, so that the lines of the chunked encoding can be skipped.
"""

import asyncio
import json
import time
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Answer(NamedTuple):
    """One answer. Times are in seconds of time.perf_counter."""

    sent: float
    arrived: list[float]
    """When each event with text arrived."""
    text: str
    usage: dict[str, Any]

    @property
    def first(self) -> float:
        """Seconds from the request to its first text."""
        return self.arrived[0] - self.sent


async def stream(address: str, path: str, body: dict[str, Any], arrived: list[float] | None = None) -> Answer:
    """Send a request and read its events. `arrived` is filled meanwhile, for a caller that watches it.

    Raises:
        RuntimeError: if the server refuses the request, or ends its answer early.
    """
    arrived = [] if arrived is None else arrived
    server = urlsplit(address)
    reader, writer = await asyncio.open_connection(server.hostname, server.port)
    data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {server.netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    sent, texts, usage = time.perf_counter(), [], {}
    try:
        writer.write(head.encode() + data)
        while not (line := await reader.readline()).startswith(b"data: [DONE]"):
            if not line:
                raise RuntimeError(f"{address}{path}: the answer ended early, after {''.join(texts)[-200:]!r}")
            if line.startswith(b"HTTP/") and b" 200 " not in line:
                raise RuntimeError(f"{address}{path}: {(await reader.read()).decode(errors='replace')[-500:]}")
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                if text := choice["delta"].get("content") if "delta" in choice else choice.get("text"):
                    arrived.append(time.perf_counter())
                    texts.append(text)
    finally:
        writer.close()
    return Answer(sent, arrived, "".join(texts), usage)
