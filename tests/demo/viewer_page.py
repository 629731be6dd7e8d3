"""A page with nothing but the viewer, and small pictures whose every pixel is known."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from demo.jobs import Numbers, Pane, Result, Role
from demo.viewer_data import assets, viewer_data

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from playwright.sync_api import Locator, Page

SCALE, LR = 4, (48, 64)
H, W = SCALE * LR[0], SCALE * LR[1]
# A block of this colour, which no picture has elsewhere, at these rows and columns of every picture.
MARK, MARK_AT = (255, 0, 255), (slice(100, 108), slice(150, 158))
ROLES: dict[str, Role] = {"truth": "truth", "nearest": "nearest", "bicubic": "bicubic"}
KEYS = ("truth", "nearest", "bicubic", "teacher", "student")
GREY = 128  # of the stage


def picture(seed: int, shape: tuple[int, int] = (H, W)) -> NDArray[np.uint8]:
    """Noise of [0, 200] around a colour of its own: (H, W, 3), with the marker."""
    rng = np.random.default_rng(seed)
    pixels = (rng.integers(0, 160, 3) + rng.integers(0, 41, (*shape, 3))).astype(np.uint8)
    pixels[MARK_AT] = MARK
    return pixels


def write(folder: Path, keys: tuple[str, ...] = KEYS) -> dict[str, NDArray[np.uint8]]:
    """One PNG per key."""
    pictures = {key: picture(seed) for seed, key in enumerate(keys)}
    for key, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{key}.png")
    return pictures


def data_of(folder: Path, keys: tuple[str, ...] = KEYS, **labels: str) -> dict[str, Any]:
    panes = [
        Pane(
            key=key,
            label=labels.get(key, key.title()),
            role=ROLES.get(key, "model"),
            file=folder / f"{key}.png",
            size=(H, W),
            numbers=Numbers(psnr_y=30.0 + len(key), ssim_y=0.9) if key != "truth" else Numbers(),
        )
        for key in keys
    ]
    result = Result(tuple(panes), "photo.png", SCALE, LR, "PSNR-Y, border 4 px")
    return viewer_data(result, lambda path: path.name)


def write_page(folder: Path, data: dict[str, Any]) -> None:
    """`index.html`: room to scroll and something to type in above the viewer, more room below."""
    html, css, js = assets()
    (folder / "index.html").write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width"><title>viewer</title>'
        f"<style>body{{margin:12px}}{css}</style>"
        f'<input aria-label="elsewhere"><div class="place">{html}</div><div style="height:1500px"></div>'
        f"<script>{js}</script><script>const data={json.dumps(data)};"
        'const template=document.querySelector(".place").innerHTML;'
        'const viewer=SrkdViewer.mount(document.querySelector(".place"),data)</script></html>',
        encoding="utf-8",
    )


def ready(page: Page) -> None:
    """All pictures decoded and drawn."""
    page.wait_for_function("viewer.state().ready")
    page.evaluate("new Promise((done) => setTimeout(() => requestAnimationFrame(done), 30))")


def state(page: Page) -> dict[str, Any]:
    return page.evaluate("viewer.state()")


def press(page: Page, *keys: str) -> None:
    """Keys, with the focus on the pictures, and the frame after them."""
    page.locator(".srkd-stage").focus()
    for key in keys:
        page.keyboard.press(key)
    ready(page)


def view(page: Page, key: str) -> Locator:
    return page.locator(f'.srkd-view[data-image="{key}"]')


def pixels_of(place: Locator) -> NDArray[np.uint8]:
    """What is on the screen there, in device pixels: (h, w, 3)."""
    place.scroll_into_view_if_needed()
    box = place.evaluate(
        """(element) => {
            const { left, top, width, height } = element.getBoundingClientRect();
            return [left, top, width, height].map((length) => Math.round(length * devicePixelRatio));
        }"""
    )
    shot = Image.open(io.BytesIO(place.page.screenshot(scale="device"))).convert("RGB")
    left, top, width, height = box
    return np.asarray(shot.crop((left, top, left + width, top + height)))


def marker(pixels: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the marker in a pane."""
    rows, columns = np.nonzero((pixels == MARK).all(axis=2))
    assert rows.size, "no marker in the pane"
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
