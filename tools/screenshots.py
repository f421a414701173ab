"""Takes the pictures of the playground in docs/: python tools/screenshots.py [URL], while `smolseek serve MODEL` runs.

docs/playground.md names the model. It needs the extra `browser`, and a Chromium on the PATH.
"""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

DOCS = Path(__file__).resolve().parent.parent / "docs"
QUESTION = "Tell me a short story about a lighthouse."
PICTURES = {"playground.png": (1280, 780, "light"), "playground-narrow.png": (390, 844, "dark")}
ENTER = "(node, value) => { node.value = value; node.dispatchEvent(new Event('input', { bubbles: true })); }"
TOKEN = 18
"""Position in the answer of the token that the pictures show."""


def main() -> None:
    """Take all pictures."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("error: there is no Chromium on the PATH: apt-get install chromium")
    with sync_playwright() as play:
        flags = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = play.chromium.launch(executable_path=chromium, args=flags)
        for name, (width, height, scheme) in PICTURES.items():
            take(browser, url, DOCS / name, width, height, scheme)
            print(f"{name}: {(DOCS / name).stat().st_size:,} bytes")


def take(browser: Browser, url: str, file: Path, width: int, height: int, scheme: str) -> None:
    """Ask the question, choose a token and take a picture of the page."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#welcome li")
    for option, value in {"temperature": "0", "max_tokens": "100", "stop": r"\n"}.items():
        page.locator(f"#{option}").evaluate(ENTER, value)
    page.fill("#message", QUESTION)
    page.press("#message", "Enter")
    page.wait_for_selector(".answer[aria-busy=false]", timeout=120_000)
    page.check("#surprise")
    page.locator("#thread").evaluate("node => node.scrollTo(0, 0)")
    page.locator(".answer > .tokens .t").nth(TOKEN).click()
    page.mouse.move(5, 5)
    page.wait_for_timeout(300)
    page.screenshot(path=file)
    context.close()


if __name__ == "__main__":
    main()
