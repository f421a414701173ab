"""`smolseek serve` as a process: what it prints, signals, and addresses."""

import contextlib
import http.client
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import ForkServer
from running_server import running, small_chat_model

from smolseek.api import load
from smolseek.serve import server as server_module
from smolseek.storage.hf_folder import save_folder

# The answer has a megabyte: it is not finished before its client reads it.
LONG = {
    "prompt": "The thin hat",
    "max_tokens": 450,
    "logit_bias": {"256": -100},
    "stream": True,
    "n": 3,
    "logprobs": 20,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = small_chat_model()
    path = tmp_path_factory.mktemp("models") / "small"
    save_folder(model.model, path, model.tokenizer)
    return path


@pytest.fixture(scope="module")
def server_of_processes() -> Iterator[ForkServer]:
    """Not the fixture that all tests share, because it loads modules that read the environment."""
    processes = ForkServer()
    yield processes
    processes.close()


class Serving:
    """A running process."""

    def __init__(self, processes: ForkServer, folder: Path, output: Path, *options: str) -> None:
        self.output = output
        arguments = (
            "-m",
            "smolseek",
            "serve",
            folder,
            "--port",
            "0",
            "--cache-tokens",
            "4096",
            "--dtype",
            "float32",
            *options,
        )
        self.process = processes.start(*arguments, output=output, modules=["smolseek.serve.server"])
        end = time.monotonic() + 60
        while not (match := re.search(r"http://127\.0\.0\.1:(\d+)/v1", self.text)):
            assert time.monotonic() < end and self.process.poll() is None, self.text
            time.sleep(0.02)
        self.port = int(match[1])

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def open(self, body: dict) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.sock = socket.socket()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sock.connect(("127.0.0.1", self.port))
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_end_and_refuses_new_ones(server_of_processes, folder, tmp_path, number):
    serving = Serving(server_of_processes, folder, tmp_path / "log")
    stream = serving.open(LONG)
    assert stream.read(6) == b"data: "
    serving.process.send_signal(number)
    end = time.monotonic() + 30
    while "waiting for 1 running request" not in serving.text:
        assert time.monotonic() < end, serving.text
        time.sleep(0.001)
    refused = serving.open(LONG)
    assert refused.status == 503 and json.loads(refused.read())["error"]["code"] == "shutting_down"
    assert refused.headers["retry-after"]
    events = stream.read().decode().split("\n\n")
    assert events[-2] == "data: [DONE]" and json.loads(events[-3][6:])["choices"][0]["finish_reason"] == "length"
    assert serving.process.wait(30) == 0, serving.text
    lines = serving.text.splitlines()
    assert lines[-1] == "stopped" and "small (float32): http://127.0.0.1:" in lines[0]
    assert "playground" in lines[0] and "/docs" in lines[0] and "Traceback" not in serving.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_loses_its_connection(monkeypatch, stream):
    monkeypatch.setattr(server_module, "UNREAD_SECONDS", 0.2)
    # The answer has a megabyte, for which there is no space in buffers.
    body = {"prompt": "a " * 200, "n": 8, "echo": True, "logprobs": 20, "max_tokens": 1, "stream": stream}
    with running(small_chat_model()) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
        server.until(lambda: any("POST /v1/completions" in line for line in server.log))
        server.until_idle()
        server.until(lambda: not server.server._uvicorn.server_state.connections)


def test_connections_are_limited(monkeypatch):
    monkeypatch.setattr(server_module, "SPARE_CONNECTIONS", 1)
    with running(small_chat_model(), max_sequences=1, max_queue=1) as server:
        connections = server.server._uvicorn.server_state.connections
        with contextlib.ExitStack() as idle:
            for _ in range(2):
                idle.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            server.until(lambda: len(connections) == 2)
            assert server.request("GET", "/v1/models")[0] == 503
        server.until(lambda: not connections)
        assert server.request("GET", "/v1/models")[0] == 200


def test_requests_are_cancelled_after_the_grace_time(server_of_processes, folder, tmp_path):
    serving = Serving(server_of_processes, folder, tmp_path / "log", "--drain", "0")
    stream = serving.open(LONG)
    unread = serving.open(LONG | {"seed": 1})  # the server does not wait for this client
    assert stream.read(6) == b"data: "
    serving.process.send_signal(signal.SIGTERM)
    last = stream.read().decode().split("\n\n")[-3]
    assert json.loads(last[6:])["error"]["code"] == "shutting_down"
    assert serving.process.wait(30) == 0 and "Traceback" not in serving.text
    unread.close()


@pytest.mark.parametrize("dtype", ["q8_0", "bfloat16"])
def test_a_model_in_another_number_format_is_served(folder, dtype):
    with running(load(str(folder), dtype=dtype)) as server:
        (entry,) = json.loads(server.request("GET", "/v1/models")[2])["data"]
        assert (entry["id"], entry["smolseek"]["number_format"]) == ("small", dtype)
        status, _, data = server.request("POST", "/v1/completions", {"prompt": "The thin hat", "max_tokens": 5})
        assert status == 200 and json.loads(data)["usage"]["prompt_tokens"] > 0


def test_other_machines_need_a_key(run_cli, folder, monkeypatch):
    monkeypatch.delenv("SMOLSEEK_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        result = run_cli("serve", folder, "--host", host)
        assert result.code == 2 and f"--host {host} lets other machines in" in result.err
    result = run_cli("serve", folder, "--api-key", "a", "--no-auth")
    assert result.code == 2 and "contradict" in result.err
    monkeypatch.setenv("SMOLSEEK_API_KEY", " ")
    assert "is empty or has spaces" in run_cli("serve", folder).err


def test_an_address_in_use_is_one_line(run_cli, folder):
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        result = run_cli("serve", folder, "--port", str(port))
    assert result.code == 2 and f"cannot listen at 127.0.0.1 port {port} (Address already in use)" in result.err
    result = run_cli("serve", folder, "--host", "203.0.113.7", "--no-auth")
    assert result.code == 2 and "cannot listen at 203.0.113.7" in result.err
    assert run_cli("serve", folder, "--port", "70000").code == 2
    assert "max-sequences 513 must be at most 512" in run_cli("serve", folder, "--max-sequences", "513").err
    assert run_cli("serve", folder.parent / "none", "--port", "0").code == 2
