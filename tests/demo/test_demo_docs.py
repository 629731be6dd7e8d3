"""docs/demo.md against what it describes."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

from demo.batch import MOST_SR_PX
from demo.limits import Limits
from demo.viewer_data import assets

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
TEXT = (DOCS / "demo.md").read_text(encoding="utf-8")
# How the page writes keys that have no character.
WRITTEN = {"Space": "Space", "ArrowLeft": "←", "ArrowRight": "→"}


def test_every_key_of_the_viewer_is_described() -> None:
    keys = {unescape(key) for key in re.findall(r'data-key="([^"]+)"', assets()[0])}
    assert len(keys) > 10
    for key in keys - {f"Shift+Arrow{way}" for way in ("Left", "Right", "Up", "Down")}:
        assert f"`{WRITTEN.get(key, key)}`" in TEXT, key
    assert "`Shift` with an arrow" in TEXT


def test_limits_are_those_of_the_code() -> None:
    limits = Limits()
    assert f"A file may have {limits.max_bytes // 1_000_000} MB" in TEXT
    assert f"an LR picture {limits.max_lr_px // 1_000_000} megapixels" in TEXT
    assert f"its enlargement {limits.max_sr_px // 1_000_000};" in TEXT
    assert f"a comparison {limits.max_choices} networks" in TEXT
    most = f"at most {MOST_SR_PX // 1_000_000} megapixels when enlarged"
    assert f"Up to {limits.max_files} pictures through one network, {most}" in TEXT


def test_pictures_and_pages_that_are_linked_exist_and_are_small() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    for link in links:
        assert (DOCS / link).is_file(), link
    pictures = [DOCS / link for link in links if link.endswith(".png")]
    assert len(pictures) >= 5
    assert all(path.stat().st_size < 400_000 for path in pictures)
