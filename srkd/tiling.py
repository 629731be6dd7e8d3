"""Large images in tiles that do not show, with bounded memory.

A tile is cut with a halo as wide as the network's receptive field, and only what the halo protects is kept,
so a network with `Facts.exact_tiling` gives the whole-image result for every tile size. Tiles are
clipped at the real borders, where the network pads as it would for the whole image; nothing artificial is
added. Networks that look at the whole image (channel attention) are never exact in tiles: callers say so.
Their tiles reach over their neighbours above and to the left, and fade in there:

    out = (1 - t) before + t tile,    t rising linearly over the overlap      rows and columns alike

Rows are worked in bands. What the next band fades in over is carried along, a few rows of floats.
"""

from __future__ import annotations

import ctypes
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
from srkd.types import ANY_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from srkd.types import Facts, Limits

    Run = Callable[[Tensor], Tensor]

GLOBAL_HALO_PX = 32  # for networks without a finite receptive field; wide enough to hide padding
# Where tiles are not exact. Joints stand out by 1.7 times their surroundings without an overlap, and not at all from
# 8 px on (docs/tiles.md).
OVERLAP_PX = 8
SMALLEST_TILE_PX = 16
CGROUP = Path("/sys/fs/cgroup")
LARGEST_AUTO_TILE_PX = 1024  # a band of the output is this tall, and is held in memory


@dataclass(frozen=True)
class Tile:
    """One piece of work, all in LR pixels of the whole image, ends exclusive.

    top, bottom, left, right                        what is cut out, halo included
    keep_top, keep_bottom, keep_left, keep_right    the part of it whose output is kept
    fade_rows, fade_columns                         how many of the first kept rows and columns are
                                                    blended with what earlier tiles gave there
    """

    top: int
    bottom: int
    left: int
    right: int
    keep_top: int
    keep_bottom: int
    keep_left: int
    keep_right: int
    fade_rows: int = 0
    fade_columns: int = 0

    def kept(self, scale: int) -> tuple[slice, slice]:
        """Rows and columns of the tile's own output."""
        return (
            slice(scale * (self.keep_top - self.top), scale * (self.keep_bottom - self.top)),
            slice(scale * (self.keep_left - self.left), scale * (self.keep_right - self.left)),
        )

    def columns(self, scale: int) -> slice:
        """Columns of the whole output."""
        return slice(scale * self.keep_left, scale * self.keep_right)


def halo_px(facts: Facts) -> int:
    """Width of the halo: the receptive field, rounded up to the grid that tiles start on."""
    reach = GLOBAL_HALO_PX if facts.receptive_field_px is None else facts.receptive_field_px
    return _round_up(reach, facts.size_multiple)


def overlap_px(facts: Facts) -> int:
    """Width over which a tile fades in over its neighbours; nothing where tiles are exact."""
    return 0 if facts.exact_tiling else OVERLAP_PX


def _margins_px(facts: Facts) -> tuple[int, int]:
    """What is cut out around a tile, above or left of it and below or right of it: halo, and overlap."""
    halo = halo_px(facts)
    return halo + _round_up(overlap_px(facts), facts.size_multiple), halo


def plan_band(
    top: int,
    size: tuple[int, int],
    tile_px: int,
    facts: Facts,
    limits: Limits = ANY_SIZE,
    above_px: int = 0,
) -> list[Tile]:
    """The tiles of the band that starts at row `top` of an image of `size` (h, w), left to right.

    top       on the grid: 0, or where the band above ends
    tile_px   side of a tile, halo and overlap come on top; it is rounded up to the grid
    above_px  height of the band above, over which tiles that are not exact fade in
    """
    if tile_px < 1:
        raise SrkdError(f"a tile of {tile_px} px was asked for; give at least 1, auto or none.")
    h, w = size
    step = _round_up(tile_px, facts.size_multiple)
    overlap = overlap_px(facts)
    rows = _span(top, step, h, facts, limits, axis=0)
    fade_rows = min(overlap, above_px)
    tiles = []
    for start in range(0, w, step):
        columns = _span(start, step, w, facts, limits, axis=1)
        fade_columns = min(overlap, step) if start else 0
        tiles.append(
            Tile(
                *rows[:2],
                *columns[:2],
                keep_top=rows[2] - fade_rows,
                keep_bottom=rows[3],
                keep_left=columns[2] - fade_columns,
                keep_right=columns[3],
                fade_rows=fade_rows,
                fade_columns=fade_columns,
            )
        )
    return tiles


def _span(
    start: int, step: int, size: int, facts: Facts, limits: Limits, axis: int
) -> tuple[int, int, int, int]:
    """(cut start, cut end, kept start, kept end) along one axis; all but the border on the grid."""
    (before, after), grid = _margins_px(facts), facts.size_multiple
    stop = min(start + step, size)
    low, high = max(0, start - before), min(size, _round_up(stop, grid) + after)
    least = _round_up(max(facts.minimum_px, limits.smallest[axis]), grid)
    most = size if limits.largest is None else limits.largest[axis]
    least = min(least, most // grid * grid)
    if high - low < least:
        low = max(0, min(low, high - least) // grid * grid)
        high = min(size, max(high, low + least))
    if high - low > most:
        # It reaches from the grid to a border off the grid: one grid step less, `run_padded` adds the rest.
        low = _round_up(high - most, grid)
    return low, high, start, stop


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def run_padded(run: Run, lr: Tensor, facts: Facts, limits: Limits = ANY_SIZE) -> Tensor:
    """`run`, for images of any size: too small ones are edge-replicated, then cropped."""
    h, w = lr.shape[-2:]
    bottom, right = (
        max(0, max(facts.minimum_px, least) - side)
        for least, side in zip(limits.smallest, (h, w), strict=True)
    )
    if not bottom and not right:
        return run(lr)
    sr = run(F.pad(lr, (0, right, 0, bottom), mode="replicate"))
    return sr[..., : facts.scale * h, : facts.scale * w]


def upscale_tiled(
    run: Run, lr: Tensor, facts: Facts, tile_px: int | None, limits: Limits = ANY_SIZE
) -> Tensor:
    """(N, 3, h, w) -> (N, 3, s*h, s*w), in tiles, or at once when `tile_px` is None."""
    h, w = lr.shape[-2:]
    rows = bands(
        run,
        lambda top, bottom: lr[..., top:bottom, :],
        (h, w),
        facts,
        tile_px,
        lambda sr: sr.detach().permute(2, 3, 0, 1).cpu().numpy(),
        limits=limits,
    )
    whole = torch.from_numpy(np.concatenate(list(rows)))
    return whole.permute(2, 3, 0, 1).contiguous().to(lr.device)


def bands(
    run: Run,
    read: Callable[[int, int], Tensor],
    size: tuple[int, int],
    facts: Facts,
    tile_px: int | None,
    finish: Callable[[Tensor], np.ndarray],
    *,
    limits: Limits = ANY_SIZE,
    on_tile: Callable[[Tile], None] = lambda tile: None,
    on_shrink: Callable[[int], None] = lambda tile_px: None,
) -> Iterator[np.ndarray]:
    """Rows of the output as they are made, top to bottom; only one band is in memory at a time.

    read      (top, bottom) -> (N, 3, bottom - top, w) float32 in [0, 1], where the network runs
    size      (h, w) of the LR image
    tile_px   side of the kept part; None starts with the whole image
    finish    (N, 3, rows, columns) -> (rows, columns, ...) array; runs on every kept piece
    limits    sizes that `run` takes
    on_tile   called after every tile; after a redone band its tiles come again
    on_shrink called when memory ran out, with the smaller tile that the band is redone with

    Yields (n, scale*w, ...) arrays whose rows add up to scale*h; every n is a multiple of scale.
    """
    top, above_px = 0, 0
    carry: Tensor | None = None
    while top < size[0]:
        # The height comes from the tile of this band: memory may force it down on the way.
        here = max(size) if tile_px is None else tile_px
        tiles = plan_band(top, size, here, facts, limits, above_px)
        done = _run_band(run, read, tiles, size, facts, limits, carry, finish, on_tile)
        if done is None:
            tile_px = _smaller(min(here, max(size)), facts)
            on_shrink(tile_px)
            continue
        rows, carry = done
        above_px, top = tiles[0].keep_bottom - top, tiles[0].keep_bottom
        if len(rows):  # all of a band lower than the overlap is carried along
            yield rows


def _run_band(
    run: Run,
    read: Callable[[int, int], Tensor],
    tiles: list[Tile],
    size: tuple[int, int],
    facts: Facts,
    limits: Limits,
    above: Tensor | None,
    finish: Callable[[Tensor], np.ndarray],
    on_tile: Callable[[Tile], None],
) -> tuple[np.ndarray, Tensor | None] | None:
    """The finished rows of one band, and its last ones as floats for the next; None when memory ran out.

    `above` are the last rows of the band before, (N, 3, scale*fade_rows, scale*w).
    """
    first, w, scale = tiles[0], size[1], facts.scale
    # The rows that the next band fades in over are not finished before it has.
    carried = scale * _carried_rows(first, size[0], facts)
    band: np.ndarray | None = None
    below: Tensor | None = None
    beside: Tensor | None = None
    try:
        strip = read(first.top, first.bottom)
        for number, tile in enumerate(tiles):
            kept, columns = tile.kept(scale), tile.columns(scale)
            sr = run_padded(run, strip[..., tile.left : tile.right], facts, limits)
            piece = sr[..., kept[0], kept[1]]
            if beside is not None:
                piece = _fade_in(piece, beside, axis=-1)
            if number + 1 < len(tiles) and tiles[number + 1].fade_columns:
                beside = piece[..., -scale * tiles[number + 1].fade_columns :].clone()
            if above is not None:
                piece = _fade_in(piece, above[..., columns], axis=-2)
            if carried:
                if below is None:
                    below = piece.new_empty((*piece.shape[:2], carried, scale * w))
                below[..., columns] = piece[..., -carried:, :]
                piece = piece[..., :-carried, :]
            finished = finish(piece)
            if band is None:
                band = np.empty((len(finished), scale * w, *finished.shape[2:]), finished.dtype)
            band[:, columns] = finished
            on_tile(tile)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
    assert band is not None
    return band, below


def _carried_rows(tile: Tile, h: int, facts: Facts) -> int:
    """Rows at the end of the tile's band that the next one fades in over; none below the last."""
    if tile.keep_bottom == h:
        return 0
    return min(overlap_px(facts), tile.keep_bottom - tile.keep_top - tile.fade_rows)


def _fade_in(piece: Tensor, before: Tensor, axis: int) -> Tensor:
    """`piece` with its first rows (axis -2) or columns (-1) blended with `before`, which has as many.

    The weights of `piece` are (i + 1/2) / n, so that both ends are treated alike.
    """
    n = before.shape[axis]
    t = (torch.arange(n, dtype=piece.dtype, device=piece.device) + 0.5) / n
    blended = torch.lerp(before, piece.narrow(axis, 0, n), t if axis == -1 else t[:, None])
    return torch.cat([blended, piece.narrow(axis, n, piece.shape[axis] - n)], axis)


# What torch's own allocator says, and oneDNN, when the working memory of a convolution does not fit.
NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "could not create a primitive")


def out_of_memory(error: Exception) -> bool:
    """True for what an allocator raises; every other RuntimeError is a real failure."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in NO_MEMORY)


def _smaller(tile_px: int, facts: Facts) -> int:
    """Half the tile, on the grid, after the allocators gave back what they can."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    # glibc holds on to freed blocks, which then lack where oneDNN maps memory of its own.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
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


def auto_tile(
    h: int, w: int, facts: Facts, channels: int, budget_bytes: int, most_px: int | None = None
) -> int | None:
    """Side of the kept part of a tile whose pass and band fit the budget; None: the whole image fits.

    `most_px` is the largest that the sizes an engine takes allow (`largest_kept`).
    """
    per_pixel = bytes_per_pixel(facts, channels)
    if h * w * per_pixel <= budget_bytes and most_px is None:
        return None
    margins, grid = sum(_margins_px(facts)), math.lcm(SMALLEST_TILE_PX, facts.size_multiple)
    most = LARGEST_AUTO_TILE_PX if most_px is None else min(LARGEST_AUTO_TILE_PX, most_px)

    def needed(side: int) -> int:
        # A strip of the input in float32 and a band of the output in 8 bits are as wide as the image.
        band = w * (12 * (side + margins) + 3 * facts.scale**2 * side)
        return (side + margins) ** 2 * per_pixel + band

    sides = range(most // grid * grid, 0, -grid)
    return next((side for side in sides if needed(side) <= budget_bytes), min(grid, most))


def largest_kept(size: tuple[int, int], facts: Facts, limits: Limits) -> int | None:
    """Side of the largest tile that, with its halo, is within the limits; None: the whole image is."""
    if limits.largest is None:
        return None
    grid = facts.size_multiple
    sides = [most for most, side in zip(limits.largest, size, strict=True) if side > most]
    if not sides:
        return None
    margins = sum(_margins_px(facts))
    largest = min(sides) // grid * grid - margins
    if largest < grid:
        raise SrkdError(
            f"the picture of {size[1]}x{size[0]} px needs tiles, but the engine takes at most "
            f"{limits.largest[1]}x{limits.largest[0]} px, and a tile alone needs {margins} px of halo; export it "
            "for larger sizes (--size)."
        )
    return largest


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
