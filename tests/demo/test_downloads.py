"""Downloads: the pane's own bytes, or the format the picture came in, under a name that is safe anywhere."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pytest

from demo.downloads import LONGEST, download_name, safe_stem, save_as
from demo.jobs import Numbers, Pane, Role
from srkd.errors import SrkdError
from srkd.images import read_picture, write_held, write_png

if TYPE_CHECKING:
    from pathlib import Path


def photo(channels: int, dtype: type = np.uint8) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(0, top + 1, (21, 30, channels), dtype=dtype)


def made(folder: Path, pixels: np.ndarray, role: Role = "model", icc: bytes | None = None) -> Pane:
    file = folder / "pane.png"
    write_png(file, pixels, icc)
    numbers = Numbers(engine="ort", precision="fp16") if role == "model" else Numbers()
    key = "rcan_a-distilled" if role == "model" else role
    return Pane(key, "RCAN-A, distilled", role, file, pixels.shape[:2], numbers)


# --- names --------------------------------------------------------------------------------------


def test_name_says_what_made_the_picture(tmp_path: Path) -> None:
    pane = made(tmp_path, photo(3))
    assert download_name("photo.jpg", 4, pane, ".png") == ("photo_x4_rcan_a-distilled_ort-fp16.png")
    twice = replace(pane, key="rcan_a-distilled-ort-fp16")  # beside another engine
    assert download_name("photo.jpg", 4, twice, ".png") == "photo_x4_rcan_a-distilled_ort-fp16.png"
    bicubic = made(tmp_path, photo(3), "bicubic")
    assert download_name("photo.jpg", 2, bicubic, ".tif") == "photo_x2_bicubic.tif"
    truth = made(tmp_path, photo(3), "truth")
    assert download_name("photo.jpg", 2, truth, ".png") == "photo_truth.png"


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("photo.png", "photo"),
        ("holiday.2024.JPG", "holiday.2024"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\été.png", "été"),
        ("写真 1.webp", "写真_1"),
        ("e\u0301te\u0301.png", "été"),  # typed with a combining accent
        ("नमस्ते.png", "नमस्ते"),
        ("", "picture"),
        ("...", "picture"),
        (".png", "png"),
        ("😀.png", "picture"),
        ("-rf.png", "rf"),
        ("a\x00b\nc.png", "a_b_c"),
        ("\u202egnp.exe", "gnp.exe"),  # would be shown from right to left
        ("=1+1.png", "1_1"),
        ("<img src=x onerror=y>.png", "img_src_x_onerror_y"),
        ("NUL.png", "picture_NUL"),
        ("com1.tar.png", "picture_com1.tar"),
        ("com\u00b9", "picture_com\u00b9"),
        ("console.png", "console"),
        ("photo.txt", "photo.txt"),
    ],
)
def test_stem(name: str, stem: str) -> None:
    assert safe_stem(name) == stem


def hostile_names() -> list[str]:
    """200 of them: every bad start with every bad end."""
    starts = [
        "/etc/",
        "..\\..\\",
        "\x00",
        "\u202e",
        "\ud800",
        "COM1",
        "-",
        ".",
        "a" * 300,
        "日" * 90,
    ]
    starts += [
        "=cmd|' /C calc'!A0",
        "%2e%2e%2f",
        "~root",
        "$(id)",
        "`id`",
        "x;rm ",
        '"',
        "*?",
        "\u200b",
        " ",
    ]
    ends = [
        "",
        ".png",
        ".",
        "/",
        "\n.jpg",
        "con",
        ":stream",
        "\u0301" * 80,
        "\U0001f600",
        "x" * 400,
    ]
    return [a + b for a, b in product(starts, ends)]


def test_200_hostile_names_become_harmless() -> None:
    names = hostile_names()
    assert len(names) == 200
    for name in names:
        stem = safe_stem(name)
        assert 0 < len(stem) <= LONGEST, name
        assert len(stem.encode()) <= 120, name
        assert stem[0] not in "-." and stem[-1] not in ". ", name
        assert stem.split(".")[0].casefold() not in ("con", "com1"), name
        assert all(c in "-._" or unicodedata.category(c)[0] in "LMN" for c in stem), name
        assert safe_stem(stem) == stem, name


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_is_the_file_of_the_pane_byte_for_byte(tmp_path: Path, dtype: type) -> None:
    pane = made(tmp_path, photo(4, dtype))
    saved = save_as(pane, "a.webp", 4, "webp", "png", tmp_path / "out")
    assert saved.file.read_bytes() == pane.file.read_bytes()
    assert saved.notes == ()
    again = save_as(pane, "a.png", 4, "png", "original", tmp_path / "again")
    assert again.file.read_bytes() == pane.file.read_bytes()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("original", ["webp", "bmp", "tif"])
def test_other_formats_keep_what_they_can_hold(
    tmp_path: Path, original: str, channels: int
) -> None:
    pixels = photo(channels)
    pane = made(tmp_path, pixels)
    saved = save_as(pane, f"a.{original}", 4, original, "original", tmp_path)
    assert saved.file.suffix == f".{original}"
    back, alpha = read_picture(saved.file), pixels[..., -1] if channels in (2, 4) else None
    if original == "bmp" and alpha is not None:
        assert back.alpha is None
        assert any("transparency flattened on white" in note for note in saved.notes)
        return
    assert saved.notes == ()
    colours = 1 if channels < 3 else 3
    assert np.array_equal(np.broadcast_to(pixels[..., :colours], back.rgb.shape), back.rgb)
    assert alpha is None or np.array_equal(alpha, back.alpha)


def test_alpha_that_is_opaque_everywhere_is_no_loss(tmp_path: Path) -> None:
    pixels = photo(4)
    pixels[..., 3] = 255
    saved = save_as(made(tmp_path, pixels), "a.webp", 4, "webp", "original", tmp_path)
    assert np.array_equal(read_picture(saved.file).rgb, pixels[..., :3])


def test_sixteen_bits_only_where_the_format_has_them(tmp_path: Path) -> None:
    pixels = photo(3, np.uint16)
    pane = made(tmp_path, pixels)
    kept = save_as(pane, "a.tif", 4, "tif", "original", tmp_path)
    assert kept.notes == ()
    assert np.array_equal(read_picture(kept.file).rgb, pixels)
    rounded = save_as(pane, "a.webp", 4, "webp", "original", tmp_path)
    assert read_picture(rounded.file).bits == 8
    assert "16 bits rounded to 8" in rounded.notes[0]


def test_jpeg_says_its_quality_and_the_largest_change(tmp_path: Path) -> None:
    pixels = photo(3)
    saved = save_as(made(tmp_path, pixels), "a.jpg", 4, "jpg", "original", tmp_path)
    back = read_picture(saved.file).rgb
    change = np.abs(back.astype(int) - pixels).max()
    assert change > 0
    assert (
        f"JPEG of quality 95 is lossy: samples differ from the picture shown by up to {change}"
        in (saved.notes[0])
    )


def test_file_that_does_not_keep_its_pixels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pane = made(tmp_path, photo(3))

    def damaging(path: Path, pixels: np.ndarray, icc: bytes | None = None) -> None:
        write_held(path, pixels ^ 1, icc)

    monkeypatch.setattr("demo.downloads.write_held", damaging)
    with pytest.raises(SrkdError, match="did not keep its pixels"):
        save_as(pane, "a.tif", 4, "tif", "original", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["pane.png"]


def test_picture_that_the_format_cannot_hold_is_refused_with_a_way_out(tmp_path: Path) -> None:
    pane = made(tmp_path, np.zeros((1, 16_384, 1), np.uint8))
    with pytest.raises(
        SrkdError, match=r"16384x1, but webp holds at most 16383.*PNG of this"
    ) as told:
        save_as(pane, "a.webp", 4, "webp", "original", tmp_path)
    assert str(tmp_path) not in str(told.value)


def test_bad_requests_are_named(tmp_path: Path) -> None:
    pane = made(tmp_path, photo(3))
    with pytest.raises(SrkdError, match="download as 'zip' was asked for"):
        save_as(pane, "a", 4, "png", "zip", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(SrkdError, match="'gif' is no format that can be written"):
        save_as(pane, "a", 4, "gif", "original", tmp_path)


def test_pane_that_is_gone_is_told_without_its_place(tmp_path: Path) -> None:
    pane = made(tmp_path, photo(3))
    pane.file.unlink()
    for wanted in ("png", "original"):
        with pytest.raises(SrkdError) as told:
            save_as(pane, "a.tif", 4, "tif", wanted, tmp_path)  # type: ignore[arg-type]
        assert str(tmp_path) not in str(told.value)
    assert not list(tmp_path.iterdir())
