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
    OVERLAP_PX,
    Tile,
    auto_tile,
    bands,
    bytes_per_pixel,
    halo_px,
    largest_kept,
    memory_budget,
    out_of_memory,
    overlap_px,
    plan_band,
    run_padded,
    upscale_tiled,
)
from srkd.types import ANY_SIZE, Facts, Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    from srkd.networks.base import Network

CONV = Facts(scale=2, receptive_field_px=3, exact_tiling=True)
GLOBAL = Facts(scale=1, receptive_field_px=None, exact_tiling=False)
# Every family whose tiles are exact, as small as it gets: staged and one-step tails, windows of 8 px.
EXACT = {
    "edsr": {"scale": 3, "channels": 4, "blocks": 2},
    "edsr one step": {"scale": 2, "channels": 4, "blocks": 2, "tail": "one_step"},
    "rdn": {"scale": 4, "channels": 4, "blocks": 2, "layers": 2, "growth": 4},
    "swinir": {"scale": 2, "channels": 6, "depths": (2,), "heads": 1},
    "swinir one step": {"scale": 3, "channels": 6, "depths": (2,), "heads": 1, "tail": "one_step"},
}


def network(name: str, scale: int, dtype: torch.dtype = torch.float64) -> Network:
    torch.manual_seed(0)
    return build(name, scale).eval().to(dtype)


def picture(h: int, w: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(1, 3, h, w, dtype=dtype, generator=torch.Generator().manual_seed(1))


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# --- the plan -------------------------------------------------------------------------------------


def plan(h: int, w: int, tile_px: int, facts: Facts, limits: Limits = ANY_SIZE) -> list[Tile]:
    """The tiles of all bands."""
    tiles: list[Tile] = []
    top = above = 0
    while top < h:
        band = plan_band(top, (h, w), tile_px, facts, limits, above)
        above, top = band[0].keep_bottom - top, band[0].keep_bottom
        tiles += band
    return tiles


def test_plan_by_hand() -> None:
    tiles = plan(10, 8, 5, CONV)
    boxes = [(t.top, t.bottom, t.left, t.right) for t in tiles]
    assert boxes == [(0, 8, 0, 8), (0, 8, 2, 8), (2, 10, 0, 8), (2, 10, 2, 8)]
    assert tiles[-1].kept(2) == (slice(6, 16), slice(6, 12))
    assert tiles[-1].columns(2) == slice(10, 16)


def test_tiles_that_are_not_exact_reach_over_their_neighbours() -> None:
    assert (overlap_px(CONV), overlap_px(GLOBAL), OVERLAP_PX) == (0, 8, 8)
    first, second = plan(120, 50, 100, GLOBAL)
    assert (first.keep_top, first.keep_bottom, first.fade_rows) == (0, 100, 0)
    assert (second.keep_top, second.keep_bottom, second.fade_rows) == (92, 120, 8)
    assert second.top == 60  # the halo in front of the overlap
    sides = [(t.keep_left, t.keep_right, t.fade_columns) for t in plan(5, 11, 4, GLOBAL)[:3]]
    assert sides == [(0, 4, 0), (0, 8, 4), (4, 11, 4)]  # no wider than the neighbour


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
        own_top, own_left = t.keep_top + t.fade_rows, t.keep_left + t.fade_columns
        count[own_top : t.keep_bottom, own_left : t.keep_right] += 1
        for low, high, keep_low, keep_high, size in (
            (t.top, t.bottom, own_top, t.keep_bottom, h),
            (t.left, t.right, own_left, t.keep_right, w),
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
    assert (tile.top, tile.keep_top, tile.fade_rows) == (60, 92, 8)


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


@pytest.mark.parametrize("name", EXACT)
def test_every_exact_family_for_any_picture_and_tile(name: str) -> None:
    torch.manual_seed(0)
    net = build_family(name.split()[0], EXACT[name]).eval().double()
    draw = np.random.default_rng(3)
    for _ in range(3):
        h, w = (int(side) for side in draw.integers(net.facts.minimum_px, 50, 2))
        tile_px = int(draw.integers(3, 30))
        lr = picture(h, w)
        with torch.inference_mode():
            assert gap(upscale_tiled(net, lr, net.facts, tile_px), net(lr)) <= 1e-12, (
                h,
                w,
                tile_px,
            )


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


# --- sizes that an engine takes -------------------------------------------------------------------


def recording(run: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], set[tuple]]:
    """`run`, and the sizes (h, w) that it is given."""
    seen: set[tuple] = set()

    def recorded(lr: Tensor) -> Tensor:
        seen.add(tuple(lr.shape[-2:]))
        return run(lr)

    return recorded, seen


@pytest.mark.parametrize(
    "limits",
    [Limits((30, 20), (34, 42)), Limits((33, 33), (33, 33)), Limits((1, 40), (25, 60))],
)
def test_tiles_stay_within_the_sizes_of_an_engine(limits: Limits) -> None:
    torch.manual_seed(0)
    net, lr = build_family("edsr", EXACT["edsr one step"]).eval().double(), picture(51, 47)
    assert halo_px(net.facts) == 7
    assert limits.largest is not None
    most = largest_kept((51, 47), net.facts, limits)
    assert most == min(limits.largest) - 2 * 7
    for tile_px in (most, 9):
        run, seen = recording(net)
        with torch.inference_mode():
            assert gap(upscale_tiled(run, lr, net.facts, tile_px, limits), net(lr)) <= 1e-12
        for axis in (0, 1):
            assert limits.smallest[axis] <= min(s[axis] for s in seen)
            assert max(s[axis] for s in seen) <= limits.largest[axis]


@pytest.mark.parametrize("side", [48, 53])
def test_windows_in_an_engine_of_one_size(side: int) -> None:
    """Cuts start on the grid of 8; what a picture off the grid lacks at its end is replicated."""
    facts = Facts(scale=1, receptive_field_px=9, exact_tiling=True, size_multiple=8, minimum_px=5)
    limits = Limits((side, side), (side, side))
    assert largest_kept((90, 90), facts, limits) == 16  # 48 less two halos of 16
    for h, w in ((90, 64), (side, 75), (13, 104)):
        run, seen = recording(lambda lr: lr)
        lr = picture(h, w)
        assert torch.equal(upscale_tiled(run, lr, facts, 16, limits), lr)
        assert seen == {(side, side)}
        for tile in plan(h, w, 16, facts, limits):
            assert tile.left % 8 == tile.top % 8 == 0
            assert tile.left <= max(0, tile.keep_left - 16)
            assert tile.right >= min(w, tile.keep_right + 16)


def test_largest_kept_by_hand() -> None:
    facts = Facts(scale=2, receptive_field_px=10, exact_tiling=True)
    limits = Limits((16, 16), (100, 200))
    assert largest_kept((5000, 5000), facts, ANY_SIZE) is None
    assert largest_kept((100, 200), facts, limits) is None
    assert largest_kept((100, 201), facts, limits) == 180
    assert largest_kept((101, 201), facts, limits) == 80
    assert largest_kept((101, 200), replace(facts, size_multiple=8), limits) == 64  # 96 - 2 * 16
    with pytest.raises(SrkdError, match=r"at most 200x20 px, .*needs 20 px of halo.*--size"):
        largest_kept((30, 30), facts, Limits((1, 1), (20, 200)))


# --- tiles that fade in ---------------------------------------------------------------------------


def rising(lr: Tensor) -> Tensor:
    """A network whose every pass is 1 brighter than the one before: the number of the pass."""
    rising.passes += 1
    return torch.full_like(lr, rising.passes)


def fade(axis: int) -> list[float]:
    rising.passes = -1
    size = (1, 50) if axis == 1 else (50, 1)
    sr = upscale_tiled(rising, picture(*size), GLOBAL, 20)
    assert sr.shape[-2:] == size
    return sr[0, 0].flatten().tolist()


@pytest.mark.parametrize("axis", [0, 1])
def test_joints_are_ramps_by_hand(axis: int) -> None:
    ramp = [(2 * i + 1) / 16 for i in range(8)]
    expected = [0.0] * 12 + ramp + [1.0] * 12 + [1 + t for t in ramp] + [2.0] * 10
    assert fade(axis) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tile_px", [1, 3, 8, 13, 100])
def test_fading_keeps_what_tiles_agree_on(tile_px: int) -> None:
    """A network that sees one pixel gives the same in every tile, so the weights must add up to one."""
    facts = replace(GLOBAL, scale=2)
    lr = picture(41, 30)
    sr = upscale_tiled(
        lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3), lr, facts, tile_px
    )
    assert gap(sr, lr.repeat_interleave(2, 2).repeat_interleave(2, 3)) <= 1e-12


def test_fading_goes_on_when_memory_runs_out() -> None:
    lr, shrunk = picture(120, 70), []
    sizes: list[int] = []

    def run(x: Tensor) -> Tensor:
        sizes.append(x.shape[-1] * x.shape[-2])
        if len(sizes) > 2 and sizes[-1] > 96 * 70:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    rows = list(
        bands(
            run,
            lambda a, b: lr[:, :, a:b],
            (120, 70),
            GLOBAL,
            48,
            to_array,
            on_shrink=shrunk.append,
        )
    )
    assert shrunk == [24]
    # 48 rows less the 8 that the next band fades in over, then bands of 24 rows, the last to the end.
    assert [len(band) for band in rows] == [40, 24, 24, 32]
    assert np.abs(np.concatenate(rows) - to_array(lr)).max() <= 1e-12


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
    assert out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN, without memory


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
    # A picture so wide that its strip and band weigh as much as the pass over a tile.
    needed = 84**2 * per_pixel + 10_000 * (12 * 84 + 3 * 16 * 64)
    assert auto_tile(2000, 10_000, facts, 16, needed) == 64
    assert auto_tile(2000, 10_000, facts, 16, needed - 1) == 48
    # An engine that takes less than memory allows.
    assert auto_tile(100, 100, facts, 16, 10**9, most_px=40) == 32
    assert auto_tile(100, 100, facts, 16, 10**9, most_px=9) == 9


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
