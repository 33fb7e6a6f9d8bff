"""The system's Chromium, driven by playwright: a page as a user opens it, from a file."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
expect.set_options(timeout=60_000)
Scheme = Literal["light", "dark"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, started. A test that needs it fails where it is missing."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    assert path is not None, "no Chromium here; on Debian: apt-get install chromium (tools/system_packages.sh does it)"
    with sync_playwright() as playwright:
        # Without a sandbox: tests may run as root, and the file is our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=120_000)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(
    browser: Browser, file: Path, *, width: int = 1280, height: int = 900, scheme: Scheme = "light"
) -> Iterator[Page]:
    """The page of a file. Fails at the end if the page said anything on the console or asked for anything else."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(60_000)  # a wait, not a measurement: the machine may be busy
    try:
        shown = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("request", lambda request: asked.append(request.url))
        shown.goto(file.resolve().as_uri())
        yield shown
        assert said == []
        assert {url for url in asked if not url.startswith("data:")} == {file.resolve().as_uri()}
    finally:
        context.close()
