"""A local HTTP server in place of the hub, for `huggingface_hub` and `datasets`. The tests can request faults."""

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
KINDS = ("timeout", "reset", "429", "500", "short", "long", "whole", "wrong range")


class StandInHub:
    """Serves `files` (path -> bytes) as the dataset `repo`; `fault(number)` names the fault of data request `number`.

    `more` has further repositories, for example "models/owner/name" -> files. Files of the repositories in `gated` are
    refused.
    """

    def __init__(self, repo: str, files: Mapping[str, bytes], fault: Callable[[int], str | None] = lambda n: None):
        self.files, self.fault = dict(files), fault
        self.more: dict[str, dict[str, bytes]] = {f"datasets/{repo}": self.files}
        self.gated: set[str] = set()
        self.requests = 0
        self.faults: Counter[str] = Counter()
        self.requested: list[str] = []
        self.hang = 1.5
        self.unavailable = False
        self._lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def do_POST(self) -> None:
                hub._answer(self, body=True)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # the client has closed the connection, as it should after a fault

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        parts = urlsplit(handler.path)
        path = unquote(parts.path)
        self.requested.append(f"{handler.command} {path}")
        length = int(handler.headers.get("content-length") or 0)
        sent = handler.rfile.read(length).decode() if length else ""
        if self.unavailable:
            return self._reset(handler)
        api = re.fullmatch(
            r"/api/((?:datasets|models)/[^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?", path
        )
        file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name = api[1] if api else file[1] if file else ""
        name = name if name.startswith("datasets/") or api else f"models/{name}"
        if name not in self.more:
            return self._send(handler, 401, b"", {"X-Error-Code": "RepoNotFound"})
        files = self.more[name]
        if api and api[2] == "tree":
            folder = api[4]
            deep = parse_qs(parts.query).get("recursive", [""])[0].lower() in ("true", "1")
            return self._json(handler, self._tree(files, folder, deep))
        if api and api[2] == "paths-info":
            values = parse_qs(sent)
            paths = values.get("paths") or json.loads(sent or "{}").get("paths", [])
            return self._json(handler, [e for p in paths for e in self._entry(files, p)])
        if api:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            gated = "auto" if name in self.gated else False
            values = {"id": name.partition("/")[2], "sha": COMMIT, "siblings": siblings, "tags": [], "gated": gated}
            return self._json(handler, values)
        if file and name in self.gated:
            return self._send(handler, 401, b"", {"X-Error-Code": "GatedRepo"})
        if file and file[3] in files:
            return self._file(handler, files[file[3]], file[3], body)
        self._send(handler, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def _entry(self, files: Mapping[str, bytes], path: str) -> list[dict]:
        if path in files:
            data = files[path]
            return [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}]
        if any(name.startswith(path + "/") for name in files):
            return [{"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}]
        return []

    def _tree(self, files: Mapping[str, bytes], folder: str, deep: bool) -> list[dict]:
        prefix = folder + "/" if folder else ""
        inside = [name for name in files if name.startswith(prefix)]
        names = set(inside) if deep else {prefix + name[len(prefix) :].split("/")[0] for name in inside}
        if deep:
            for name in inside:
                parents = name[len(prefix) :].split("/")[:-1]
                names |= {prefix + "/".join(parents[: i + 1]) for i in range(len(parents))}
        return [entry for name in sorted(names) for entry in self._entry(files, name)]

    def _file(self, handler: BaseHTTPRequestHandler, data: bytes, name: str, body: bool) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("range") or "")
        if not wanted or name.endswith((".md", ".txt", ".safetensors")):
            return self._send(handler, 200, data if body else b"", headers, None if body else len(data))
        start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        part = data[start:stop]
        with self._lock:
            kind = self.fault(self.requests)
            self.requests += 1
            if kind:
                self.faults[kind] += 1
        if kind is None:
            self._send(handler, 206, part, headers)
        elif kind == "timeout":
            handler.send_response(206)
            handler.send_header("Content-Length", str(len(part)))
            handler.send_header("Content-Range", headers["Content-Range"])
            handler.end_headers()
            handler.wfile.write(part[: len(part) // 2])
            time.sleep(self.hang)
            handler.close_connection = True
        elif kind == "reset":
            handler.send_response(206)
            handler.send_header("Content-Length", str(len(part)))
            handler.send_header("Content-Range", headers["Content-Range"])
            handler.end_headers()
            handler.wfile.write(part[: len(part) // 3])
            self._reset(handler)
        elif kind == "429":
            self._send(handler, 429, b"slow down", {"Retry-After": "0"})
        elif kind == "500":
            self._send(handler, 500, b"oops", {})
        elif kind == "short":
            self._send(handler, 206, part[:-1], headers)
        elif kind == "long":
            self._send(handler, 206, part + b"x", headers)
        elif kind == "whole":
            self._send(handler, 200, data, {})
        elif kind == "wrong range":
            headers["Content-Range"] = f"bytes {start + 1}-{stop}/{len(data)}"
            self._send(handler, 206, part[::-1], headers)
        else:
            raise AssertionError(kind)

    def _reset(self, handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.wfile.flush()
        # With a linger time of 0 seconds, closing the connection sends RST.
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.shutdown(socket.SHUT_RD)
        handler.connection.close()

    def _json(self, handler: BaseHTTPRequestHandler, value: object) -> None:
        self._send(handler, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict, length: int | None = None
    ) -> None:
        handler.send_response(status)
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(data) if length is None else length))
        handler.end_headers()
        handler.wfile.write(data)
