"""Sizes, crops and patterns that a parity check runs on."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploy.inputs import (
    CHECKED_PX,
    PHOTOGRAPHS,
    build_inputs,
    crop_pair,
    odd_size,
    patterns,
    window,
)
from deploy.photographs import load_photographs
from deploy.sizes import DEFAULT_SIZES, Sizes, check_sizes, parse_sizes
from srkd.errors import SrkdError
from srkd.images import write_png
from srkd.types import Facts

if TYPE_CHECKING:
    from pathlib import Path

    from deploy.inputs import Photo

PLAIN = Facts(scale=2, receptive_field_px=5, exact_tiling=True)
WINDOWED = Facts(scale=2, receptive_field_px=30, exact_tiling=True, size_multiple=8, minimum_px=5)


def test_parse_sizes() -> None:
    assert parse_sizes("16x24:64x80:512x600") == Sizes((16, 24), (64, 80), (512, 600))
    assert parse_sizes("270X480") == Sizes((270, 480), (270, 480), (270, 480))
    assert parse_sizes(str(DEFAULT_SIZES)) == DEFAULT_SIZES


@pytest.mark.parametrize("text", ["", "64", "64x64:32x32", "1x2x3:4x5:6x7", "axb"])
def test_unreadable_sizes_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(SrkdError, match=r"MIN:OPT:MAX.*--size 16x16:64x64:512x512"):
        parse_sizes(text)


@pytest.mark.parametrize("text", ["32x32:16x16:64x64", "16x16:64x64:32x512", "0x8:8x8:8x8"])
def test_sizes_must_grow(text: str) -> None:
    with pytest.raises(SrkdError, match="grow"):
        parse_sizes(text)


def test_sizes_below_the_network_are_refused() -> None:
    with pytest.raises(SrkdError, match=r"4x4 is below what net accepts \(5 px"):
        check_sizes(parse_sizes("4x4:8x8:9x9"), WINDOWED, "net")
    check_sizes(parse_sizes("5x5:8x8:9x9"), WINDOWED, "net")


def test_pictures_that_nothing_can_hold_are_refused() -> None:
    x4 = replace(PLAIN, scale=4)
    assert 3 * 16 * 6688**2 < 2**31 < 3 * 16 * 6689**2
    check_sizes(parse_sizes("8x8:8x8:6688x6688"), x4, "net")
    for large in ("6689x6689", "8x9999999"):
        with pytest.raises(SrkdError, match=rf"size {large} makes .* \(at most 6688x6688\)"):
            check_sizes(parse_sizes(f"8x8:8x8:{large}"), x4, "net")


@pytest.mark.parametrize("facts", [PLAIN, WINDOWED])
def test_odd_size_is_off_every_grid(facts: Facts) -> None:
    h, w = odd_size(DEFAULT_SIZES, facts)
    assert h % 2 and w % 2 and h != w and 16 <= h <= 64 and 16 <= w <= 64
    assert facts.size_multiple == 1 or (h % 8 and w % 8)
    assert odd_size(parse_sizes("64x64"), facts) == (64, 64)  # no other choice is declared


def test_patterns_have_no_symmetry_where_it_matters() -> None:
    made = patterns(31, 31)
    assert all(p.shape == (1, 3, 31, 31) and p.dtype == np.float32 for p in made.values())
    assert all(p.min() >= 0 and p.max() <= 1 for p in made.values())
    picture = made["asymmetric"]
    turned = [np.rot90(m, k, (2, 3)) for k in range(4) for m in (picture, picture[..., ::-1])]
    seen = [t[:, list(order)] for t in turned for order in permutations(range(3))]
    assert sum(np.allclose(picture, other, atol=0.02) for other in seen) == 1
    board = made["checkerboard"]
    assert np.array_equal(board[..., 1:, :], 1 - board[..., :-1, :])
    assert made["impulse"].sum() == 3
    corners = {tuple(made["primaries"][0, :, 0, x]) for x in range(31)}
    assert {(1, 0, 0), (0, 1, 0), (0, 0, 1)} <= corners


def test_window_takes_the_middle_and_mirrors_what_is_missing() -> None:
    image = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4).repeat(3, axis=1)
    assert window(image, 1, 2)[0, 0].tolist() == [[5, 6]]
    assert window(image, 1, 8)[0, 0].tolist() == [[5, 4, 4, 5, 6, 7, 7, 6]]


def test_crop_pair_keeps_lr_and_hr_aligned() -> None:
    from deploy.inputs import Photo

    hr = np.random.default_rng(0).random((1, 3, 20, 30), dtype=np.float32)
    lr = np.ascontiguousarray(hr[..., ::2, ::2])
    pair = crop_pair(Photo("p", lr, hr), 4, 6, scale=2)
    assert pair.hr is not None and pair.hr.shape == (1, 3, 8, 12)
    assert np.array_equal(pair.hr[..., ::2, ::2], pair.lr)
    assert crop_pair(Photo("p", lr, hr), 11, 6, scale=2).hr is None  # mirrored: no original


def test_inputs_cover_what_they_promise(photographs: dict[int, list[Photo]]) -> None:
    sizes = parse_sizes("16x20:64x48:512x512")
    inputs = build_inputs(photographs[2], sizes, PLAIN)
    assert len(photographs[2]) == PHOTOGRAPHS
    shapes = [i.lr.shape for i in inputs]
    assert all(i.lr.dtype == np.float32 and i.lr.flags.c_contiguous for i in inputs)
    assert shapes.count((1, 3, 16, 20)) == shapes.count((1, 3, 64, 48)) == PHOTOGRAPHS
    assert (1, 3, CHECKED_PX, CHECKED_PX) in shapes  # the largest, cut to what is affordable
    assert [s[0] for s in shapes].count(2) == 1
    assert sum(i.hr is not None for i in inputs) == PHOTOGRAPHS
    assert [i.kind for i in inputs if not i.gated] == ["noise"]
    assert len({i.name for i in inputs}) == len(inputs)


def test_builtin_photographs_are_real_ones(photographs: dict[int, list[Photo]]) -> None:
    for scale, photos in photographs.items():
        assert [p.name for p in photos[:4]] == ["astronaut", "chelsea", "coffee", "rocket"]
        for photo in photos:
            assert photo.hr.shape[-2:] == tuple(scale * side for side in photo.lr.shape[-2:])
            assert 0.05 < photo.hr.mean() < 0.95 and photo.hr.std() > 0.02
            # LR is the original made smaller, not another picture
            coarse = photo.hr.reshape(
                1, 3, photo.lr.shape[2], scale, photo.lr.shape[3], scale
            ).mean((3, 5))
            assert np.abs(coarse - photo.lr).mean() < 0.03


def test_a_folder_is_sampled_evenly(tmp_path: Path) -> None:
    for i in range(20):
        write_png(tmp_path / f"{i:02}.png", np.full((8, 8, 3), 10 * i, np.uint8))
    names = [p.name for p in load_photographs(tmp_path, 2)]
    assert names == ["00", "02", "05", "07", "10", "12", "15", "17"]
