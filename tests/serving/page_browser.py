"""The page on `/` in a real browser without a window, against a server that answers from a script: for tests only.

The fixtures are for the modules that name them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from page_server import Reply, Server, serving

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
QUESTION = "ผึ้งผลิตอะไร"
THAI = Reply("ผึ้งทำน้ำผึ้ง", "What do bees make?", "Bees make honey.")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def one_server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def server(one_server: Server) -> Server:
    fresh = Server()
    for name in ("reply", "key", "bodies", "gone", "released"):
        setattr(one_server, name, getattr(fresh, name))
    one_server.models = [
        {"id": "demo", "object": "model", "language": "th"},
        {"id": "demo-original", "object": "model", "language": "th"},
    ]
    return one_server


@pytest.fixture
def opened(browser: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """Opens the page. At the end, no script failed, nothing but what the server refused was complained of, and no
    request left this machine."""
    contexts, wrong = [], []

    def complaint(message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            wrong.append(message.text)

    def sent(request: Any) -> None:
        if not request.url.startswith("data:") and urlsplit(request.url).hostname != "127.0.0.1":
            wrong.append(request.url)

    def open_page(width: int = 1200, height: int = 800, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(30_000)  # on a machine that is busy
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", complaint)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", sent)
        tab.goto(server.url)
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def ask(tab: Any, question: str, *, wait: bool = True) -> Any:
    """Type a question and send it; gives the answers' elements of its turn."""
    turns = tab.locator(".turn").count()
    tab.get_by_label("Your question").fill(question)
    tab.keyboard.press("Enter")
    turn = tab.locator(".turn").nth(turns)
    turn.wait_for()
    if wait:
        tab.locator(".answer[aria-busy=true]").first.wait_for(state="detached")
        tab.get_by_role("button", name="Send").wait_for()
    return turn.locator(".answer")


def eventually(read: Callable[[], object], wanted: object, *, seconds: float = 30) -> None:
    """What is read is as it should be, now or soon."""
    end = time.monotonic() + seconds
    while (found := read()) != wanted and time.monotonic() < end:
        time.sleep(0.02)
    assert found == wanted


def no_overflow(tab: Any) -> bool:
    return bool(tab.evaluate("document.documentElement.scrollWidth <= innerWidth"))
