"""Who may use a server: hosts, pages, keys, and the size of bodies."""

import json
import socket

import pytest
from running_server import running

from smolseek.serve import guard

BODY = {"prompt": "a", "max_tokens": 1}


def code(answer) -> tuple[int, str | None]:
    """Return the status and the code of an error."""
    status, headers, data = answer
    assert headers["content-type"] == "application/json" and headers["x-content-type-options"] == "nosniff"
    error = json.loads(data)["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return status, error["code"]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost:{port}", "LOCALHOST", "127.0.0.9:1", "[::1]:80", "a.localhost"]
)
def test_loopback_names_are_this_server(server, host):
    assert server.request("GET", "/health", headers={"Host": host.format(port=server.port)})[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", "a b", "[::1", "localhost@x"]
)
def test_another_host_is_refused(server, host):
    assert code(server.request("GET", "/v1/models", headers={"Host": host})) == (403, "host_not_allowed")


def test_a_page_elsewhere_cannot_drive_the_server(server):
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", f"http://localhost:{server.port}"):
        for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("OPTIONS", "/v1/completions")):
            answer = server.request(method, path, BODY if method == "POST" else None, {"Origin": origin})
            assert code(answer) == (403, "origin_not_allowed")
            assert "access-control-allow-origin" not in answer[1]
    assert server.request("POST", "/v1/completions", BODY, {"Origin": server.url})[0] == 200  # the playground
    # What a page may send without a preflight and without an Origin in old browsers.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = server.request("POST", "/v1/completions", BODY, {"Content-Type": kind})
        assert code(answer) == (415, "unsupported_media_type")
    assert (
        server.request("POST", "/v1/completions", BODY, {"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200
    )


def test_hosts_and_pages_can_be_allowed(model):
    allowed = {"allowed_host": ("models.example",), "allowed_origin": ("https://chat.example",)}
    with running(model, **allowed) as server:
        headers = {"Host": "models.example:80", "Origin": "https://chat.example"}
        status, received, _ = server.request("POST", "/v1/completions", BODY, headers)
        assert status == 200 and received["access-control-allow-origin"] == "https://chat.example"
        assert received["access-control-expose-headers"] == "retry-after"
        status, received, _ = server.request("OPTIONS", "/v1/completions", headers=headers)
        assert status == 204 and "authorization" in received["access-control-allow-headers"]
        for requested in ("authorization,content-type,x-stainless-os", "X-A, x-b"):  # OpenAI's client in a browser
            asking = headers | {"Access-Control-Request-Headers": requested}
            _, received, _ = server.request("OPTIONS", "/v1/completions", headers=asking)
            assert received["access-control-allow-headers"] == requested
            foreign = asking | {"Origin": "https://evil.example"}
            assert server.request("OPTIONS", "/v1/completions", headers=foreign)[0] == 403
        asking = headers | {"Access-Control-Request-Headers": "é<"}
        _, received, _ = server.request("OPTIONS", "/v1/completions", headers=asking)
        assert received["access-control-allow-headers"] == "authorization, content-type"
        assert server.request("GET", "/health", headers={"Host": "other.example"})[0] == 403
        assert server.request("GET", "/health", headers={"Origin": "https://chat.example.evil"})[0] == 403


def test_a_key_is_needed_for_everything_but_pages_and_health(model):
    with running(model, api_key="s3cret-ключ") as server:
        key = "Bearer s3cret-ключ".encode().decode("latin-1")
        for path in ("/v1/models", "/metrics", "/v1/anything"):
            for header in ({}, {"Authorization": "Bearer s3cret"}, {"Authorization": key[7:]}, {"Authorization": ""}):
                answer = server.request("GET", path, headers=header)
                assert code(answer) == (401, "invalid_api_key") and answer[1]["www-authenticate"] == "Bearer"
        assert code(server.request("POST", "/v1/completions", BODY)) == (401, "invalid_api_key")
        assert server.request("POST", "/v1/completions", BODY, {"Authorization": key})[0] == 200
        for path in ("/health", "/docs", "/openapi.json", "/"):
            assert server.request("GET", path)[0] == 200
        assert "s3cret" not in "".join(server.log)


@pytest.mark.parametrize("key", ["schlüssel à", "х", "a\u0085b"])  # the last byte of à is a space in Latin-1
def test_a_key_may_end_with_any_character(model, key):
    with running(model, api_key=key) as server:
        header = f"Bearer {key}".encode().decode("latin-1")
        assert server.request("GET", "/v1/models", headers={"Authorization": header})[0] == 200
        assert server.request("GET", "/v1/models", headers={"Authorization": f"{header} \t"})[0] == 200
        assert server.request("GET", "/v1/models", headers={"Authorization": header[:-1]})[0] == 401


def test_only_a_request_that_is_let_in_may_store_a_body(model, monkeypatch):
    bodies = []
    read = guard._read_body

    async def reading(receive, *, keep):
        body = await read(receive, keep=keep)
        bodies.append((keep, body))
        return body

    monkeypatch.setattr(guard, "_read_body", reading)
    with running(model, api_key="key") as server:
        bodies.clear()
        key = {"Authorization": "Bearer key"}
        for method, path, headers in (
            ("POST", "/v1/completions", {}),
            ("POST", "/v1/completions", key | {"Host": "evil.example"}),
            ("POST", "/health", {}),
            ("GET", "/", {}),
            ("GET", "/v1/models", key),
            ("POST", "/v1/completions", key),
        ):
            server.request(method, path, BODY, headers)
    assert [keep for keep, _ in bodies] == [False] * 5 + [True]
    assert [body for _, body in bodies] == [b""] * 5 + [json.dumps(BODY).encode()]


def test_a_body_that_is_too_large_is_a_413(server, monkeypatch):
    monkeypatch.setattr(guard, "LARGEST_BODY", 10_000)
    monkeypatch.setattr(guard, "DISCARDED", 100_000)
    good = json.dumps({"prompt": "a" * 100, "max_tokens": 1}).encode()
    assert server.request("POST", "/v1/completions", good + b" " * (10_000 - len(good)))[0] == 200
    for size in (10_001, 90_000):  # the client reads the answer, although it was still sending
        assert code(server.request("POST", "/v1/completions", b" " * size)) == (413, "body_too_large")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(12):
            connection.sendall(b"3e8\r\n" + b" " * 1000 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_arrive_is_a_408(server, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
        assert b"408" in connection.makefile("rb").readline()


def test_a_refusal_reaches_a_client_that_sends_a_large_body(server):
    headers = {"Host": "evil.example"}
    for size in (1 << 20, 5 << 20):
        assert code(server.request("POST", "/v1/completions", b" " * size, headers)) == (403, "host_not_allowed")
    assert code(server.request("POST", "/v1/completions", b" " * (5 << 20))) == (413, "body_too_large")


def test_the_log_has_no_text_of_requests_unless_asked(model):
    body = {"prompt": "my secret hat", "max_tokens": 2, "stop": ["secret stop"], "user": "secret user"}
    for log_prompts in (False, True):
        with running(model, log_prompts=log_prompts) as server:
            server.request("POST", "/v1/completions", body)
            server.request("POST", "/v1/completions", body | {"prompt": ["secret"] * 500})
            server.request("POST", "/v1/completions", body | {"secret": 1, "logit_bias": {"secret": 1}})
            server.request("GET", "/v1/%0d%0aforged%20line?secret=1")
            log = "\n".join(server.log)
        assert ("secret" in log) == log_prompts
        assert len([line for line in log.split("\n") if line.startswith("forged")]) == 0


def test_paths_of_this_machine_do_not_leave_it(server):
    for path in ("/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models//etc/passwd", "/playground/../app.py"):
        status, _, data = server.request("GET", path)
        assert status == 404 and b"root:" not in data and b"import" not in data
