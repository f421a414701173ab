"""The playground in Chromium, with a real server and a random model. `make soak` runs this file.

It needs the extra `browser` and a Chromium on the PATH, for example Debian's.
"""

import contextlib
import io
import json
import math
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running_server import RunningServer, running, small_chat_model

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install smolseek[browser]")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium"),
]

LAYERS, EXPERTS, TOKENS = 12, 16, 60
OPTIONS = {"temperature": 1, "top_p": 1, "min_p": 0, "max_tokens": TOKENS, "seed": 5}
MESSAGE = "In the light of 12 rivers"
CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")
NAMED_ROLES = {"button", "textbox", "searchbox", "slider", "spinbutton", "checkbox", "radio", "combobox", "link"}
NAMED_ROLES |= {"dialog", "application", "region", "complementary", "radiogroup", "article"}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    # Without an end token, every answer has as many tokens as it may.
    model = small_chat_model(num_hidden_layers=LAYERS, n_routed_experts=EXPERTS, eos_token_id=None)
    with running(model) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as play:
        flags = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: playwright.Browser, server: RunningServer) -> Iterator[Callable[..., playwright.Page]]:
    """Return a function that opens the playground. At the end, no script may have failed or been refused."""
    contexts, problems = [], []

    def opened(url: str = server.url, width: int = 1280, height: int = 800, **settings: object) -> playwright.Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(url)
        page.wait_for_selector("#welcome li, dialog[open]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [problem for problem in problems if "401 (Unauthorized)" not in problem] == []
    server.until_idle()


def write(page: playwright.Page, text: str = MESSAGE, **options: object) -> None:
    """Send a message with the keyboard, and wait for the end of the answer."""
    for name, value in {**OPTIONS, **options}.items():
        page.locator(f"#{name}").evaluate("(node, value) => { node.value = value; }", str(value))
    page.fill("#message", text)
    page.press("#message", "Control+Enter")
    page.wait_for_selector(".answer[aria-busy=false]")


def answered(server: RunningServer) -> dict:
    """Return the answer of the server to the message."""
    body = {"messages": [{"role": "user", "content": MESSAGE}], "logprobs": True, "top_logprobs": 5, "experts": True}
    status, _, answer = server.request("POST", "/v1/chat/completions", {**body, **OPTIONS})
    assert status == 200
    return json.loads(answer)["choices"][0]


def wait_until(page: playwright.Page, expression: str) -> None:
    """Wait until a JavaScript expression is true. Playwright's own way needs eval, which the page's policy forbids."""
    end = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(10)


def tokens(page: playwright.Page) -> playwright.Locator:
    return page.locator(".answer > .tokens .t")


def test_the_answer_is_that_of_the_server_and_a_token_shows_its_probabilities(open_page, server):
    page, expected = open_page(), answered(server)
    write(page)
    assert page.locator(".answer > .tokens").text_content() == expected["message"]["content"]
    figures = page.locator(".figures").inner_text()
    assert re.search(rf"\b{TOKENS} tokens", figures) and "tokens/s" in figures and "finish: max tokens" in figures
    assert re.search(r"prompt tokens, \d+ cached", figures)
    assert tokens(page).count() == TOKENS
    for number in (0, 7, TOKENS - 1):
        scored = expected["logprobs"]["content"][number]
        tokens(page).nth(number).hover()
        assert page.locator("#token .chance b").inner_text() == f"{100 * math.exp(scored['logprob']):.2f}%"
        bars = [text.rstrip("%") for text in page.locator("#token .bar .number").all_inner_texts()]
        likeliest = [100 * math.exp(each["logprob"]) for each in scored["top_logprobs"]]
        assert [float(bar) for bar in bars[:5]] == pytest.approx(likeliest, abs=0.051)


def test_a_token_shows_its_experts_and_an_expert_its_tokens(open_page, server):
    page, expected = open_page(), answered(server)
    # The experts that predicted a token are those that read the token before.
    read = [token["experts"] for token in expected["smolseek"]["tokens"]][1:]
    prompt = [token["experts"] for token in expected["smolseek"]["prompt"]]
    assert prompt[-1] == expected["smolseek"]["tokens"][0]["experts"]
    write(page)
    tokens(page).nth(7).click()
    page.click("details.list summary")
    rows = page.locator("details.list tr").all_inner_texts()
    shown = [[int(n) for n in re.findall(r"\d+", row)] for row in rows]
    assert shown == [[layer, *experts] for layer, experts in enumerate(read[7])]
    page.select_option("#scope", "answer")
    layer, expert = 3, read[7][3][0]
    box = page.locator("#map canvas").bounding_box()
    width = (page.locator("#map").bounding_box()["width"] - 31) / EXPERTS
    height = (box["height"] - 18) / LAYERS
    page.mouse.move(box["x"] + 30 + (expert + 0.5) * width, box["y"] + (layer + 0.5) * height)
    page.wait_for_selector(".of-expert")
    marked = page.eval_on_selector_all(".answer > .tokens .t", "nodes => nodes.map(node => node.matches('.of-expert'))")
    assert marked == [expert in experts[layer] for experts in read] + [False]
    uses = sum(marked)
    assert re.match(rf"Layer {layer}, expert {expert}: {uses} tokens? of {len(read)} ", page.inner_text("#expert"))
    page.mouse.move(5, 5)
    page.wait_for_selector(".of-expert", state="detached")


def test_tokens_appear_one_by_one_and_stop_ends_the_answer(open_page, server, monkeypatch):
    scheduler = server.server.worker._scheduler
    step = scheduler.step
    monkeypatch.setattr(scheduler, "step", lambda: (time.sleep(0.02), step())[1])  # as slow as a larger model
    page = open_page()
    page.fill("#max_tokens", "400")
    page.fill("#message", MESSAGE)
    page.click("#send")
    page.wait_for_selector(".answer[aria-busy=true] > .tokens .t")
    early = tokens(page).count()
    wait_until(page, f"document.querySelectorAll('.answer > .tokens .t').length > {early}")
    assert page.inner_text("#send") == "Stop"
    page.click("#send")
    page.wait_for_selector(".answer[aria-busy=false]")
    assert "stopped by you" in page.inner_text(".figures") and page.inner_text("#send") == "Send"
    assert early < tokens(page).count() < 400
    server.until_idle()
    assert server.request("GET", "/health")[0] == 200


def test_another_token_in_place_of_one_begins_a_new_answer(open_page):
    page = open_page()
    write(page, temperature=0)
    texts = tokens(page).all_text_contents()
    number = next(i for i in range(5, TOKENS) if all("\\x" not in text for text in texts[i : i + 1]) and texts[i])
    tokens(page).nth(number).click()
    page.locator("#token button.bar").first.click()
    page.wait_for_selector(".answer[aria-busy=false]")
    assert page.locator(".answer").count() == 1
    again = page.locator(".answer > .tokens").text_content()
    before = "".join(texts[:number])
    assert again.startswith(before) and again != "".join(texts)


def test_a_completion_can_be_continued(open_page, server):
    page = open_page()
    page.check("[value=completion]")
    assert page.locator("#system").is_hidden()
    write(page, "the ", temperature=0, max_tokens=20)
    page.locator(".answer button", has_text="Continue").click()
    wait_until(page, "document.querySelectorAll('.answer > .tokens .t').length === 40")
    page.wait_for_selector(".answer[aria-busy=false]")
    body = {"prompt": "the ", **OPTIONS, "temperature": 0, "max_tokens": 20}
    first = json.loads(server.request("POST", "/v1/completions", body)[2])["choices"][0]["text"]
    assert page.locator(".answer > .tokens").text_content().startswith("the " + first.rstrip("\ufffd"))


def test_the_theme_follows_the_system_and_the_switch(open_page):
    page = open_page(color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    cell = "document.querySelector('canvas').getContext('2d').getImageData(60, 10, 1, 1).data.slice(0, 3).join()"
    dark = page.evaluate(background), page.evaluate(cell)
    assert page.get_attribute("#theme", "aria-pressed") == "true"
    page.click("#theme")
    light = page.evaluate(background)
    assert light != dark[0] and page.get_attribute("#theme", "aria-pressed") == "false"
    wait_until(page, f"{cell} !== '{dark[1]}'")
    page.reload()
    page.wait_for_selector("#welcome li")
    assert page.evaluate(background) == light
    page.click("#theme")
    assert page.evaluate(background) == dark[0] and page.evaluate("localStorage.getItem('smolseek.theme')") is None


def test_nothing_is_wider_than_390_pixels_and_a_tap_opens_the_panel(open_page):
    page = open_page(width=390, height=844, has_touch=True)
    wide = "document.documentElement.scrollWidth > innerWidth || [...document.querySelectorAll('body *')]"
    wide += ".some(node => node.getBoundingClientRect().right > innerWidth + 1 && !node.closest('.unseen'))"
    assert not page.evaluate(wide)
    page.check("#surprise")
    page.click("#show-code")
    assert not page.evaluate(wide)
    page.keyboard.press("Escape")
    write(page)
    assert not page.evaluate(wide) and page.locator("#inspector").is_hidden()
    tokens(page).nth(3).tap()
    page.wait_for_selector("#inspector #token .chance")
    assert not page.evaluate(wide) and page.get_attribute("#open-inspector", "aria-expanded") == "true"
    inspector = page.locator("#inspector").bounding_box()
    assert tokens(page).nth(3).bounding_box()["y"] < inspector["y"]
    page.click("#inspector .close")
    page.click("#open-settings")
    assert page.locator("#temperature").is_visible() and not page.evaluate(wide)


def test_the_keyboard_is_enough(open_page):
    page = open_page()
    focused = "document.activeElement.id || document.activeElement.className"
    assert page.evaluate(focused) == "message"
    page.keyboard.type(MESSAGE)
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer[aria-busy=false]")
    seen = []
    for _ in range(60):
        page.keyboard.press("Shift+Tab")
        seen.append(page.evaluate(focused))
        if seen[-1] == "tokens":
            break
    assert seen[-1] == "tokens", seen
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", None)):
        page.keyboard.press(key)
        total = tokens(page).count()
        assert page.inner_text("#token .head span:last-child").startswith(f"{place or total} of {total}")
        assert re.match(r'Token ".*", .*%\. Others: ', page.text_content("#announcer"), re.DOTALL)
    page.keyboard.press("Escape")
    assert page.locator("#token .chance").count() == 0
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate(focused) == "map":
            break
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    wait_until(page, "document.querySelector('#expert').textContent.startsWith('Layer 1, expert 1: ')")
    assert page.text_content("#announcer").startswith("Layer 1, expert 1: ")
    page.keyboard.press("Escape")
    wait_until(page, "!document.querySelector('#expert').textContent.startsWith('Layer')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everything_has_a_name_and_enough_contrast(scheme, width, open_page):
    page = open_page(color_scheme=scheme, width=width)
    write(page)
    page.check("#surprise")
    tokens(page).nth(3).click()
    if width == 390:
        assert page.locator("#inspector").is_visible()
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    named = [node for node in nodes if not node["ignored"] and node["role"]["value"] in NAMED_ROLES]
    roles = {node["role"]["value"] for node in named}
    assert {"button", "textbox", "checkbox", "radio", "article"} <= roles
    assert [node["role"]["value"] for node in named if not node.get("name", {}).get("value", "").strip()] == []
    assert page.locator("[role=group]:not([aria-label]), [role=application]:not([aria-label])").count() == 0
    headings = [node for node in nodes if not node["ignored"] and node["role"]["value"] == "heading"]
    assert sum(h["properties"][0]["value"]["value"] == 1 for h in headings if h.get("properties")) == 1
    assert (
        page.evaluate("[...document.querySelectorAll('[id]')].map(n => n.id).filter((id, i, a) => a.indexOf(id) < i)")
        == []
    )
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate(CONTRAST) == []


def test_text_is_never_read_as_html(open_page):
    page = open_page()
    evil = "<img src=x onerror=\"document.title='bad'\"><script>document.title='bad'</script>"
    scored = {"token": evil, "bytes": list(evil.encode()), "logprob": -0.1, "top_logprobs": []}
    top = [{**scored, "logprob": -3.0}]
    choice = {"index": 0, "delta": {"content": evil}, "logprobs": {"content": [{**scored, "top_logprobs": top}]}}
    choice["smolseek"] = {"tokens": [{"id": 1, "text": evil, "experts": [[0]] * LAYERS}], "prompt": []}
    stream = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    write(page, evil)
    tokens(page).first.click()
    assert page.locator(".answer > .tokens").text_content() == evil == page.locator(".user .body").text_content()
    assert page.locator("img").count() == 0 and "bad" not in page.title()


def test_the_code_sends_the_same_request(open_page, server):
    page = open_page()
    for name, value in OPTIONS.items():
        page.fill(f"#{name}", str(value))
    page.fill("#system", 'It\'s "short".')
    page.fill("#message", MESSAGE)
    page.click("#show-code")
    shell, code = page.locator("#code pre").all_text_contents()
    words = shlex.split(shell)
    assert words[:2] == ["curl", f"{server.url}/v1/chat/completions"] and words[-2] == "-d"
    status, _, answer = server.request("POST", "/v1/chat/completions", words[-1].encode())
    assert status == 200
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    # The server of this process prints its log there, too.
    assert printed.getvalue().endswith(json.loads(answer)["choices"][0]["message"]["content"] + "\n")


def test_a_key_is_asked_for_and_stays_in_the_tab(open_page):
    with running(small_chat_model(), api_key="secret") as server:
        page = open_page(server.url)
        for key in ("wrong", "secret"):
            page.fill("#key", key)
            page.keyboard.press("Enter")
            if key == "wrong":
                page.wait_for_selector("dialog .wrong:not(:empty)")
        page.wait_for_selector("#welcome li")
        write(page, max_tokens=5)
        assert page.evaluate("JSON.stringify(localStorage)").count("secret") == 0
        assert page.evaluate("sessionStorage.getItem('smolseek.key')") == "secret"
        page.context.close()


def test_without_a_chat_template_chat_is_off_and_says_why(open_page):
    model = small_chat_model(num_hidden_layers=1, first_k_dense_replace=1)
    model.tokenizer.chat_template = None
    with running(model) as server:
        page = open_page(server.url)
        assert page.locator("[value=chat]").is_disabled() and page.locator("#experts").is_hidden()
        assert "no chat template" in page.inner_text("#no-chat")
        write(page, "the ", max_tokens=5)
        assert tokens(page).count() >= 1
        page.context.close()
