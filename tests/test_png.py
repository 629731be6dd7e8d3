"""The PNG that is written row by row, read back by others and by us."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from srkd.images import read_rgb8, write_png
from srkd.png import PngWriter

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_our_8_bit_png_is_read_by_pillow(tmp_path: Path, channels: int, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (13, 17, channels), dtype=np.uint8).squeeze()
    write_png(tmp_path / "x.png", pixels)
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == mode
        assert np.array_equal(np.asarray(image), pixels)


def test_our_16_bit_grey_png_is_read_by_pillow(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (13, 17), dtype=np.uint16)
    write_png(tmp_path / "x.png", pixels)
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(np.asarray(image), pixels)


def test_png_in_bands_equals_png_at_once() -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (50, 40, 4), dtype=np.uint16)
    files = []
    for steps in ([50], [1, 30, 0, 19]):
        file, at = io.BytesIO(), 0
        with PngWriter(file, 40, 50, 4, 16) as writer:
            for n in steps:
                writer.write(pixels[at : at + n])
                at += n
        files.append(file.getvalue())
    assert files[0] == files[1]


def test_png_of_several_chunks_is_read_back(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 900, 3), dtype=np.uint8)
    write_png(tmp_path / "x.png", pixels)
    assert (tmp_path / "x.png").read_bytes().count(b"IDAT") > 2
    assert np.array_equal(read_rgb8(tmp_path / "x.png"), pixels)


def test_png_with_missing_rows_is_our_bug() -> None:
    with (
        pytest.raises(AssertionError, match="3 rows are missing"),
        PngWriter(io.BytesIO(), 4, 5, 1) as writer,
    ):
        writer.write(np.zeros((2, 4), np.uint8))
