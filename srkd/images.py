"""Pictures in files, and where they become tensors: bit depth, grey, palette, alpha, EXIF, ICC live here.

Between loader and writer an image is a float32 RGB tensor (N, 3, H, W) in [0, 1]. What cannot be kept
is converted and said so in `Picture.notes`; nothing is changed in silence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np
import tifffile
import torch
from PIL import Image, ImageCms
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from srkd.errors import SrkdError
from srkd.files import replacing
from srkd.png import PngWriter

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.ImageFile import ImageFile
    from torch import Tensor

MAX_PIXELS = 100_000_000  # of one input; a larger header is refused before anything is decoded
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# The reader classes are called by hand, not through Image.open, whose own size limit is a global.
_READERS: dict[str, type[ImageFile]] = {
    "png": PngImageFile,
    "jpg": JpegImageFile,
    "webp": WebPImageFile,
    "bmp": BmpImageFile,
    "tif": TiffImageFile,
}
# What people hand over instead, to name it in the refusal.
_FOREIGN = {
    b"GIF8": "a GIF",
    b"<svg": "an SVG drawing",
    b"<?xm": "an XML file",
    b"%PDF": "a PDF",
    b"8BPS": "a Photoshop file",
    b"\x00\x00\x01\x00": "an icon",
}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Picture:
    """A decoded picture, upright (EXIF orientation applied).

    rgb     (h, w, 3) uint8 or uint16; a grey picture has three equal channels
    alpha   (h, w) of the same type, straight (not premultiplied), None when opaque by format
    grey    the file holds one colour channel, so the output should too
    icc     colour profile that fits these channels, untouched
    format  png, jpg, webp, bmp, tif, or memory
    notes   what was converted on the way in, one sentence each
    """

    rgb: np.ndarray
    alpha: np.ndarray | None
    grey: bool
    icc: bytes | None
    format: str
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(h, w)."""
        return self.rgb.shape[0], self.rgb.shape[1]

    @property
    def bits(self) -> int:
        return 8 * self.rgb.dtype.itemsize


def read_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode a PNG, JPEG, WebP, BMP or TIFF file, whatever its name says; 8 and 16 bits are kept.

    Raises `SrkdError` for a missing, empty, damaged, foreign or too large file.
    """
    kind = picture_format(path)
    try:
        with path.open("rb") as file:
            image = _open(kind, file)
            _check_size(image, path, max_pixels)
            return _decode(image, kind, path)
    except SrkdError as error:
        # Raised about the pixels, where the name is not known.
        raise error if str(path) in str(error) else SrkdError(f"{path}: {error}") from error
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        _refuse(path, error)


def picture_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(h, w) as the header says, before any rotation. Decodes nothing; errors as `read_picture`."""
    kind = picture_format(path)
    try:
        with path.open("rb") as file:
            image = _open(kind, file)
            _check_size(image, path, max_pixels)
            return image.height, image.width
    except SrkdError:
        raise
    except Exception as error:
        _refuse(path, error)


def from_pil(image: Image.Image) -> Picture:
    """A picture that Pillow holds already. Pillow has no 16-bit colour, so only grey can be 16 bits."""
    return _upright(_convert(image), image)


def read_rgb8(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 for training and evaluation: grey is repeated, 16 bits are rounded to 8.

    Transparent pixels are refused: what lies beneath them is not part of the picture.
    """
    picture = read_picture(path)
    full = np.iinfo(picture.rgb.dtype).max
    if picture.alpha is not None and bool((picture.alpha < full).any()):
        raise SrkdError(
            f"{path} has transparent pixels, but training and evaluation need opaque pictures; "
            "flatten it onto a background first or leave it out."
        )
    return to_8_bits(picture.rgb)


def to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """uint16 -> uint8, rounded to nearest (65535 = 255 * 257, so there are no ties); uint8 as it is."""
    if pixels.dtype == np.uint8:
        return pixels
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


# --- tensors ------------------------------------------------------------------------------------


def to_tensor(rgb: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 or uint16 -> (1, 3, H, W) float32 in [0, 1] on the CPU."""
    full = np.iinfo(rgb.dtype).max
    plain = torch.from_numpy(rgb.astype(np.int32) if rgb.dtype == np.uint16 else rgb.copy())
    return plain.permute(2, 0, 1).unsqueeze(0).to(torch.float32).div_(full)


def to_uint8(sr: Tensor) -> np.ndarray:
    """(1, 3, H, W) or (3, H, W) in about [0, 1] -> (H, W, 3) uint8: clamped and rounded where it lies."""
    return _on_device(sr, 255).to(torch.uint8).cpu().numpy()


def to_uint16(sr: Tensor) -> np.ndarray:
    """As `to_uint8`, to 0..65535."""
    # int32 on the way, because few devices know uint16.
    return _on_device(sr, 65535).to(torch.int32).cpu().numpy().astype(np.uint16)


def _on_device(sr: Tensor, full: int) -> Tensor:
    image = sr[0] if sr.ndim == 4 else sr
    return image.clamp(0, 1).mul_(full).round_().permute(1, 2, 0).contiguous()


def luma(sr: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W), BT.601: the one channel of a grey picture after enlarging."""
    weights = sr.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (sr * weights).sum(1, keepdim=True)


def bicubic_rows(plane: np.ndarray, top: int, bottom: int, scale: int) -> np.ndarray:
    """Rows [scale*top, scale*bottom) of `plane` (h, w) enlarged by bicubic interpolation.

    Keys' kernel, a = -0.5, edge pixels repeated outside. The rows do not depend on how a picture is cut.
    """
    h, w = plane.shape
    rows = plane[np.clip(np.arange(top - 2, bottom + 2), 0, h - 1)]
    rows = rows[:, np.clip(np.arange(-2, w + 2), 0, w - 1)].astype(np.float32)
    full = np.iinfo(plane.dtype).max
    enlarged = _enlarge(_enlarge(rows, scale).T, scale).T
    return np.rint(enlarged.clip(0, full)).astype(plane.dtype)


def _enlarge(x: np.ndarray, scale: int) -> np.ndarray:
    """(n + 4, ...) with two spare rows at each end -> (scale * n, ...), along the first axis."""
    n = len(x) - 4
    out = np.empty((scale * n, *x.shape[1:]), np.float32)
    for phase in range(scale):
        position = (phase + 0.5) / scale - 0.5
        base = int(np.floor(position))
        taps = (
            _keys(position - base - k) * x[2 + base + k : 2 + base + k + n] for k in (-1, 0, 1, 2)
        )
        out[phase::scale] = sum(taps)
    return out


def _keys(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


# --- writing ------------------------------------------------------------------------------------


def write_png(path: Path, array: np.ndarray, icc: bytes | None = None) -> None:
    """Save (H, W), (H, W, 1..4) uint8 or uint16 without loss; the file is complete or absent."""
    pixels = array if array.ndim == 3 else array[..., None]
    height, width, channels = pixels.shape
    with replacing(path) as temporary, temporary.open("wb") as file:
        bits = 8 * pixels.dtype.itemsize
        with PngWriter(file, width, height, channels, bits, icc) as writer:
            writer.write(pixels)


def flatten_on_white(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 2) or (H, W, 4) uint8 -> (H, W, 1) or (H, W, 3) as seen on white."""
    alpha = pixels[..., -1:].astype(np.uint32)
    blended = pixels[..., :-1] * alpha + 255 * (255 - alpha)
    return ((blended + 127) // 255).astype(np.uint8)


def write_held(path: Path, pixels: np.ndarray, icc: bytes | None = None) -> None:
    """Save (H, W, 1..4) in the format that the suffix of `path` names; not PNG, which is streamed.

    JPEG quality 95 without colour subsampling, WebP lossless, TIFF deflated. JPEG and BMP take no
    alpha; all but TIFF take uint8 alone.
    """
    suffix = path.suffix.lower()
    if suffix in (".tif", ".tiff"):
        extra = {2: ["unassalpha"], 4: ["unassalpha"]}.get(pixels.shape[2])
        tifffile.imwrite(
            path,
            pixels[..., 0] if pixels.shape[2] == 1 else pixels,
            photometric="rgb" if pixels.shape[2] >= 3 else "minisblack",
            planarconfig="contig" if pixels.shape[2] > 1 else None,
            extrasamples=extra,
            compression="zlib",
            iccprofile=icc,
            metadata=None,
        )
        return
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    options: dict[str, Any] = {
        ".jpg": {"quality": 95, "subsampling": 0},
        ".jpeg": {"quality": 95, "subsampling": 0},
        ".webp": {"lossless": True, "exact": True},
        ".bmp": {},
    }[suffix]
    if icc and suffix != ".bmp":
        options["icc_profile"] = icc
    image.save(path, **options)


# --- reading, in steps --------------------------------------------------------------------------


def picture_format(path: Path) -> str:
    """The format by content, whatever the name says: png, jpg, webp, bmp or tif. Errors as `read_picture`."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise SrkdError(
            f"cannot read {path}: {error.strerror or error}. Check the name and the permissions."
        ) from error
    if not head:
        raise SrkdError(f"{path} is empty (0 bytes); copy or download it again.")
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "tif"
    if head.startswith(b"BM"):
        return "bmp"
    what = next((name for magic, name in _FOREIGN.items() if head.startswith(magic)), "no picture")
    if head[4:8] == b"ftyp":
        what = "a HEIC, AVIF or video file"
    raise SrkdError(
        f"{path} is {what}, but a PNG, JPEG, WebP, BMP or TIFF picture is needed; convert it to PNG first."
    )


def _open(kind: str, file: BinaryIO) -> ImageFile:
    # No file name is passed: Pillow would map the file, and turn a mapped TIFF upright wrongly (12.3).
    image = _READERS[kind](file)
    if image.width < 1 or image.height < 1:
        raise SyntaxError("the header gives no size")
    return image


def _check_size(image: ImageFile, path: Path, max_pixels: int) -> None:
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise SrkdError(
            f"{path} is {image.width}x{image.height} = {pixels / 1e6:.0f} megapixels, but at most "
            f"{max_pixels / 1e6:.0f} are accepted; if you trust the file, raise the limit (--max-pixels {pixels} of "
            "scripts/upscale.py), else leave it out."
        )


def _refuse(path: Path, error: Exception) -> NoReturn:
    if isinstance(error, MemoryError):
        raise SrkdError(f"{path} does not fit into memory; use a smaller picture.") from error
    reason = str(error).split("\n")[0] or type(error).__name__
    raise SrkdError(
        f"cannot decode {path}: {reason}. It is damaged or cut short; copy or download it again."
    ) from error


def _decode(image: ImageFile, kind: str, path: Path) -> Picture:
    """Pixels of the first frame, upright."""
    notes: list[str] = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        what = "pages" if kind == "tif" else "frames, animated"
        notes.append(f"{frames} {what}: only the first one is used")
    # Pillow turns a TIFF upright by itself while loading, so its tag must be read before.
    turned = image.tag_v2.get(_ORIENTATION, 1) if isinstance(image, TiffImageFile) else 1
    if turned != 1:
        notes.append(f"EXIF orientation {turned} applied")
    raw = _raw_mode(image)
    if raw[-4:-1] != ";16" or image.mode.startswith("I;16"):
        picture = _convert(image)
    elif low_mode := _LOW_BYTES.get(raw):
        with path.open("rb") as file:
            picture = _colour_16(image, _READERS[kind](file), low_mode)
    else:
        notes.append(f"16-bit {image.mode} converted to 8 bits")
        picture = _convert(image)
    upright = _upright(picture, image)
    return replace(upright, format=kind, notes=(*notes, *upright.notes))


# Pillow decodes 16-bit colour to the high bytes. Read as the other byte order, the same data give the
# low bytes, so two passes of its decoder give all 16 bits. "LA;16B" needs one pass as four bytes.
_LOW_BYTES = {
    **{f"{m};16{end}": f"{m};16{other}" for m in ("RGB", "RGBA") for end, other in ("BL", "LB")},
    **{f"{m};16N": f"{m};16{'B' if np.little_endian else 'L'}" for m in ("RGB", "RGBA")},
    "LA;16B": "RGBA",
}


def _raw_mode(image: ImageFile) -> str:
    """How Pillow unpacks the pixels, e.g. RGB or RGB;16B; empty when its decoder does not say."""
    raw = image.tile[0][3] if image.tile else None
    raw = raw[0] if isinstance(raw, tuple) and raw else raw
    return raw if isinstance(raw, str) else ""


def _colour_16(image: ImageFile, again: ImageFile, low_mode: str) -> Picture:
    """16-bit RGB, RGB + alpha or grey + alpha; `again` is a second reader of the same file."""
    again.tile = [
        t._replace(args=low_mode if isinstance(t.args, str) else (low_mode, *(t.args or ())[1:]))
        for t in again.tile
    ]
    low = np.asarray(again)
    if low_mode == "RGBA":
        # A grey and an alpha sample of two bytes each, high byte first.
        image.load()
        pair = low.astype(np.uint16)
        grey, alpha = pair[..., 0] << 8 | pair[..., 1], pair[..., 2] << 8 | pair[..., 3]
        return Picture(_repeat(grey), alpha, True, _icc(image), "memory")
    pixels = np.asarray(image).astype(np.uint16) << 8 | low
    rgb = np.ascontiguousarray(pixels[..., :3])
    alpha = np.ascontiguousarray(pixels[..., 3]) if pixels.shape[2] == 4 else None
    key = image.info.get("transparency")
    if alpha is None and isinstance(key, tuple):
        alpha = np.where((rgb == np.array(key)).all(2), 0, 65535).astype(np.uint16)
    return Picture(rgb, alpha, False, _icc(image), "memory")


def _convert(image: Image.Image) -> Picture:
    """Pixels of a loaded or lazy Pillow image as it lies; what is converted becomes a note."""
    image.load()
    mode, notes, icc = image.mode, [], _icc(image)
    if mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint16)
        key = image.info.get("transparency")
        alpha = np.where(grey == key, 0, 65535).astype(np.uint16) if key is not None else None
        return Picture(_repeat(grey), alpha, True, icc, "memory")
    if mode == "1":
        notes.append("1-bit picture converted to 8-bit grey")
        image = image.convert("LA" if image.has_transparency_data else "L")
    elif mode in ("P", "PA"):
        target = "RGBA" if image.has_transparency_data else "RGB"
        notes.append(f"palette converted to {target}")
        image = image.convert(target)
    elif mode == "CMYK":
        image, how = _from_cmyk(image, icc)
        icc = None  # it described the inks
        notes.append(f"CMYK converted to RGB {how}")
    elif mode in ("L", "LA", "La"):
        image = image.convert("LA" if image.has_transparency_data else "L")
    elif mode in ("RGB", "RGBA", "RGBa", "RGBX", "YCbCr"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    else:
        kinds = {"F": "floating-point", "I": "32-bit integer", "LAB": "CIE L*a*b*"}
        raise SrkdError(
            f"the picture has {kinds.get(mode, mode)} pixels, but 8 or 16 bits of grey or RGB are "
            "needed; convert it to a 16-bit PNG first."
        )
    pixels = np.asarray(image)
    if image.mode in ("L", "LA"):
        grey = pixels if pixels.ndim == 2 else pixels[..., 0]
        alpha = pixels[..., 1].copy() if pixels.ndim == 3 else None
        return Picture(_repeat(grey), alpha, True, icc, "memory", tuple(notes))
    alpha = pixels[..., 3].copy() if pixels.shape[2] == 4 else None
    rgb = np.ascontiguousarray(pixels[..., :3])
    return Picture(rgb, alpha, False, icc, "memory", tuple(notes))


def _from_cmyk(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, str]:
    if icc:
        try:
            inks, screen = ImageCms.ImageCmsProfile(BytesIO(icc)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, inks, screen, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            converted = None
        if converted is not None:
            return converted, "(sRGB) through its colour profile"
        return image.convert("RGB"), "without its colour profile, which is damaged"
    return image.convert("RGB"), "without a colour profile: colours are approximate"


def _repeat(grey: np.ndarray) -> np.ndarray:
    """(h, w) -> (h, w, 3)."""
    return np.repeat(grey[..., None], 3, axis=2)


def _icc(image: Image.Image) -> bytes | None:
    profile = image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) and profile else None


def _upright(picture: Picture, image: Image.Image) -> Picture:
    """Apply the EXIF orientation, and drop a colour profile that does not fit the channels."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF must not cost the picture
        orientation = 1
    notes = list(picture.notes)
    rgb, alpha, icc = picture.rgb, picture.alpha, picture.icc
    if orientation in range(2, 9):
        notes.append(f"EXIF orientation {orientation} applied")
        rgb = np.ascontiguousarray(_orient(rgb, orientation))
        alpha = None if alpha is None else np.ascontiguousarray(_orient(alpha, orientation))
    space = icc[16:20] if icc else b""
    if icc and space != (b"GRAY" if picture.grey else b"RGB "):
        notes.append(
            f"colour profile for {space.decode('latin-1').strip() or 'nothing'} dropped: "
            f"the picture is {'grey' if picture.grey else 'RGB'}"
        )
        icc = None
    return replace(picture, rgb=rgb, alpha=alpha, icc=icc, notes=tuple(notes))


def _orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (2..8), as TIFF 6.0 and EXIF 2.3 define it."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
