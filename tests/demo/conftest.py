"""One browser for all tests of the demo, folders served on this machine only, the viewer on a page of its own."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from viewer_page import data_of, ready, write, write_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]


# Playwright's event loop runs in this thread for as long as it is open, and code that asks whether it was called from one
# (`lane.Lane`, `asyncio.run`) would behave otherwise in every test after it: so a module, not the session.
@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., Browser]]:
    """`launch(*flags)` starts the system's Chromium, headless, with further flags."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install srkd[dev] to test in a browser"
    )
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        pytest.skip(f"no browser: install one of {', '.join(NAMES)} (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        started: list[Browser] = []

        def start(*flags: str) -> Browser:
            started.append(
                playwright.chromium.launch(executable_path=chromium, args=[*FLAGS, *flags])
            )
            return started[-1]

        yield start
        for one in started:
            one.close()


@pytest.fixture(scope="module")
def browser(launch: Callable[..., Browser]) -> Browser:
    """One browser for all tests of a module; each opens contexts of its own and closes them."""
    return launch()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Requests are no news in a test."""


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[[Path], str]]:
    """`serve(folder)` gives the folder's address, ending in "/", on 127.0.0.1."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(folder: Path) -> str:
        handler = functools.partial(Quiet, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The viewer's pictures, one PNG per key."""
    write(tmp_path)
    return tmp_path


@pytest.fixture
def show(
    browser: Browser, serve: Callable[[Path], str], folder: Path
) -> Iterator[Callable[..., Page]]:
    """`show(data, **context)` opens a page with the viewer and waits for its pictures."""
    contexts: list[BrowserContext] = []
    faults: list[str] = []

    def start(data: dict[str, Any] | None = None, **context: Any) -> Page:
        write_page(folder, data or data_of(folder))
        settings = {"viewport": {"width": 1280, "height": 900}, **context}
        contexts.append(settings.pop("browser", browser).new_context(**settings))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(serve(folder))
        ready(page)
        return page

    yield start
    for context in contexts:
        context.close()
    assert faults == []
