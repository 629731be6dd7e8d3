"""Take the pictures of docs/demo.md: start the demo, drive it in the system's Chromium, save what is to be seen.

Needs playwright (pip install -e .[dev]) and Chromium (make browser). The networks are the shipped ones and MODEL...
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from srkd.console import run_command
from srkd.errors import MissingError, SrkdError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "demo"
EXAMPLES = ROOT / "demo" / "examples"
WIDE, NARROW = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
WAIT_MS = 60_000
SETTLED_MS = 600  # by then the pictures are drawn


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="make_screenshots.py",
        description=__doc__,
        epilog="examples:\n  python demo/make_screenshots.py\n"
        "  python demo/make_screenshots.py --model runs/mine --out shots",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", action="append", default=[], metavar="MODEL", help="as of app.py")
    p.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="default: docs/demo")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise MissingError("There is no Chromium here to take pictures with: make browser")
    from playwright.sync_api import sync_playwright

    from srkd.files import make_folder

    make_folder(args.out)
    with serving(args.model) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        desktop(browser, address, args.out)
        telephone(browser, address, args.out)
        browser.close()
    return 0


@contextmanager
def serving(models: list[str]) -> Iterator[str]:
    """The address of a demo that runs meanwhile."""
    command = [sys.executable, str(ROOT / "demo" / "app.py"), "--port", "0"]
    for model in models:
        command += ["--model", model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise SrkdError("The demo did not start; run python demo/app.py to see why.")
        try:
            yield found.group()
        finally:
            process.terminate()


def desktop(browser: Browser, address: str, out: Path) -> None:
    page = opened(browser, address, WIDE)
    example(page, "Text")
    shoot(page, out / "grid.png")
    stage = page.locator(".srkd-stage")
    stage.scroll_into_view_if_needed()
    stage.focus()
    stage.press("s")
    shoot(page, out / "slider.png", "#srkd-viewer")
    page.locator("#srkd-results").scroll_into_view_if_needed()
    shoot(page, out / "table.png", "#srkd-results")
    example(page, "Texture")
    stage.focus()
    stage.press("g")
    stage.press("d")
    shoot(page, out / "difference.png", "#srkd-viewer")
    stage.press("d")
    stage.press("l")
    point_at(page, 0.34, 0.6)  # letters on the badge
    shoot(page, out / "lens.png", "#srkd-viewer")
    page.get_by_role("tab", name="Several files").click()
    batch = [str(EXAMPLES / name) for name in ("text.png", "foliage.png", "jpeg.jpg")]
    page.locator("#srkd-batch-files input[type=file]").set_input_files(batch)
    page.locator("#srkd-batch-go").click()
    page.locator("#srkd-batch-zip a").wait_for()
    shoot(page, out / "batch.png")
    page.context.close()


def telephone(browser: Browser, address: str, out: Path) -> None:
    page = opened(browser, address, NARROW)
    shoot(page, out / "phone_choose.png")
    example(page, "Line art")
    shoot(page, out / "phone_stack.png", "#srkd-viewer")
    page.context.close()


def opened(browser: Browser, address: str, size: dict[str, int]) -> Page:
    context = browser.new_context(
        viewport={"width": size["width"], "height": size["height"]}, reduced_motion="reduce"
    )
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.goto(address)
    page.locator("#srkd-examples button img").first.wait_for()
    return page


def example(page: Page, title: str) -> None:
    """Compare the example of this title and wait for the end."""
    page.locator("#srkd-examples").get_by_role("button", name=title, exact=True).click()
    page.wait_for_function(
        "title => document.querySelector('.srkd-viewer')?.textContent.toLowerCase().includes(title)",
        arg=title.lower().replace(" ", "_") + ".",
    )
    page.wait_for_function(
        "() => document.querySelector('#srkd-status [role=status]')?.textContent === 'Done.'"
    )


def point_at(page: Page, across: float, down: float) -> None:
    """Hold the pointer over this part of the first picture."""
    view = page.locator(".srkd-pane[data-place=seen] .srkd-view").first
    box = view.bounding_box()
    assert box is not None
    view.hover(position={"x": across * box["width"], "y": down * box["height"]})


def shoot(page: Page, file: Path, element: str | None = None) -> None:
    """One element of the page, or the page as far as the viewer and the Compare button reach; in 256 colours, for small files."""
    from PIL import Image

    page.wait_for_timeout(SETTLED_MS)
    if element is not None:
        png = page.locator(element).screenshot()
    elif page.locator(".srkd-stage").is_visible():
        below = page.evaluate(
            "scrollY + 12 + Math.max(...['#srkd-viewer', '#srkd-go'].map("
            "(id) => document.querySelector(id).getBoundingClientRect().bottom))"
        )
        png = page.screenshot(
            full_page=True,
            clip={"x": 0, "y": 0, "width": WIDE["width"], "height": below},
            style="#srkd-results { opacity: 0 }",  # its first line would be cut
        )
    else:
        png = page.screenshot()
    picture = Image.open(BytesIO(png)).convert("RGB")
    picture.quantize(256, kmeans=4, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
