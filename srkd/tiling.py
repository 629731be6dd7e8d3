"""Large images in tiles that do not show, with bounded memory.

A tile is cut with a halo as wide as the network's receptive field, and only what the halo protects is kept,
so a network with `Facts.exact_tiling` gives the whole-image result for every tile size. Tiles are
clipped at the real borders, where the network pads as it would for the whole image; nothing artificial is
added. Networks that look at the whole image (channel attention) are never exact in tiles: callers say so.
"""

from __future__ import annotations

import math
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from srkd.errors import MissingError, SrkdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from srkd.types import Facts

    Run = Callable[[Tensor], Tensor]

GLOBAL_HALO_PX = 32  # for networks without a finite receptive field; wide enough to hide padding
SMALLEST_TILE_PX = 16
CGROUP = Path("/sys/fs/cgroup")
LARGEST_AUTO_TILE_PX = 1024  # a band of the output is this tall, and is held in memory


@dataclass(frozen=True)
class Tile:
    """One piece of work, all in LR pixels of the whole image, ends exclusive.

    top, bottom, left, right                        what is cut out, halo included
    keep_top, keep_bottom, keep_left, keep_right    the part of it whose output is kept
    """

    top: int
    bottom: int
    left: int
    right: int
    keep_top: int
    keep_bottom: int
    keep_left: int
    keep_right: int

    @property
    def cut(self) -> tuple[slice, slice]:
        """Rows and columns of the LR image."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def kept(self, scale: int) -> tuple[slice, slice]:
        """Rows and columns of the tile's own output."""
        return (
            slice(scale * (self.keep_top - self.top), scale * (self.keep_bottom - self.top)),
            slice(scale * (self.keep_left - self.left), scale * (self.keep_right - self.left)),
        )

    def place(self, scale: int) -> tuple[slice, slice]:
        """Rows and columns of the whole output."""
        return (
            slice(scale * self.keep_top, scale * self.keep_bottom),
            slice(scale * self.keep_left, scale * self.keep_right),
        )


def halo_px(facts: Facts) -> int:
    """Width of the halo: the receptive field, rounded up to the grid that tiles start on."""
    reach = GLOBAL_HALO_PX if facts.receptive_field_px is None else facts.receptive_field_px
    return _round_up(reach, facts.size_multiple)


def plan(h: int, w: int, tile_px: int, facts: Facts) -> list[Tile]:
    """Tiles that keep every pixel of an (h, w) image once, row-major, in bands of equal rows.

    `tile_px` is the side of the kept part; the halo comes on top. It is rounded up to the grid.
    """
    if tile_px < 1:
        raise SrkdError(f"a tile of {tile_px} px was asked for; give at least 1, auto or none.")
    step = _round_up(tile_px, facts.size_multiple)
    columns = [_span(left, step, w, facts) for left in range(0, w, step)]
    return [
        Tile(top, bottom, left, right, keep_top, keep_bottom, keep_left, keep_right)
        for top, bottom, keep_top, keep_bottom in (
            _span(start, step, h, facts) for start in range(0, h, step)
        )
        for left, right, keep_left, keep_right in columns
    ]


def _span(start: int, step: int, size: int, facts: Facts) -> tuple[int, int, int, int]:
    """(cut start, cut end, kept start, kept end) along one axis; all but the border on the grid."""
    halo, grid = halo_px(facts), facts.size_multiple
    stop = min(start + step, size)
    low, high = max(0, start - halo), min(size, _round_up(stop, grid) + halo)
    if high - low < facts.minimum_px:
        low = max(0, min(low, high - facts.minimum_px) // grid * grid)
        high = min(size, max(high, _round_up(low + facts.minimum_px, grid)))
    return low, high, start, stop


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def run_padded(run: Run, lr: Tensor, facts: Facts) -> Tensor:
    """`run`, for images of any size: smaller ones than `minimum_px` are edge-replicated, then cropped."""
    h, w = lr.shape[-2:]
    bottom, right = max(0, facts.minimum_px - h), max(0, facts.minimum_px - w)
    if not bottom and not right:
        return run(lr)
    sr = run(F.pad(lr, (0, right, 0, bottom), mode="replicate"))
    return sr[..., : facts.scale * h, : facts.scale * w]


def upscale_tiled(run: Run, lr: Tensor, facts: Facts, tile_px: int | None) -> Tensor:
    """(N, 3, h, w) -> (N, 3, s*h, s*w), in tiles, or at once when `tile_px` is None."""
    if tile_px is None:
        return run_padded(run, lr, facts)
    h, w = lr.shape[-2:]
    whole: Tensor | None = None
    for tile in plan(h, w, tile_px, facts):
        rows, columns = tile.cut
        sr = run_padded(run, lr[..., rows, columns], facts)
        if whole is None:
            whole = sr.new_empty((*sr.shape[:2], facts.scale * h, facts.scale * w))
        rows, columns = tile.place(facts.scale)
        kept = tile.kept(facts.scale)
        whole[..., rows, columns] = sr[..., kept[0], kept[1]]
    assert whole is not None
    return whole


def bands(
    run: Run,
    read: Callable[[int, int], Tensor],
    size: tuple[int, int],
    facts: Facts,
    tile_px: int | None,
    finish: Callable[[Tensor], np.ndarray],
    *,
    on_tile: Callable[[Tile], None] = lambda tile: None,
    on_shrink: Callable[[int], None] = lambda tile_px: None,
) -> Iterator[np.ndarray]:
    """Rows of the output as they are made, top to bottom; only one band is in memory at a time.

    read      (top, bottom) -> (1, 3, bottom - top, w) float32 in [0, 1], where the network runs
    size      (h, w) of the LR image
    tile_px   side of the kept part; None starts with the whole image
    finish    (1, 3, rows, columns) -> (rows, columns, channels) array; runs on every kept piece
    on_tile   called after every tile; after a redone band its tiles come again
    on_shrink called when memory ran out, with the smaller tile that the band is redone with

    Yields (n, scale*w, channels) arrays whose rows add up to scale*h.
    """
    h, w = size
    top = 0
    while top < h:
        # The height comes from the tile of this band: memory may force it down on the way.
        here = max(h, w) if tile_px is None else tile_px
        tiles = _band(top, h, w, here, facts)
        band = _run_band(run, read, tiles, w, facts, finish, on_tile)
        if band is None:
            tile_px = _smaller(min(here, max(h, w)), facts)
            on_shrink(tile_px)
            continue
        top = tiles[0].keep_bottom
        yield band


def _band(top: int, h: int, w: int, tile_px: int, facts: Facts) -> list[Tile]:
    """The tiles of the band that starts at `top`, which is on the grid."""
    step = _round_up(tile_px, facts.size_multiple)
    rows = _span(top, step, h, facts)
    columns = [_span(left, step, w, facts) for left in range(0, w, step)]
    return [Tile(rows[0], rows[1], c[0], c[1], rows[2], rows[3], c[2], c[3]) for c in columns]


def _run_band(
    run: Run,
    read: Callable[[int, int], Tensor],
    tiles: list[Tile],
    w: int,
    facts: Facts,
    finish: Callable[[Tensor], np.ndarray],
    on_tile: Callable[[Tile], None],
) -> np.ndarray | None:
    """The output of one band; None when memory ran out."""
    first, scale = tiles[0], facts.scale
    band: np.ndarray | None = None
    try:
        strip = read(first.top, first.bottom)
        for tile in tiles:
            rows, columns = tile.kept(scale)
            sr = run_padded(run, strip[..., tile.left : tile.right], facts)
            piece = finish(sr[..., rows, columns])
            if band is None:
                band = np.empty((piece.shape[0], scale * w, *piece.shape[2:]), piece.dtype)
            band[:, tile.place(scale)[1]] = piece
            on_tile(tile)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        band = None
    return band


def out_of_memory(error: Exception) -> bool:
    """True for what an allocator raises; every other RuntimeError is a real failure."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "DefaultCPUAllocator: can't allocate memory" in str(error)


def _smaller(tile_px: int, facts: Facts) -> int:
    """Half the tile, on the grid, after the allocator gave back what it can."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    smallest = _round_up(SMALLEST_TILE_PX, facts.size_multiple)
    if tile_px <= smallest:
        raise MissingError(
            f"out of memory even with tiles of {tile_px} px (halo {halo_px(facts)} px): close other "
            "programs, use a smaller model, or --device cpu."
        )
    return max(smallest, _round_up(tile_px // 2, facts.size_multiple))


# --- how large a tile may be ----------------------------------------------------------------------


def bytes_per_pixel(facts: Facts, channels: int) -> int:
    """Peak working memory of a float32 forward pass, per LR pixel: 4 * C * (3 s^2 + 48), an upper estimate.

    3 s^2 is the upsampler (a feature at full resolution, before and after the shuffle, and its
    copy); 48 stands for the body, which in attention and dense networks holds tens of features.
    Measured on a CPU per channel, in floats: EDSR x4 40 to 54, x3 33, x2 14; RCAN x4 45;
    SwinIR-S x4 46; the estimate is 96, 75, 60.
    """
    return 4 * channels * (3 * facts.scale**2 + 48)


def auto_tile(h: int, w: int, facts: Facts, channels: int, budget_bytes: int) -> int | None:
    """Side of the kept part of a tile whose pass fits the budget; None: the whole image fits."""
    pixels = budget_bytes // bytes_per_pixel(facts, channels)
    if h * w <= pixels:
        return None
    side = min(math.isqrt(pixels) - 2 * halo_px(facts), LARGEST_AUTO_TILE_PX)
    grid = math.lcm(SMALLEST_TILE_PX, facts.size_multiple)
    return max(side // grid * grid, grid)


def memory_budget(device: torch.device) -> int:
    """Half of the memory that is free now, in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + reserved) // 2
    return _free_memory() // 2


def _free_memory() -> int:
    """Bytes that this process may still take: the least of the machine, the container and the limit."""
    limits = [
        _field(Path("/proc/meminfo"), "MemAvailable:", 1024),
        _container(
            CGROUP / "memory.max",
            CGROUP / "memory.current",
            CGROUP / "memory.stat",
            "inactive_file ",
        ),
        _container(
            CGROUP / "memory/memory.limit_in_bytes",
            CGROUP / "memory/memory.usage_in_bytes",
            CGROUP / "memory/memory.stat",
            "total_inactive_file ",
        ),
        _address_space(),
    ]
    known = [limit for limit in limits if limit is not None]
    if limits[0] is None:
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return max(0, min(known))


def _field(path: Path, name: str, unit: int) -> int | None:
    """A number of a /proc file, None where there is no such file or line."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * unit for line in lines if line.startswith(name)), None)


def _container(limit: Path, used: Path, stat: Path, cache: str) -> int | None:
    """What a control group (version 2 or 1) still allows; its file cache can be given back at any time."""
    try:
        allowed = limit.read_text().strip()
        if allowed == "max":
            return None
        return int(allowed) - int(used.read_text()) + (_field(stat, cache, 1) or 0)
    except (OSError, ValueError):
        return None


def _address_space() -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _field(Path("/proc/self/status"), "VmSize:", 1024)
    return None if limit == resource.RLIM_INFINITY or used is None else limit - used
