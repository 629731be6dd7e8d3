"""Image in, image out: pictures of any size and kind through a network, tile by tile.

`upscale` is the Python call, `upscale_file` streams from file to file. Grey stays grey, alpha is enlarged on its own by
bicubic interpolation, beside colours that are visible throughout (`srkd.transparency`), the colour profile is carried over;
what cannot be kept is said in the notes.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import srkd.ranks as ranks
from srkd.devices import pick_device, place
from srkd.errors import CheckFailedError, SrkdError, nearest
from srkd.files import replacing
from srkd.images import (
    MAX_PIXELS,
    SUFFIXES,
    Picture,
    bicubic_rows,
    flatten_on_white,
    from_pil,
    luma,
    read_picture,
    to_8_bits,
    to_tensor,
    to_uint8,
    to_uint16,
    write_held,
)
from srkd.loaded import LoadedModel
from srkd.models import load_model
from srkd.png import PngWriter
from srkd.tiling import Tile, auto_tile, bands, largest_kept, memory_budget, overlap_px
from srkd.transparency import fill_hidden

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from srkd.tiling import Run

TileChoice = int | Literal["auto"] | None

# Output of the formats that no library writes row by row is held in memory up to this size.
MAX_HELD_PIXELS = 200_000_000
MAX_SIDE = {".jpg": 65_535, ".jpeg": 65_535, ".webp": 16_383}
SIXTEEN_BITS = (".png", ".tif", ".tiff")
NO_ALPHA = (".jpg", ".jpeg", ".bmp")


@dataclass(frozen=True)
class UpscaleReport:
    """What was done to one picture. Sizes are (height, width); `tile_px` is None for the whole image."""

    source: str
    target: str
    lr_size: tuple[int, int]
    sr_size: tuple[int, int]
    bits: int
    tiles: int
    tile_px: int | None
    seconds: float
    notes: tuple[str, ...]

    def line(self) -> str:
        (h, w), (height, width) = self.lr_size, self.sr_size
        tiles = "1 tile" if self.tiles == 1 else f"{self.tiles} tiles"
        return f"{self.source} {w}x{h} -> {self.target} {width}x{height}, {tiles}, {self.seconds:.2f} s"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Work:
    """What a running upscale tells: tiles done, the tile in use, notes."""

    tile_px: int | None
    progress: Callable[[int], None] | None = None
    tiles: int = 0
    notes: list[str] = field(default_factory=list)


def upscale(
    image: np.ndarray | Path | str | Image.Image | Tensor,
    model: LoadedModel | str | Path,
    *,
    tile: TileChoice = "auto",
    device: str = "cpu",
) -> np.ndarray:
    """Upscale one picture and return it as an array (height first) of the kind that came in.

    image   a file, a Pillow image, or uint8 / uint16 (h, w), (h, w, 2), (h, w, 3), (h, w, 4): grey, grey +
            alpha, RGB, RGB + alpha; or float in [0, 1], (h, w) or (h, w, 3), as a tensor (3, h, w) or (1, 3, h, w)
    tile    side of a tile in LR pixels, None for the whole image, "auto" by the memory that is free
    Returns (H, W) or (H, W, channels), uint8, uint16 or float32 in [0, 1]. Conversions are warned about.
    """
    loaded = _loaded(model)
    target = pick_device(device)
    if isinstance(image, Tensor) or (isinstance(image, np.ndarray) and image.dtype.kind == "f"):
        return _upscale_float(image, loaded, tile, target)
    if isinstance(image, str | Path):
        picture = read_picture(Path(image))
    elif isinstance(image, Image.Image):
        picture = from_pil(image)
    else:
        picture = _from_array(image)
    work = _Work(_tile_px(tile, picture.size, loaded, target))
    rows = list(_picture_bands(picture, loaded, target, work))
    for note in (*loaded.notes, *picture.notes, *work.notes):
        warnings.warn(note, stacklevel=2)
    pixels = rows[0] if len(rows) == 1 else np.concatenate(rows)
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def upscale_file(
    source: Path,
    target: Path,
    model: LoadedModel | str | Path,
    *,
    tile: TileChoice = "auto",
    device: str = "cpu",
    overwrite: bool = False,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int], None] | None = None,
) -> UpscaleReport:
    """Upscale `source` into `target`, whose suffix names the format; PNG rows stream to the disk.

    progress   called with the number of LR pixels done; after running out of memory it may step back
    Raises `SrkdError` and leaves no file behind when the picture, the target or the disk does not do.
    """
    loaded = _loaded(model)
    run_on = pick_device(device)
    check_target(source, target, overwrite=overwrite)
    start = time.perf_counter()
    picture = read_picture(source, max_pixels)
    h, w = picture.size
    height, width = loaded.scale * h, loaded.scale * w
    suffix = target.suffix.lower()
    check_output_size(target, height, width)
    work = _Work(_tile_px(tile, (h, w), loaded, run_on), progress, notes=list(picture.notes))
    fitted = fit(picture, suffix, work.notes)
    rows = _picture_bands(fitted, loaded, run_on, work)
    with replacing(target) as temporary:
        if suffix == ".png":
            channels = (1 if fitted.grey else 3) + (fitted.alpha is not None)
            with (
                temporary.open("wb") as file,
                PngWriter(file, width, height, channels, fitted.bits, fitted.icc) as writer,
            ):
                for band in rows:
                    writer.write(band)
        else:
            pixels = np.concatenate(list(rows))
            if fitted.alpha is not None and suffix in NO_ALPHA:
                pixels = flatten_on_white(pixels)
            write_held(temporary, pixels, fitted.icc)
    return UpscaleReport(
        source=str(source),
        target=str(target),
        lr_size=(h, w),
        sr_size=(height, width),
        bits=fitted.bits,
        tiles=work.tiles,
        tile_px=work.tile_px,
        seconds=time.perf_counter() - start,
        notes=tuple(work.notes),
    )


def check_target(source: Path, target: Path, *, overwrite: bool) -> None:
    """Refuse a target of unknown format, one that exists, and the source itself."""
    if target.is_dir():
        raise SrkdError(f"{target} is a folder; name a file in it, such as {target / 'out.png'}.")
    blocked = next((p for p in target.parents if p.exists() and not p.is_dir()), None)
    if blocked:
        raise SrkdError(f"cannot write {target}: {blocked} is a file; name another output.")
    if target.suffix.lower() not in SUFFIXES:
        raise SrkdError(
            f"'{target.name}' names no format that can be written; end it in one of "
            f"{nearest(target.suffix.lower(), list(SUFFIXES))}"
        )
    if target.exists() and source.exists() and target.samefile(source):
        raise SrkdError(f"{target} is the input itself; name another output.")
    if target.exists() and not overwrite:
        raise SrkdError(f"{target} exists; add --overwrite or name another output.")


def check_output_size(target: Path, height: int, width: int) -> None:
    """Refuse a picture (in pixels) that the format named by `target` cannot hold, or only in too much memory."""
    suffix = target.suffix.lower()
    longest = MAX_SIDE.get(suffix)
    if longest is not None and max(height, width) > longest:
        raise SrkdError(
            f"{target} would be {width}x{height}, but {suffix[1:]} holds at most {longest} px a side; "
            "choose .png."
        )
    if suffix != ".png" and height * width > MAX_HELD_PIXELS:
        raise SrkdError(
            f"{target} would be {width}x{height}, but only PNG is written row by row; other formats "
            f"end at {MAX_HELD_PIXELS // 10**6} megapixels. Choose .png."
        )


def fit(picture: Picture, suffix: str, notes: list[str]) -> Picture:
    """The picture as the output format (".png" ...) can hold it; every loss is added to `notes`.

    Transparency that the format lacks is noted, but kept: it is flattened where the pixels are written.
    """
    rgb, alpha, icc = picture.rgb, picture.alpha, picture.icc
    if picture.bits == 16 and suffix not in SIXTEEN_BITS:
        notes.append(f"16 bits rounded to 8, {suffix[1:]} holds no more; choose .png to keep them")
        rgb, alpha = to_8_bits(rgb), None if alpha is None else to_8_bits(alpha)
    if alpha is not None and suffix in NO_ALPHA:
        notes.append(f"transparency flattened on white, {suffix[1:]} holds none; choose .png")
    if icc and (suffix == ".bmp" or (suffix == ".webp" and picture.grey)):
        notes.append(f"colour profile dropped, {suffix[1:]} cannot hold it; choose .png")
        icc = None
    return Picture(rgb, alpha, picture.grey, icc, picture.format, picture.notes)


# --- through the network ------------------------------------------------------------------------


def _picture_bands(
    picture: Picture, model: LoadedModel, device: torch.device, work: _Work
) -> Iterator[np.ndarray]:
    """Bands (n, W, channels) of the enlarged picture: grey or RGB, then alpha if there is one."""
    convert = to_uint8 if picture.bits == 8 else to_uint16
    picture = _visible(picture, work)

    def read(top: int, bottom: int) -> Tensor:
        return to_tensor(picture.rgb[top:bottom]).to(device)

    def finish(sr: Tensor) -> np.ndarray:
        return convert(luma(sr) if picture.grey else sr)

    top = 0
    for band in _bands(read, picture.size, model, device, work, finish):
        bottom = top + len(band) // model.scale
        if picture.alpha is None:
            yield band
        else:
            alpha = bicubic_rows(picture.alpha, top, bottom, model.scale)
            yield np.concatenate([band, alpha[..., None]], axis=2)
        top = bottom


def _visible(picture: Picture, work: _Work) -> Picture:
    if picture.alpha is None or (rgb := fill_hidden(picture.rgb, picture.alpha)) is picture.rgb:
        return picture
    work.notes.append("colours below transparent pixels were replaced by the nearest visible ones")
    return replace(picture, rgb=rgb)


def _upscale_float(
    image: np.ndarray | Tensor, model: LoadedModel, tile: TileChoice, device: torch.device
) -> np.ndarray:
    """Float in [0, 1] -> (H, W, 3), or (H, W) from (h, w); float32, clamped to [0, 1]."""
    lr = image if isinstance(image, Tensor) else torch.from_numpy(np.ascontiguousarray(image))
    grey = lr.ndim == 2
    if grey:
        lr = lr.expand(3, *lr.shape)
    elif not isinstance(image, Tensor) and lr.ndim == 3:
        lr = lr.permute(2, 0, 1)
    lr = lr[None] if lr.ndim == 3 else lr
    if lr.ndim != 4 or lr.shape[:2] != (1, 3) or 0 in lr.shape or not lr.is_floating_point():
        raise SrkdError(
            f"got {tuple(image.shape)} {image.dtype}, but one picture is needed: float (h, w), "
            "(h, w, 3) as an array, (3, h, w) or (1, 3, h, w) as a tensor; uint8 and uint16 as arrays."
        )
    if not bool(((lr >= 0) & (lr <= 1)).all()):
        raise SrkdError(
            f"the float picture reaches from {float(lr.min()):.3g} to {float(lr.max()):.3g}, but [0, 1] "
            "is needed; divide by 255, or give uint8."
        )
    strip = lr.to(torch.float32)

    def finish(sr: Tensor) -> np.ndarray:
        kept = (luma(sr) if grey else sr)[0].clamp(0, 1)
        return kept.permute(1, 2, 0).cpu().numpy()

    size = (int(lr.shape[2]), int(lr.shape[3]))
    work = _Work(_tile_px(tile, size, model, device))
    rows = _bands(lambda a, b: strip[:, :, a:b].to(device), size, model, device, work, finish)
    pixels = np.concatenate(list(rows))
    for note in (*model.notes, *work.notes):
        warnings.warn(note, stacklevel=3)
    return pixels[..., 0] if grey else pixels


def _bands(
    read: Callable[[int, int], Tensor],
    size: tuple[int, int],
    model: LoadedModel,
    device: torch.device,
    work: _Work,
    finish: Callable[[Tensor], np.ndarray],
) -> Iterator[np.ndarray]:
    """`srkd.tiling.bands` with the book-keeping of `work`."""
    w = size[1]
    _say_if_inexact(model, size, work)
    _say_if_extended(model, size, work)

    def on_tile(tile: Tile) -> None:
        work.tiles += 1
        if work.progress is not None:
            top = tile.keep_top + tile.fade_rows
            work.progress(top * w + (tile.keep_bottom - top) * tile.keep_right)

    def on_shrink(tile_px: int) -> None:
        work.notes.append(f"out of memory, went on with tiles of {tile_px} px")
        work.tile_px = tile_px
        _say_if_inexact(model, size, work)

    yield from bands(
        runner(model, device),
        read,
        size,
        model.facts,
        work.tile_px,
        finish,
        limits=model.limits,
        on_tile=on_tile,
        on_shrink=on_shrink,
    )


def runner(model: LoadedModel, device: torch.device) -> Run:
    """The network as a function (N, 3, h, w) -> (N, 3, s*h, s*w) on `device`, in full float32.

    TF32 is off, because its rounding would make the picture depend on the tile size. Non-finite output is
    an error, never a black picture.
    """
    network = model.network
    # Convolutions of float32 are faster in this layout on CPUs, and upsampling is (srkd/networks/subpixel.py). An exported
    # file has no parameters here and wants its pictures as they are.
    last = device.type == "cpu" and next(network.parameters(), None) is not None
    place(network, device, channels_last=last)

    def run(lr: Tensor) -> Tensor:
        lr = lr.contiguous(memory_format=torch.channels_last) if last else lr
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False),
        ):
            sr = network(lr)
            if not bool(torch.isfinite(sr).all()):
                raise CheckFailedError(
                    f"{model.name} gave values that are not finite; its weights are damaged or training "
                    "diverged. Try another checkpoint of the run."
                )
        return sr

    return run


def _tile_px(
    tile: TileChoice, size: tuple[int, int], model: LoadedModel, device: torch.device
) -> int | None:
    if tile is not None and tile != "auto" and tile < 1:
        raise SrkdError(f"a tile of {tile} px was asked for; give at least 1, auto or none.")
    most = largest_kept(size, model.facts, model.limits)
    if tile == "auto":
        channels = feature_channels(model.network)
        memory = memory_budget(device) // ranks.sharing(device)
        return auto_tile(*size, model.facts, channels, memory, most)
    if most is not None and (tile is None or tile > most):
        asked = "the whole picture" if tile is None else f"a tile of {tile} px"
        raise SrkdError(
            f"{asked} was asked for, but {model.name} takes tiles of at most {most} px beside their halo; give "
            "a smaller tile or auto, or export it for larger sizes (--size)."
        )
    # A tile that holds the image is the whole image.
    return None if tile is None or tile >= max(size) else tile


def feature_channels(network: nn.Module) -> int:
    """Width of the features: ours say so; of a foreign network the widest convolution, an upper guess."""
    channels = getattr(network, "channels", None)
    if isinstance(channels, int):
        return channels
    widths = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    return max(widths, default=64)


def _say_if_inexact(model: LoadedModel, size: tuple[int, int], work: _Work) -> None:
    if model.facts.exact_tiling or work.tile_px is None or work.tile_px >= max(size):
        return
    work.notes.append(
        f"{model.name} looks at the whole image, so tiles of {work.tile_px} px are not exact; they are "
        f"blended over {overlap_px(model.facts)} px, and --tile none avoids them where memory allows"
    )


def _say_if_extended(model: LoadedModel, size: tuple[int, int], work: _Work) -> None:
    least = model.limits.smallest
    if size[0] < least[0] or size[1] < least[1]:
        work.notes.append(
            f"{model.name} takes {least[1]}x{least[0]} px or more, so the picture was extended by its edge; the "
            "result differs from that of the network near the right and bottom border"
        )


def _loaded(model: LoadedModel | str | Path) -> LoadedModel:
    return model if isinstance(model, LoadedModel) else load_model(model)


def _from_array(image: np.ndarray) -> Picture:
    """uint8 or uint16 (h, w), (h, w, 1..4) as a picture."""
    pixels = image if image.ndim == 3 else image[..., None]
    if image.dtype not in (np.uint8, np.uint16) or pixels.ndim != 3 or 0 in pixels.shape:
        raise SrkdError(
            f"got an array {image.shape} of {image.dtype}, but a picture is uint8, uint16 or float in "
            "[0, 1], (h, w) or (h, w, channels) with at least one pixel."
        )
    channels = pixels.shape[2]
    if channels > 4:
        raise SrkdError(
            f"got an array {image.shape}, but a picture has 1 to 4 channels, last; a (3, h, w) array "
            "needs array.transpose(1, 2, 0)."
        )
    grey = channels < 3
    rgb = np.repeat(pixels[..., :1], 3, axis=2) if grey else pixels[..., :3]
    alpha = pixels[..., -1] if channels in (2, 4) else None
    return Picture(np.ascontiguousarray(rgb), alpha, grey, None, "memory")
