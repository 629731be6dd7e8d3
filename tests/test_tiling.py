"""Tiles do not show: any tile size gives the whole image, and memory decides the size."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from srkd.errors import MissingError, SrkdError
from srkd.networks import build, build_family
from srkd.networks.rcan import ChannelAttention
from srkd.tiling import (
    auto_tile,
    bands,
    bytes_per_pixel,
    halo_px,
    memory_budget,
    out_of_memory,
    plan,
    run_padded,
    upscale_tiled,
)
from srkd.types import Facts

if TYPE_CHECKING:
    from srkd.networks.base import Network

CONV = Facts(scale=2, receptive_field_px=3, exact_tiling=True)


def network(name: str, scale: int, dtype: torch.dtype = torch.float64) -> Network:
    torch.manual_seed(0)
    return build(name, scale).eval().to(dtype)


def picture(h: int, w: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(1, 3, h, w, dtype=dtype, generator=torch.Generator().manual_seed(1))


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# --- the plan -------------------------------------------------------------------------------------


def test_plan_by_hand() -> None:
    tiles = plan(10, 8, 5, CONV)
    boxes = [(t.top, t.bottom, t.left, t.right) for t in tiles]
    assert boxes == [(0, 8, 0, 8), (0, 8, 2, 8), (2, 10, 0, 8), (2, 10, 2, 8)]
    last = tiles[-1]
    assert last.kept(2) == (slice(6, 16), slice(6, 12))
    assert last.place(2) == (slice(10, 20), slice(10, 16))
    assert last.cut == (slice(2, 10), slice(2, 8))


@pytest.mark.parametrize("tile_px", [1, 3, 8, 17, 64])
@pytest.mark.parametrize(
    "facts",
    [
        CONV,
        Facts(scale=3, receptive_field_px=23, exact_tiling=True, size_multiple=8, minimum_px=5),
        Facts(scale=2, receptive_field_px=0, exact_tiling=True, minimum_px=7),
        Facts(scale=4, receptive_field_px=None, exact_tiling=False),
    ],
)
def test_every_pixel_is_kept_once_behind_its_halo(facts: Facts, tile_px: int) -> None:
    h, w = 37, 26
    count = np.zeros((h, w), int)
    halo = halo_px(facts)
    assert halo % facts.size_multiple == 0
    for t in plan(h, w, tile_px, facts):
        count[t.keep_top : t.keep_bottom, t.keep_left : t.keep_right] += 1
        for low, high, keep_low, keep_high, size in (
            (t.top, t.bottom, t.keep_top, t.keep_bottom, h),
            (t.left, t.right, t.keep_left, t.keep_right, w),
        ):
            assert low == 0 or keep_low - low >= halo
            assert high == size or high - keep_high >= halo
            assert low % facts.size_multiple == 0
            assert high == size or high % facts.size_multiple == 0
            assert high - low >= min(facts.minimum_px, size)
    assert (count == 1).all()


def test_unknown_reach_gets_32_pixels() -> None:
    facts = Facts(scale=4, receptive_field_px=None, exact_tiling=False)
    assert halo_px(facts) == 32
    tile = plan(200, 200, 100, facts)[-1]
    assert (tile.top, tile.keep_top) == (68, 100)


def test_a_tile_of_nothing_is_refused() -> None:
    with pytest.raises(SrkdError, match="give at least 1, auto or none"):
        plan(10, 10, 0, CONV)


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("tile_px", [5, 16, 33, 100])
def test_any_tile_gives_the_whole_image_in_float64(scale: int, tile_px: int) -> None:
    net, lr = network("edsr_tiny", scale), picture(33, 38)
    with torch.inference_mode():
        assert gap(upscale_tiled(net, lr, net.facts, tile_px), net(lr)) <= 1e-12


@pytest.mark.parametrize("tile_px", [16, 33])
def test_any_tile_gives_the_whole_image_in_float32(tile_px: int) -> None:
    net, lr = network("edsr_tiny", 4, torch.float32), picture(33, 38, torch.float32)
    with torch.inference_mode():
        assert gap(upscale_tiled(net, lr, net.facts, tile_px), net(lr)) <= 1e-6


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("tile_px", [5, 16, 33])
def test_a_halo_one_pixel_short_is_caught(scale: int, tile_px: int) -> None:
    """The receptive field is exact, and the check above is sharp enough to see one pixel of it."""
    net, lr = network("edsr_tiny", scale), picture(33, 38)
    reach = net.facts.receptive_field_px
    assert reach is not None
    short = replace(net.facts, receptive_field_px=reach - 1)
    with torch.inference_mode():
        assert gap(upscale_tiled(net, lr, short, tile_px), net(lr)) > 1e-12


def test_windows_are_exact_on_their_grid_and_wrong_off_it() -> None:
    torch.manual_seed(0)
    sizes = {"scale": 2, "channels": 6, "depths": (2,), "heads": 1, "tail": "one_step"}
    net = build_family("swinir", sizes).eval().double()
    lr = picture(61, 54)
    off = replace(net.facts, size_multiple=1)
    with torch.inference_mode():
        whole = net(lr)
        assert gap(upscale_tiled(net, lr, net.facts, 20), whole) <= 1e-12
        assert gap(upscale_tiled(net, lr, off, 20), whole) > 1e-6


def test_channel_attention_is_declared_not_exact_and_is_not() -> None:
    net, lr = network("rcan_a", 2), picture(80, 76)
    assert not net.facts.exact_tiling
    for module in net.modules():
        if isinstance(module, ChannelAttention):
            # Random weights at range 0..255 leave every gate at exactly 0 or 1, which sees nothing.
            module.squeeze.weight.data.mul_(0.01)
            torch.nn.init.ones_(module.squeeze.get_parameter("bias"))
    with torch.inference_mode():
        assert gap(upscale_tiled(net, lr, net.facts, 40), net(lr)) > 1e-9


def test_no_tile_is_the_network_itself() -> None:
    net, lr = network("edsr_tiny", 2), picture(9, 7)
    with torch.inference_mode():
        assert torch.equal(upscale_tiled(net, lr, net.facts, None), net(lr))


def test_small_images_are_padded_with_their_edge_and_cropped() -> None:
    seen: list[Tensor] = []

    def run(lr: Tensor) -> Tensor:
        seen.append(lr)
        return lr.repeat_interleave(2, 2).repeat_interleave(2, 3)

    facts = Facts(scale=2, receptive_field_px=1, exact_tiling=True, minimum_px=5)
    lr = picture(2, 7)
    sr = run_padded(run, lr, facts)
    assert seen[0].shape == (1, 3, 5, 7)
    assert torch.equal(seen[0][:, :, 4], lr[:, :, 1])
    assert torch.equal(sr, lr.repeat_interleave(2, 2).repeat_interleave(2, 3))
    upscale_tiled(run, picture(1, 1), facts, 4)
    assert seen[-1].shape == (1, 3, 5, 5)


# --- bands ----------------------------------------------------------------------------------------


def to_array(sr: Tensor) -> np.ndarray:
    return sr[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("tile_px", [None, 7, 16])
def test_bands_add_up_to_the_whole(tile_px: int | None) -> None:
    net, lr = network("edsr_tiny", 3), picture(40, 30)
    strips: list[tuple[int, int]] = []

    def read(top: int, bottom: int) -> Tensor:
        strips.append((top, bottom))
        return lr[:, :, top:bottom]

    with torch.inference_mode():
        rows = list(bands(net, read, (40, 30), net.facts, tile_px, to_array))
        whole = to_array(net(lr))
    assert np.abs(np.concatenate(rows) - whole).max() <= 1e-12
    if tile_px == 7:
        assert [len(band) for band in rows] == [21] * 5 + [15]
        # No strip is taller than a tile and its two halos: that is what bounds the memory.
        assert max(b - a for a, b in strips) == 7 + 2 * halo_px(net.facts)


def test_bands_stay_on_the_grid() -> None:
    facts = Facts(scale=1, receptive_field_px=3, exact_tiling=True, size_multiple=8)
    lr, tops = picture(50, 20), []

    def read(top: int, bottom: int) -> Tensor:
        tops.append(top)
        return lr[:, :, top:bottom]

    rows = list(bands(lambda x: x, read, (50, 20), facts, 10, to_array))
    assert [len(band) for band in rows] == [16, 16, 16, 2]
    assert tops == [0, 8, 24, 40]
    assert np.array_equal(np.concatenate(rows), to_array(lr))


class Scarce:
    """A network whose allocator fails above so many pixels."""

    def __init__(self, net: Network, pixels: int, error: Exception | None = None) -> None:
        self.net, self.pixels = net, pixels
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def __call__(self, lr: Tensor) -> Tensor:
        if lr.shape[-1] * lr.shape[-2] > self.pixels:
            raise self.error
        return self.net(lr)


@pytest.mark.parametrize("tile_px", [None, 64])
def test_out_of_memory_halves_the_tile_and_redoes_the_band(tile_px: int | None) -> None:
    net, lr = network("edsr_tiny", 2), picture(70, 90)
    side = 26 + 2 * halo_px(net.facts)
    shrunk: list[int] = []
    tiles: list[object] = []
    with torch.inference_mode():
        rows = list(
            bands(
                Scarce(net, side**2),
                lambda a, b: lr[:, :, a:b],
                (70, 90),
                net.facts,
                tile_px,
                to_array,
                on_tile=tiles.append,
                on_shrink=shrunk.append,
            )
        )
        whole = to_array(net(lr))
    assert shrunk == ([45, 22] if tile_px is None else [32, 16])
    assert np.abs(np.concatenate(rows) - whole).max() <= 1e-12
    # 64 px: three tiles of 32 px, one more before memory ran out again, then three bands of 16 px.
    assert len(tiles) == (4 * 5 if tile_px is None else 3 + 1 + 3 * 6)


def test_a_failure_in_a_late_tile_redoes_the_whole_band_once() -> None:
    net, lr = network("edsr_tiny", 2), picture(40, 70)
    calls = 0

    def run(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return net(x)

    with torch.inference_mode():
        rows = list(bands(run, lambda a, b: lr[:, :, a:b], (40, 70), net.facts, 32, to_array))
        whole = to_array(net(lr))
    assert [len(band) for band in rows] == [32, 32, 16]
    assert np.abs(np.concatenate(rows) - whole).max() <= 1e-12


def test_no_memory_at_all_is_one_sentence() -> None:
    net = network("edsr_tiny", 2)
    run = Scarce(net, 1)
    with pytest.raises(MissingError, match="out of memory even with tiles of 16 px"):
        list(bands(run, lambda a, b: picture(b - a, 50), (50, 50), net.facts, None, to_array))


def test_other_failures_are_not_taken_for_memory() -> None:
    net = network("edsr_tiny", 2)
    run = Scarce(net, 1, RuntimeError("size mismatch"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        list(bands(run, lambda a, b: picture(b - a, 50), (50, 50), net.facts, None, to_array))
    assert not out_of_memory(RuntimeError("CUDA error: misaligned address"))


# --- how large a tile may be ----------------------------------------------------------------------


def test_auto_tile_by_hand() -> None:
    facts = Facts(scale=4, receptive_field_px=10, exact_tiling=True)
    assert bytes_per_pixel(facts, 16) == 4 * 16 * 96
    per_pixel = 4 * 16 * 96
    assert auto_tile(100, 100, facts, 16, 10_000 * per_pixel) is None
    # 9999 pixels: a side of 99, less two halos of 10, down to a multiple of 16.
    assert auto_tile(100, 100, facts, 16, 10_000 * per_pixel - 1) == 64
    assert auto_tile(1000, 1000, facts, 16, 0) == 16
    assert auto_tile(10**5, 10**5, facts, 16, 10**12) == 1024
    windows = replace(facts, size_multiple=24)
    assert auto_tile(1000, 1000, windows, 16, 10_000 * per_pixel) == 48


def test_the_estimate_covers_what_a_pass_takes() -> None:
    """Feature maps alive at the peak of the upsampler, counted by hooks, stay below the estimate."""
    net = network("edsr_tiny", 4, torch.float32)
    alive: list[int] = []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.PixelShuffle):
            module.register_forward_hook(
                lambda _m, inputs, out: alive.append(
                    4 * (inputs[0].numel() + (out.numel() if isinstance(out, Tensor) else 0))
                )
            )
    with torch.inference_mode():
        net(picture(32, 32, torch.float32))
    # Input and output of one layer, in bytes per LR pixel: the least that any pass needs.
    needed = max(alive) / 32**2
    assert needed == 4 * (16 * 16 + 16 * 16)
    assert needed <= bytes_per_pixel(net.facts, 16) <= 4 * needed


def test_memory_budget_is_part_of_this_machine() -> None:
    budget = memory_budget(torch.device("cpu"))
    assert 2**20 < budget < 2**45
