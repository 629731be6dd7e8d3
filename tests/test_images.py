"""Pictures in, pictures out: nothing is changed in silence, nothing bad is decoded."""

from __future__ import annotations

import resource
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile
import torch
from forked import in_child
from PIL import Image, ImageCms

from srkd.errors import SrkdError
from srkd.images import (
    bicubic_rows,
    flatten_on_white,
    from_pil,
    luma,
    picture_size,
    read_picture,
    read_rgb8,
    to_8_bits,
    to_tensor,
    to_uint8,
    to_uint16,
    write_held,
    write_png,
)

if TYPE_CHECKING:
    from pathlib import Path

H, W = 13, 17
LOSSLESS: dict[str, dict] = {".webp": {"lossless": True}}


def noise(channels: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    shape = (H, W, channels) if channels > 1 else (H, W)
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top + 1, shape, dtype=dtype)


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bytes(
    width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b""
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + extra
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def paeth_rows(pixels: np.ndarray) -> bytes:
    """16-bit rows filtered with all five PNG filters in turn, written from the specification."""
    raw = pixels.astype(">u2").view(np.uint8).reshape(len(pixels), -1).astype(int)
    step = 2 * pixels.shape[2]
    out = bytearray()
    for y, row in enumerate(raw):
        above = raw[y - 1] if y else np.zeros_like(row)
        left = np.concatenate([np.zeros(step, int), row[:-step]])
        corner = np.concatenate([np.zeros(step, int), above[:-step]])
        guess = left + above - corner
        far = [abs(guess - left), abs(guess - above), abs(guess - corner)]
        paeth = np.where(
            (far[0] <= far[1]) & (far[0] <= far[2]), left, np.where(far[1] <= far[2], above, corner)
        )
        kind = y % 5
        base = (np.zeros_like(row), left, above, (left + above) // 2, paeth)[kind]
        out += bytes([kind]) + ((row - base) % 256).astype(np.uint8).tobytes()
    return bytes(out)


# --- depth, grey, alpha, palette ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_round_trip_keeps_every_bit(tmp_path: Path, channels: int, dtype: type) -> None:
    pixels = noise(channels, dtype)
    write_png(tmp_path / "x.png", pixels)
    got = read_picture(tmp_path / "x.png")
    assert got.rgb.dtype == dtype
    assert got.grey == (channels < 3)
    assert got.notes == ()
    if channels in (2, 4):
        assert got.alpha is not None
        assert np.array_equal(got.alpha, pixels[..., -1])
    else:
        assert got.alpha is None
    colour = pixels if channels == 1 else pixels[..., : 3 if channels > 2 else 1]
    for i in range(3):
        plane = colour if colour.ndim == 2 else colour[..., min(i, colour.shape[2] - 1)]
        assert np.array_equal(got.rgb[..., i], plane)


@pytest.mark.parametrize(("channels", "colour"), [(2, 4), (3, 2), (4, 6)])
def test_16_bit_colour_png_of_others_with_every_filter(
    tmp_path: Path, channels: int, colour: int
) -> None:
    pixels = noise(channels, np.uint16)
    path = tmp_path / "x.png"
    path.write_bytes(png_bytes(W, H, 16, colour, paeth_rows(pixels)))
    got = read_picture(path)
    want = np.repeat(pixels[..., :1], 3, 2) if channels == 2 else pixels[..., :3]
    assert np.array_equal(got.rgb, want)
    assert got.grey == (channels == 2)
    if channels != 3:
        assert got.alpha is not None
        assert np.array_equal(got.alpha, pixels[..., -1])


def test_16_bit_interlaced_png(tmp_path: Path) -> None:
    """The seven passes of Adam7, written from the specification."""
    pixels = noise(3, np.uint16)
    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    rows = b"".join(
        b"\0" + row.astype(">u2").tobytes()
        for y, x, down, right in passes
        for row in pixels[y::down, x::right]
    )
    content = bytearray(png_bytes(W, H, 16, 2, rows))
    content[28] = 1
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "x.png").write_bytes(content)
    assert np.array_equal(read_picture(tmp_path / "x.png").rgb, pixels)


def test_16_bit_cmyk_is_converted_and_said(tmp_path: Path) -> None:
    inks = np.zeros((6, 6, 4), np.uint16)
    inks[..., 0] = 65535
    tifffile.imwrite(tmp_path / "x.tif", inks, photometric="separated")
    got = read_picture(tmp_path / "x.tif")
    assert got.notes[0] == "16-bit CMYK converted to 8 bits"
    assert got.notes[1].startswith("CMYK converted to RGB")
    assert got.rgb[0, 0].tolist() == [0, 255, 255]


def test_16_bit_transparent_colour_becomes_alpha(tmp_path: Path) -> None:
    pixels = noise(3, np.uint16)
    key = pixels[2, 3]
    # Same high bytes, other low bytes: must stay opaque.
    pixels[5, 5] = key ^ 1
    extra = png_chunk(b"tRNS", key.astype(">u2").tobytes())
    path = tmp_path / "x.png"
    path.write_bytes(png_bytes(W, H, 16, 2, paeth_rows(pixels), extra))
    alpha = read_picture(path).alpha
    assert alpha is not None
    assert alpha[2, 3] == 0
    assert alpha[5, 5] == 65535
    assert int((alpha == 0).sum()) == 1


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_tiff(tmp_path: Path, channels: int, order: str, compression: str | None) -> None:
    pixels = noise(channels, np.uint16)
    path = tmp_path / "x.tif"
    tifffile.imwrite(
        path,
        pixels,
        photometric="rgb" if channels > 1 else "minisblack",
        byteorder=order,  # pyright: ignore[reportArgumentType]
        compression=compression,
        extrasamples=["unassalpha"] if channels == 4 else None,
        rowsperstrip=4,
    )
    got = read_picture(path)
    want = pixels[..., :3] if channels > 1 else np.repeat(pixels[..., None], 3, 2)
    assert np.array_equal(got.rgb, want)
    assert got.bits == 16
    assert (got.alpha is not None) == (channels == 4)


def test_palette_is_converted_and_said(tmp_path: Path) -> None:
    image = Image.fromarray(noise(3)).quantize(16)
    image.save(tmp_path / "x.png")
    got = read_picture(tmp_path / "x.png")
    assert got.notes == ("palette converted to RGB",)
    assert np.array_equal(got.rgb, np.asarray(image.convert("RGB")))
    assert got.alpha is None


def test_palette_with_transparency_keeps_it(tmp_path: Path) -> None:
    image = Image.fromarray(noise(3)).quantize(4)
    image.save(tmp_path / "x.png", transparency=bytes([0, 128, 255, 255]))
    got = read_picture(tmp_path / "x.png")
    index = np.asarray(image)
    assert got.notes == ("palette converted to RGBA",)
    assert got.alpha is not None
    assert np.array_equal(got.alpha, np.array([0, 128, 255, 255], np.uint8)[index])


def test_one_bit_becomes_grey(tmp_path: Path) -> None:
    bits = noise(1) > 127
    Image.fromarray(bits).save(tmp_path / "x.png")
    got = read_picture(tmp_path / "x.png")
    assert got.grey
    assert np.array_equal(got.rgb[..., 0], bits * np.uint8(255))
    assert got.notes == ("1-bit picture converted to 8-bit grey",)


def test_cmyk_jpeg_is_converted_and_said(tmp_path: Path) -> None:
    inks = np.zeros((32, 32, 4), np.uint8)
    inks[..., 1] = inks[..., 2] = 255  # magenta and yellow: red
    Image.fromarray(inks, mode="CMYK").save(tmp_path / "x.jpg", quality=100)
    got = read_picture(tmp_path / "x.jpg")
    assert got.notes == ("CMYK converted to RGB without a colour profile: colours are approximate",)
    red, green, blue = got.rgb[16, 16].tolist()
    assert red > 240
    assert max(green, blue) < 16


def test_cmyk_with_a_damaged_profile_says_so(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    image.save(
        tmp_path / "x.jpg", icc_profile=b"no profile at all, but long enough to be looked at"
    )
    got = read_picture(tmp_path / "x.jpg")
    assert got.notes == ("CMYK converted to RGB without its colour profile, which is damaged",)
    assert got.icc is None


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = noise(3), noise(3, seed=1)
    frames = [Image.fromarray(a) for a in (first, second)]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    got = read_picture(tmp_path / "x.webp")
    assert got.notes == ("2 frames, animated: only the first one is used",)
    assert np.array_equal(got.rgb, first)


def test_the_content_counts_not_the_name(tmp_path: Path) -> None:
    pixels = noise(3)
    Image.fromarray(pixels).save(tmp_path / "x.bmp")
    (tmp_path / "x.bmp").rename(tmp_path / "x.jpg")
    got = read_picture(tmp_path / "x.jpg")
    assert got.format == "bmp"
    assert np.array_equal(got.rgb, pixels)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".bmp", {}),
        (".webp", {"lossless": True}),
        (".tif", {}),
        (".tiff", {"compression": "tiff_lzw"}),
    ],
)
def test_other_lossless_formats(tmp_path: Path, suffix: str, options: dict) -> None:
    path = tmp_path / f"x{suffix}"
    Image.fromarray(noise(3)).save(path, **options)
    assert np.array_equal(read_rgb8(path), noise(3))


def test_one_pixel(tmp_path: Path) -> None:
    write_png(tmp_path / "x.png", np.array([[[1, 2, 3]]], np.uint8))
    assert read_rgb8(tmp_path / "x.png").tolist() == [[[1, 2, 3]]]


# --- orientation and colour profile ---------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    """Against the definition: where row 0 and column 0 of the stored data lie when displayed."""
    stored = noise(3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x{suffix}"
    Image.fromarray(stored).save(path, exif=exif, **LOSSLESS.get(suffix, {}))
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }[orientation]
    got = read_picture(path)
    assert np.array_equal(got.rgb, upright)
    assert got.notes == (() if orientation == 1 else (f"EXIF orientation {orientation} applied",))


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_exif_orientation_of_16_bit_tiff(tmp_path: Path, compression: str | None) -> None:
    pixels, path = noise(3, np.uint16), tmp_path / "x.tif"
    tags = [(0x0112, "H", 1, 6, True)]
    tifffile.imwrite(path, pixels, photometric="rgb", compression=compression, extratags=tags)
    got = read_picture(path)
    assert np.array_equal(got.rgb, np.rot90(pixels, -1))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_icc_profile_is_kept_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    profile, path = srgb_profile(), tmp_path / f"x{suffix}"
    if suffix == ".png":
        write_png(path, noise(3), profile)
    else:
        write_held(path, noise(3), profile)
    with Image.open(path) as image:
        assert image.info["icc_profile"] == profile
    assert read_picture(path).icc == profile


def test_icc_profile_of_other_channels_is_dropped_and_said(tmp_path: Path) -> None:
    Image.fromarray(noise(1)).save(tmp_path / "x.png", icc_profile=srgb_profile())
    got = read_picture(tmp_path / "x.png")
    assert got.icc is None
    assert got.notes == ("colour profile for RGB dropped: the picture is grey",)


# --- what is refused ------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(SrkdError) as caught:
        read_picture(path)
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert path.name in text
    assert "\n" not in text
    return text


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.png")
    assert "directory" in refusal(tmp_path)
    for name, content, said in [
        ("empty.png", b"", "is empty (0 bytes)"),
        ("text.png", b"these are words", "is no picture, but a PNG"),
        ("x.gif", b"GIF89a" + bytes(20), "is a GIF"),
        ("x.svg", b"<svg xmlns='x'/>", "is an SVG drawing"),
        ("x.heic", b"\0\0\0\x18ftypheic" + bytes(20), "HEIC"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert said in refusal(tmp_path / name)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_truncated_files(tmp_path: Path, suffix: str, share: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"x{suffix}"
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: max(20, int(share * len(content)))])
    assert "damaged or cut short" in refusal(path)


def test_corrupt_data(tmp_path: Path) -> None:
    write_png(tmp_path / "x.png", noise(3))
    content = bytearray((tmp_path / "x.png").read_bytes())
    content[60] ^= 0xFF
    (tmp_path / "x.png").write_bytes(content)
    assert "cannot decode" in refusal(tmp_path / "x.png")


def _size_and_memory(path: Path) -> tuple[tuple[int, int], int]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = picture_size(path, 10**9)
    return size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def test_a_huge_header_is_refused_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_bytes(30000, 30000, 8, 2, bytes(1000)))
    text = refusal(path)
    assert "30000x30000 = 900 megapixels" in text
    assert "--max-pixels 900000000" in text
    with pytest.raises(SrkdError, match="900 megapixels"):
        picture_size(path)


def test_the_pixel_limit_can_be_moved(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    write_png(path, noise(3))
    assert read_picture(path, max_pixels=H * W).size == (H, W)
    with pytest.raises(SrkdError, match="megapixels"):
        read_picture(path, max_pixels=H * W - 1)


def _size_and_memory(path: Path) -> tuple[tuple[int, int], int]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = picture_size(path, 10**9)
    return size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def test_a_huge_header_allocates_nothing(tmp_path: Path) -> None:
    """Reading the size of 180 megapixels (beyond Pillow's own limit too) must not need their memory."""
    path = tmp_path / "large.png"
    path.write_bytes(png_bytes(20000, 20000, 8, 2, bytes(1000)))
    size, taken_kib = in_child(_size_and_memory, path)
    assert size == (20000, 20000) and taken_kib < 50_000


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((4, 4), np.float32))
    assert "floating-point pixels" in refusal(tmp_path / "x.tif")


# --- for training ---------------------------------------------------------------------------------


def test_read_rgb8_rounds_16_bits(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32767, 32768, 65406, 65407, 65535]], np.uint16)
    write_png(tmp_path / "x.png", values)
    want = np.floor(values / 257 + 0.5).astype(np.uint8)
    assert want.tolist() == [[0, 0, 1, 1, 127, 128, 254, 255, 255]]
    assert np.array_equal(read_rgb8(tmp_path / "x.png"), np.repeat(want[..., None], 3, 2))


def test_read_rgb8_refuses_transparency_only_where_there_is_some(tmp_path: Path) -> None:
    pixels = noise(4)
    pixels[..., 3] = 255
    write_png(tmp_path / "x.png", pixels)
    assert np.array_equal(read_rgb8(tmp_path / "x.png"), pixels[..., :3])
    pixels[0, 0, 3] = 254
    write_png(tmp_path / "x.png", pixels)
    with pytest.raises(SrkdError, match="transparent pixels"):
        read_rgb8(tmp_path / "x.png")


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "back"), [(np.uint8, to_uint8), (np.uint16, to_uint16)])
def test_tensor_and_back(dtype: type, back: object) -> None:
    pixels = noise(3, dtype)
    tensor = to_tensor(pixels)
    assert tensor.shape == (1, 3, H, W)
    assert tensor.dtype == torch.float32
    assert float(tensor[0, 1, 2, 3]) == pytest.approx(pixels[2, 3, 1] / np.iinfo(dtype).max)
    assert np.array_equal(back(tensor), pixels)  # pyright: ignore[reportCallIssue]


def test_tensor_is_clamped_and_rounded() -> None:
    values = torch.tensor([-0.3, 1.7, 100.4 / 255, 100.6 / 255]).view(1, 1, 2, 2).repeat(1, 3, 1, 1)
    kept = values.clone()
    assert to_uint8(values)[..., 0].tolist() == [[0, 255], [100, 101]]
    assert to_uint16(values)[..., 2].tolist() == [[0, 65535], [25803, 25854]]
    assert torch.equal(values, kept)


def test_luma_of_grey_is_itself() -> None:
    grey = torch.rand(1, 1, 4, 5).repeat(1, 3, 1, 1)
    assert torch.allclose(luma(grey), grey[:, :1], atol=1e-6)
    assert float(luma(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1))) == pytest.approx(0.299)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_equals_pillow_inside(scale: int) -> None:
    """Pillow's BICUBIC is the same kernel (a = -0.5); it treats the border otherwise."""
    plane = np.random.default_rng(0).integers(60, 190, (20, 24), dtype=np.uint8)
    ours = bicubic_rows(plane, 0, 20, scale).astype(int)
    image = Image.fromarray(plane.astype(np.float32))
    theirs = np.asarray(image.resize((24 * scale, 20 * scale), Image.Resampling.BICUBIC))
    inside = slice(2 * scale, -2 * scale)
    assert np.abs(ours - theirs)[inside, inside].max() <= 0.5001


def test_bicubic_rows_do_not_depend_on_the_cut() -> None:
    plane = noise(1, np.uint16)
    whole = bicubic_rows(plane, 0, H, 3)
    parts = [bicubic_rows(plane, a, b, 3) for a, b in ((0, 1), (1, 6), (6, H))]
    assert whole.shape == (3 * H, 3 * W)
    assert np.array_equal(np.concatenate(parts), whole)
    assert (bicubic_rows(np.full((3, 3), 65535, np.uint16), 0, 3, 4) == 65535).all()


def test_flatten_on_white() -> None:
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 51]]], np.uint8)
    want = [[[10, 20, 30], [255, 255, 255], [204, 224, 244]]]
    assert flatten_on_white(pixels).tolist() == want


# --- formats that are held in memory --------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "channels"),
    [(s, c) for s in (".jpg", ".webp", ".bmp", ".tif") for c in (1, 3)]
    + [(s, c) for s in (".webp", ".tif") for c in (2, 4)],
)
def test_held_formats(tmp_path: Path, suffix: str, channels: int) -> None:
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    pixels = np.stack([np.tile(ramp, (32, 1))] * channels, 2)
    path = tmp_path / f"x{suffix}"
    write_held(path, pixels)
    got = read_picture(path)
    loss = 4 if suffix == ".jpg" else 0
    assert np.abs(got.rgb[..., 0].astype(int) - pixels[..., 0]).max() <= loss
    # WebP has colour only, and BMP stores grey as a palette.
    if suffix in (".jpg", ".tif"):
        assert got.grey == (channels < 3)
    if channels in (2, 4):
        assert got.alpha is not None
        assert np.array_equal(got.alpha, pixels[..., -1])


def test_16_bit_tiff_is_written(tmp_path: Path) -> None:
    pixels = noise(4, np.uint16)
    write_held(tmp_path / "x.tif", pixels)
    got = read_picture(tmp_path / "x.tif")
    assert np.array_equal(got.rgb, pixels[..., :3])
    assert got.alpha is not None
    assert np.array_equal(got.alpha, pixels[..., 3])


def test_pillow_images_are_pictures_too() -> None:
    pixels = noise(4)
    got = from_pil(Image.fromarray(pixels))
    assert np.array_equal(got.rgb, pixels[..., :3])
    assert got.alpha is not None
    assert np.array_equal(got.alpha, pixels[..., 3])
    assert to_8_bits(got.rgb) is got.rgb
