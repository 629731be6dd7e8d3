"""What lies below transparent pixels is replaced by what is visible beside them."""

from __future__ import annotations

import numpy as np
import pytest

from srkd.transparency import fill_hidden


def drawn(*rows: str) -> tuple[np.ndarray, np.ndarray]:
    """rgb and alpha: a letter is a visible colour, "." is hidden magenta."""
    letters = np.array([[ord(c) for c in row] for row in rows], np.uint8)
    hidden = letters == ord(".")
    rgb = np.repeat(letters[..., None], 3, axis=2)
    rgb[hidden] = 255, 0, 255
    return rgb, np.where(hidden, 0, 7).astype(np.uint8)


def text(rgb: np.ndarray) -> list[str]:
    assert (rgb == rgb[..., :1]).all()
    return ["".join(chr(v) for v in row) for row in rgb[..., 0]]


@pytest.mark.parametrize(
    ("given", "filled"),
    [
        (["a...b"], ["aaabb"]),
        (["..a.", "....", "b..."], ["aaaa", "bbaa", "bbbb"]),
        (["...", ".c.", "..."], ["ccc", "ccc", "ccc"]),
        (["ab", "cd"], ["ab", "cd"]),
    ],
)
def test_hidden_pixels_take_the_nearest_of_row_and_column(
    given: list[str], filled: list[str]
) -> None:
    assert text(fill_hidden(*drawn(*given))) == filled
    turned = ["".join(column) for column in zip(*given, strict=True)]
    if given[0] != "..a.":  # ties and corners go by rows
        assert text(fill_hidden(*drawn(*turned)).transpose(1, 0, 2)) == filled


def test_visible_pixels_and_the_given_picture_stay() -> None:
    numbers = np.random.default_rng(0)
    rgb = numbers.integers(0, 65536, (40, 50, 3)).astype(np.uint16)
    alpha = numbers.integers(0, 3, (40, 50)).astype(np.uint16)
    before = rgb.copy()
    filled = fill_hidden(rgb, alpha)
    assert np.array_equal(rgb, before)
    assert np.array_equal(filled[alpha > 0], rgb[alpha > 0])
    seen = {tuple(pixel) for pixel in rgb[alpha > 0]}
    assert {tuple(pixel) for pixel in filled[alpha == 0]} <= seen


def test_bands_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(1)
    rgb = numbers.integers(0, 256, (30, 41, 3)).astype(np.uint8)
    alpha = (numbers.random((30, 41)) > 0.97).astype(np.uint8)
    whole = fill_hidden(rgb, alpha)
    monkeypatch.setattr("srkd.transparency.BAND_PX", 100)
    assert np.array_equal(fill_hidden(rgb, alpha), whole)


def test_where_nothing_or_all_is_hidden_nothing_is_done() -> None:
    rgb = np.zeros((2, 3, 3), np.uint8)
    for alpha in (0, 255):
        assert fill_hidden(rgb, np.full((2, 3), alpha, np.uint8)) is rgb
