"""Pictures of every kind through a comparison, ground truths by the rules, and what is refused by its header."""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from tiny_service import CHOICES, last, picture, pixels, request, write_runs

from demo.jobs import Choice, CompareRequest
from demo.limits import Limits
from demo.pictures import channels
from demo.service import Service
from demo.workspace import Workspace
from srkd.data.degradation import downscale_uint8, upscale_uint8
from srkd.errors import SrkdError
from srkd.images import read_picture, read_rgb8, write_png
from srkd.infer import upscale
from srkd.metrics import RGB, psnr, ssim

LIMITS = Limits(max_bytes=100_000, max_lr_px=10_000, max_sr_px=60_000)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    runs = write_runs(tmp_path_factory.mktemp("runs"))
    made = Service(runs, LIMITS, Workspace(tmp_path_factory.mktemp("work")))
    yield made
    made.close()


# --- kinds of pictures --------------------------------------------------------------------------


def wide(h, w, channels):
    return pixels(h, w, channels=channels).astype(np.uint16) * 257 + 3


def palette(path):
    Image.fromarray(pixels(9, 14)).quantize(16).save(path, format="PNG")


def clear_palette(path):
    image = Image.fromarray(pixels(9, 14)).quantize(16)
    image.save(path, format="PNG", transparency=3)


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(9, 14)).save(path, format="JPEG", exif=exif)


def profiled(path):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write_png(path, pixels(9, 14), icc)


KINDS = {
    "rgb": lambda path: write_png(path, pixels(17, 31)),
    "grey": lambda path: write_png(path, pixels(17, 31, channels=1)),
    "grey and alpha": lambda path: write_png(path, pixels(9, 14, channels=2)),
    "rgb and alpha": lambda path: write_png(path, pixels(9, 14, channels=4)),
    "16 bits": lambda path: write_png(path, wide(9, 14, 3)),
    "16-bit grey": lambda path: write_png(path, wide(9, 14, 1)),
    "16 bits and alpha": lambda path: write_png(path, wide(9, 14, 4)),
    "palette": palette,
    "palette with a clear colour": clear_palette,
    "EXIF orientation 6": turned,
    "colour profile": profiled,
    "1x1": lambda path: write_png(path, pixels(1, 1)),
    "1x40": lambda path: write_png(path, pixels(1, 40)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_stays_what_it_is(service, tmp_path, kind):
    path = tmp_path / "upload"
    KINDS[kind](path)
    lr = read_picture(path)
    result = last(service.compare(request(path, CHOICES[0])))
    made = {pane.key: read_picture(pane.file) for pane in result.panes}
    for sr in made.values():
        assert sr.size == (2 * lr.size[0], 2 * lr.size[1])
        assert (sr.bits, sr.grey, sr.icc) == (lr.bits, lr.grey, lr.icc)
        assert (sr.alpha is None) == (lr.alpha is None)
    for dy, dx in np.ndindex(2, 2):
        assert np.array_equal(channels(made["nearest"])[dy::2, dx::2], channels(lr))
    with warnings.catch_warnings(action="ignore"):  # what was converted
        expected = upscale(path, service.shelf.sources["tiny_scratch"])
    assert np.array_equal(channels(made["tiny_scratch"]), expected.reshape(*expected.shape[:2], -1))
    if lr.alpha is not None:
        assert np.array_equal(made["bicubic"].alpha, made["tiny_scratch"].alpha)
    assert result.notes[: len(lr.notes)] == lr.notes
    model = result.panes[-1]
    assert not set(model.notes) & set(lr.notes), "said once, of the whole comparison"


def test_bicubic_is_that_of_the_protocol(service, tmp_path):
    path = picture(tmp_path / "a.png", 17, 31)
    result = last(service.compare(request(path, CHOICES[0])))
    assert np.array_equal(read_rgb8(result.panes[1].file), upscale_uint8(read_rgb8(path), 2))


def test_bicubic_of_16_bits_is_that_of_8_to_within_a_step_inside(service, tmp_path):
    write_png(tmp_path / "a.png", pixels(20, 20).astype(np.uint16) * 257)
    result = last(service.compare(request(tmp_path / "a.png", CHOICES[0])))
    bicubic = result.panes[1]
    fine = read_picture(bicubic.file).rgb[8:-8, 8:-8] / 257
    coarse = upscale_uint8(pixels(20, 20), 2)[8:-8, 8:-8]
    # The 8-bit one is rounded, and cut to its range, between the passes.
    assert np.abs(fine - coarse).mean() < 1
    assert "16 bits" in bicubic.notes[0]


# --- ground truths ------------------------------------------------------------------------------


def hr_and_lr(tmp_path, more=(0, 0)):
    hr = pixels(48 + more[0], 64 + more[1], seed=5)
    write_png(tmp_path / "hr.png", hr)
    write_png(tmp_path / "lr.png", downscale_uint8(hr[:48, :64], 2))
    return tmp_path / "hr.png", tmp_path / "lr.png", hr[:48, :64]


def planes(rgb):
    return torch.tensor(rgb).permute(2, 0, 1)[None]


def test_scores_against_a_truth_are_those_of_the_papers(service, tmp_path):
    hr, lr, pixels_hr = hr_and_lr(tmp_path)
    result = last(service.compare(request(lr, truth=hr)))
    assert [pane.key for pane in result.panes][:3] == ["truth", "nearest", "bicubic"]
    assert result.reference is None
    assert np.array_equal(read_rgb8(result.panes[0].file), pixels_hr)
    assert result.panes[0].numbers.psnr_y is None
    for pane in result.panes[1:]:
        sr = planes(read_rgb8(pane.file)), planes(pixels_hr)
        n = pane.numbers
        assert n.psnr_y == pytest.approx(float(psnr(*sr, 2)))
        assert n.ssim_y == pytest.approx(float(ssim(*sr, 2)))
        assert n.psnr_rgb == pytest.approx(float(psnr(*sr, 2, RGB)))
        assert n.agreement_db is n.consistency_db is None
    assert "border 2 px" in result.protocol


def test_a_truth_a_little_larger_is_cropped_at_the_right_and_bottom(service, tmp_path):
    hr, lr, cropped = hr_and_lr(tmp_path, (1, 0))
    result = last(service.compare(request(lr, truth=hr)))
    assert np.array_equal(read_rgb8(result.panes[0].file), cropped)
    assert (
        "the ground truth: cropped from 64x49 to 64x48 px at the right and bottom" in result.notes
    )


@pytest.mark.parametrize("size", [(50, 64), (47, 64), (48, 66), (64, 48), (24, 32)])
def test_a_truth_of_another_size_is_refused_with_both(service, tmp_path, size):
    _, lr, _ = hr_and_lr(tmp_path)
    truth = picture(tmp_path / "other.png", *size)
    asked = request(lr, truth=truth)
    if size == (64, 48):  # on its side, as far as the header tells
        service.check(asked)
    with pytest.raises(SrkdError) as refused:
        last(service.compare(asked))
    assert f"{size[1]}x{size[0]} px" in str(refused.value)
    assert "64x48 px" in str(refused.value)
    assert "never resized" in str(refused.value)


def test_a_picture_that_is_turned_by_its_camera_finds_its_truth(service, tmp_path):
    turned(tmp_path / "lr.jpg")  # 9x14 as stored, 14x9 upright
    truth = picture(tmp_path / "hr.png", 28, 18)
    assert last(service.compare(request(tmp_path / "lr.jpg", truth=truth))).lr_size == (14, 9)


def test_a_ground_truth_can_be_shrunk_first(service, tmp_path):
    hr = pixels(41, 63, seed=7)
    write_png(tmp_path / "hr.png", hr)
    result = last(service.compare(request(tmp_path / "hr.png", shrink=True)))
    assert (result.lr_size, result.panes[0].key) == ((20, 31), "truth")
    assert np.array_equal(read_rgb8(result.panes[0].file), hr[:40, :62])
    lr = downscale_uint8(hr, 2)
    assert np.array_equal(read_rgb8(result.panes[1].file)[::2, ::2], lr)
    expected = upscale(lr, service.shelf.sources["tiny_scratch"])
    assert np.array_equal(read_rgb8(result.panes[3].file), expected)
    assert any("cropped from 63x41 to 62x40 px" in note for note in result.notes)
    assert all(pane.numbers.psnr_y > 5 for pane in result.panes[1:])


@pytest.mark.parametrize(
    ("array", "words"),
    [(wide(12, 12, 3), "16 bits a channel"), (pixels(12, 12, channels=4), "transparent pixels")],
)
def test_only_opaque_pictures_of_8_bits_are_shrunk(service, tmp_path, array, words):
    write_png(tmp_path / "a.png", array)
    with pytest.raises(SrkdError, match=f"photo.png has {words}"):
        last(service.compare(request(tmp_path / "a.png", shrink=True)))


def test_alpha_that_hides_nothing_is_no_hindrance(service, tmp_path):
    array = pixels(12, 12, channels=4)
    array[..., 3] = 255
    write_png(tmp_path / "a.png", array)
    assert last(service.compare(request(tmp_path / "a.png", shrink=True))).lr_size == (6, 6)


def test_pictures_too_small_for_a_score_say_so(service, tmp_path):
    result = last(service.compare(request(picture(tmp_path / "a.png", 8, 8), shrink=True)))
    assert any("too small for SSIM" in note for note in result.notes)
    assert result.panes[1].numbers.ssim_y is None
    assert math.isfinite(result.panes[1].numbers.psnr_y)


# --- what is refused beforehand -----------------------------------------------------------------


def png_header(width, height):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


HOSTILE = {
    "an SVG drawing": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "an XML file": b"<?xml version='1.0'?><svg/>",
    "a GIF": b"GIF89a" + bytes(40),
    "is empty": b"",
    "no picture": b"<html><script>alert(1)</script></html>",
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(40),
    "30000x30000": png_header(30_000, 30_000),
    "2000000000x2000000000": png_header(2_000_000_000, 2_000_000_000),
    "0.2 MB": b"\x89PNG\r\n\x1a\n" + bytes(200_000),
    "cannot decode": b"\x89PNG\r\n\x1a\n" + bytes(40),
}


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_files_are_refused_by_their_header_without_a_path(service, tmp_path, words):
    path = tmp_path / "upload"
    path.write_bytes(HOSTILE[words])
    for asked in (request(path), request(picture(tmp_path / "b.png"), truth=path)):
        with pytest.raises(SrkdError) as refused:
            service.check(asked)
        assert words in str(refused.value)
        assert str(tmp_path) not in str(refused.value)
        name = "photo.png" if asked.picture == path else "the ground truth"
        assert name in str(refused.value).lower()


def test_a_file_that_breaks_off_is_refused_while_it_is_read(service, tmp_path):
    whole = picture(tmp_path / "a.png", 40, 40).read_bytes()
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole[: len(whole) // 2])
    service.check(request(cut))
    with pytest.raises(SrkdError, match=r"cannot decode photo\.png"):
        last(service.compare(request(cut)))


@pytest.mark.parametrize(
    ("size", "words"),
    [((101, 100), "101x100|100x101"), ((100, 100), None), ((10, 2000), "2000x10")],
)
def test_pixels_are_counted_before_anything_is_decoded(service, tmp_path, size, words):
    asked = request(picture(tmp_path / "a.png", *size))
    if words is None:
        service.check(asked)
        return
    with pytest.raises(SrkdError, match=words):
        service.check(asked)
    service.check(replace(asked, shrink=True))  # the LR is a quarter


def test_the_output_is_limited_too(service):
    assert service.limits.lr_px(2) == 10_000
    assert service.limits.lr_px(4) == 60_000 // 16
    assert "at x4" in service.limits.sentence(4)
    assert "0.1 MB" in service.limits.sentence(2)
    assert "0.01 megapixels (for example 100x100)" in service.limits.sentence(2)


def test_the_limits_of_a_public_server():
    assert Limits().sentence(4) == (
        "PNG, JPEG, WebP, BMP or TIFF up to 20 MB and 2 megapixels (for example 1414x1414), which become 32 "
        "megapixels at x4."
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tile": 15}, "give 16 or more"),
        ({"tile": -1}, "give 16 or more"),
        ({"tile": True}, "give 16 or more"),
        ({"tile": "64; rm"}, "give 16 or more"),
        ({"reference": "rcan_c_x4"}, "not one of the networks chosen"),
        ({"choices": ()}, "0 networks were chosen"),
        ({"choices": (CHOICES[0],) * 2}, "chosen twice"),
        ({"choices": (CHOICES[0], Choice("rcan_c_x4"))}, "several scales .*tiny_scratch x2"),
        ({"choices": (CHOICES[0],) * 7}, "choose 1 to 6"),
        ({"truth": "itself", "shrink": True}, "leave one of the two out"),
    ],
)
def test_requests_that_cannot_be_are_refused(service, tmp_path, settings, words):
    path = picture(tmp_path / "a.png")
    asked = replace(
        request(path), **{**settings, **({"truth": path} if "truth" in settings else {})}
    )
    with pytest.raises(SrkdError, match=words):
        service.check(asked)
    with pytest.raises(SrkdError, match=words):
        next(service.compare(asked))


def test_thousands_of_tiles_are_refused(service, tmp_path):
    wide_service = Service([], replace(LIMITS, max_lr_px=10**6, max_sr_px=10**8, max_bytes=10**7))
    path = picture(tmp_path / "a.png", 600, 600)
    asked = CompareRequest(path, "a.png", (Choice("rcan_c_x4"),), tile=16)
    with pytest.raises(SrkdError, match="would be 1,444 for this picture, but at most 1,024"):
        wide_service.check(asked)
    wide_service.check(replace(asked, tile=24))
    wide_service.close()


def test_names_of_users_are_shown_without_folders_and_control_characters(service, tmp_path):
    path = tmp_path / "upload"
    path.write_bytes(b"")
    with pytest.raises(SrkdError) as refused:
        service.check(request(path, name="../../etc/\x1b[31mpass\nwd.png"))
    assert str(refused.value).startswith("[31mpasswd.png is empty")


def test_hidden_colours_do_not_show_in_bicubic_either(service, tmp_path):
    drawn = np.zeros((12, 12, 4), np.uint8)
    drawn[...] = 0, 255, 0, 0
    drawn[3:9, 4:8] = 200, 0, 0, 255
    write_png(tmp_path / "a.png", drawn)
    result = last(service.compare(request(tmp_path / "a.png", CHOICES[0])))
    bicubic = read_picture(result.panes[1].file)
    assert bicubic.alpha is not None
    assert (bicubic.rgb[bicubic.alpha > 0] == (200, 0, 0)).all()
    assert any("below transparent pixels" in note for note in result.panes[-1].notes)
