"""The playground's files: their routes, a strict Content-Security-Policy, and no way to read text as HTML."""

import re

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from smolseek.serve.playground import FILES, playground

SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in FILES.values() if path.suffix == ".js"}
PAGE = FILES["/"].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(playground())
    return TestClient(app)


def test_the_page_and_all_that_it_loads_are_served(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8" and page.text == PAGE
    wanted = re.findall(r'(?:href|src)="(playground/[^"]+)"', page.text)
    for source in SCRIPTS.values():
        wanted += [f"playground/{name}" for name in re.findall(r'from "\./([^"]+)"', source)]
    assert {f"/{name}" for name in wanted} | {"/"} == set(FILES)
    types = {".css": "text/css", ".js": "text/javascript"}
    for url in set(FILES) - {"/"}:
        assert client.get(url).headers["content-type"] == types[FILES[url].suffix] + "; charset=utf-8"
    assert client.get("/playground/__init__.py").status_code == 404
    assert client.get("/playground/../__init__.py").status_code == 404


def test_the_policy_allows_files_of_this_server_only(client):
    for url in FILES:
        policy = client.get(url).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "require-trusted-types-for 'script'" in policy
        assert "unsafe" not in policy and "http" not in policy and "*" not in policy


def test_the_files_need_nothing_that_the_policy_forbids():
    assert not re.search(r"\s(?:on\w+|style)=", PAGE) and "<style" not in PAGE
    assert re.findall(r"<script[^>]*>(.*?)</script>", PAGE, re.DOTALL) == [""]
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function|srcdoc"
    assert {name: re.findall(sinks, source) for name, source in SCRIPTS.items()} == {name: [] for name in SCRIPTS}
    for path in FILES.values():
        urls = re.findall(r"\w+://[^\s\"'`)]+", path.read_text(encoding="utf-8"))
        assert set(urls) <= {"http://www.w3.org/2000/svg"}, path.name


def test_every_element_that_the_scripts_look_up_is_on_the_page():
    ids = set(re.findall(r'\bid="([^"]+)"', PAGE))
    options = set(re.findall(r'^  \["(\w+)", "', SCRIPTS["options.js"], re.MULTILINE))
    assert options and "temperature" in options
    for name, source in SCRIPTS.items():
        used = set(re.findall(r'byId\("([^"]+)"\)', source))
        assert used <= ids | options | {"stop"}, name


def test_every_control_of_the_page_has_a_name():
    labelled = set(re.findall(r'<label[^>]* for="([^"]+)"', PAGE))
    for tag, attributes in re.findall(r"<(input|select|textarea)\b([^>]*)>", PAGE):
        name = re.search(r'\bid="([^"]+)"', attributes)
        wrapped = re.search(rf"<label[^>]*><{tag}{re.escape(attributes)}>", PAGE)
        assert wrapped or (name and name[1] in labelled), attributes
    for attributes, text in re.findall(r"<button\b([^>]*)>(.*?)</button>", PAGE):
        assert "aria-label=" in attributes or re.sub(r"<[^>]*>", "", text).strip(), attributes
