"""Uploads to a stand-in for the hub on the loopback interface."""

import base64
import json
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.storage.hf_folder import save_folder


class Hub:
    """Takes repositories and commits, and keeps what it was sent."""

    def __init__(self) -> None:
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.refuses = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self._answer({"error": "no"} if hub.refuses else {"sha": "0" * 40}, 403 if hub.refuses else 200)

            def do_POST(self) -> None:
                body = self._body()
                if hub.refuses:
                    return self._answer({"error": "no"}, 403)
                if self.path == "/api/repos/create":
                    hub.created.append(json.loads(body))
                    return self._answer({"url": "https://huggingface.co/owner/name"})
                if "/preupload/" in self.path:
                    files = [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in json.loads(body)["files"]
                    ]
                    return self._answer({"files": files})
                if self.path.startswith("/api/validate-yaml"):
                    return self._answer({"errors": [], "warnings": []})
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                self._answer({"commitUrl": "https://huggingface.co/owner/name/commit/1", "commitOid": "1"})

            def _body(self) -> bytes:
                if self.headers.get("transfer-encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("content-length") or 0))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def _answer(self, value: dict, code: int = 200) -> None:
                body = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.close()


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    save_folder(new_model(replace(preset("tiny"), num_hidden_layers=1, vocab_size=64)), tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("visibility", ["private", "public"])
def test_a_folder_is_uploaded_with_its_card(tmp_path, run_cli, hub, source, visibility):
    options = ["--push-to-hub", "owner/name", *(["--public"] if visibility == "public" else [])]
    result = run_cli("export", source, tmp_path / "out", "--format", "hf", *options)
    assert result.code == 0, result.err
    assert hub.created[0]["name"] == "name" and hub.created[0].get("visibility") == visibility
    assert hub.files.keys() == {path.name for path in (tmp_path / "out").iterdir()}
    assert "vllm serve owner/name" in hub.files["README.md"].decode()
    assert "Uploaded: " in result.out


def test_a_refused_upload_leaves_the_export_and_says_how_to_go_on(tmp_path, run_cli, hub, source):
    hub.refuses = True
    result = run_cli("export", source, tmp_path / "out", "--format", "hf", "--push-to-hub", "owner/name")
    assert result.code == 2 and result.err.count("\n") == 1
    assert re.search(r"owner/name was not uploaded \(HTTP 403 .*\): .* hf upload owner/name \S+out", result.err)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "repo, token, words",
    [
        ("owner/name", None, "needs a Hugging Face token"),
        ("name", "hf_test", "is not the name of a repository: use OWNER/NAME"),
        ("a/b/c", "hf_test", "is not the name of a repository: use OWNER/NAME"),
    ],
)
def test_without_token_or_name_nothing_is_written(tmp_path, run_cli, monkeypatch, source, repo, token, words):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    result = run_cli("export", source, tmp_path / "out", "--format", "hf", "--push-to-hub", repo)
    assert result.code == 2 and words in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interrupted_upload_says_that_the_export_is_complete(tmp_path, run_cli, hub, source, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", interrupted)
    result = run_cli("export", source, tmp_path / "out", "--format", "hf", "--push-to-hub", "owner/name")
    assert result.code == 130 and "owner/name was not uploaded, but" in result.err and "out is complete" in result.err
    assert (tmp_path / "out" / "config.json").exists()
