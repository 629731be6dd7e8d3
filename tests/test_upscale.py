"""The command and the Python call: files in, files out, complete or absent, in bounded memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import in_child, told_by
from PIL import Image, ImageCms
from torch import Tensor, nn

import srkd
from scripts.upscale import main
from srkd.console import run_command
from srkd.errors import CheckFailedError, SrkdError
from srkd.images import (
    bicubic_rows,
    read_picture,
    read_rgb8,
    to_tensor,
    to_uint8,
    to_uint16,
    write_png,
)
from srkd.infer import UpscaleReport, feature_channels, upscale, upscale_file
from srkd.jobs import plan_jobs
from srkd.loaded import LoadedModel
from srkd.models import load_model, save_model
from srkd.networks import build
from srkd.types import Facts

ROOT = Path(__file__).resolve().parent.parent
SCALE = 2
H, W = 20, 27


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of an untrained EDSR, tamed so that it enlarges and does not only make noise."""
    torch.manual_seed(0)
    network = build("edsr_tiny", SCALE)
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path, network, {})
    return path


@pytest.fixture(scope="session")
def model(folder: Path) -> LoadedModel:
    return load_model(folder)


class Nearest(nn.Module):
    """Repeats every pixel, so that what comes out is known to the bit."""

    def forward(self, lr: Tensor) -> Tensor:
        return lr.repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3)


@pytest.fixture
def nearest() -> LoadedModel:
    facts = Facts(scale=SCALE, receptive_field_px=0, exact_tiling=True)
    return LoadedModel(Nearest(), "nearest", Path("nearest"), facts)


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    top = np.iinfo(dtype).max + 1
    return np.random.default_rng(0).integers(0, top, shape, dtype=dtype)


def repeat(pixels: np.ndarray) -> np.ndarray:
    return pixels.repeat(SCALE, 0).repeat(SCALE, 1)


def direct(model: LoadedModel, rgb: np.ndarray) -> Tensor:
    with torch.inference_mode():
        return model.network(to_tensor(rgb))


# --- the Python call ------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [None, "auto", 8])
def test_8_and_16_bits_are_the_network_itself(model: LoadedModel, tile: int | str | None) -> None:
    for dtype, convert, slack in ((np.uint8, to_uint8, 1), (np.uint16, to_uint16, 1)):
        rgb = noise(H, W, 3, dtype=dtype)
        got = upscale(rgb, model, tile=tile)  # pyright: ignore[reportArgumentType]
        want = convert(direct(model, rgb))
        assert got.dtype == dtype
        assert got.shape == (SCALE * H, SCALE * W, 3)
        # Tiles may round the last bit otherwise; whole images may not.
        assert np.abs(got.astype(int) - want).max() <= (slack if tile == 8 else 0)


def test_every_kind_of_array_keeps_its_channels(nearest: LoadedModel) -> None:
    for dtype in (np.uint8, np.uint16):
        grey = noise(H, W, dtype=dtype)
        assert np.array_equal(upscale(grey, nearest), repeat(grey))
        rgba = noise(H, W, 4, dtype=dtype).clip(1)
        got = upscale(rgba, nearest, tile=8)
        assert np.array_equal(got[..., :3], repeat(rgba[..., :3]))
        assert np.array_equal(got[..., 3], bicubic_rows(rgba[..., 3], 0, H, SCALE))
        assert upscale(rgba[..., :2], nearest).shape == (SCALE * H, SCALE * W, 2)


def test_grey_output_is_the_luma_of_the_network(nearest: LoadedModel) -> None:
    class Reddish(Nearest):
        def forward(self, lr: Tensor) -> Tensor:
            return super().forward(lr) * torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1)

    got = upscale(np.full((3, 3), 200, np.uint8), replace(nearest, network=Reddish()))
    assert (got == round(200 * (0.299 + 0.587 / 2 + 0.114 / 4))).all()


def test_float_tensors_and_arrays(nearest: LoadedModel) -> None:
    array = np.random.default_rng(0).random((H, W, 3)).astype(np.float32)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for given in (array, tensor, tensor[None], array.astype(np.float64)):
        got = upscale(given, nearest, tile=8)
        assert got.dtype == np.float32
        assert np.array_equal(got, repeat(array))
    assert np.allclose(upscale(array[..., 0], nearest), repeat(array[..., 0]), atol=1e-6)


def test_float_output_is_clamped(nearest: LoadedModel) -> None:
    class Loud(Nearest):
        def forward(self, lr: Tensor) -> Tensor:
            return 3 * super().forward(lr) - 1

    loud = replace(nearest, network=Loud())
    got = upscale(np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 6), loud)
    assert got.min() == 0
    assert got.max() == 1


def test_paths_and_pillow_images(nearest: LoadedModel, tmp_path: Path) -> None:
    pixels = noise(H, W, 3)
    write_png(tmp_path / "x.png", pixels)
    for given in (tmp_path / "x.png", str(tmp_path / "x.png"), Image.fromarray(pixels)):
        assert np.array_equal(srkd.upscale(given, nearest), repeat(pixels))


def test_conversions_are_warned_about(nearest: LoadedModel) -> None:
    image = Image.fromarray(noise(H, W, 3)).quantize(8)
    with pytest.warns(UserWarning, match="palette converted to RGB"):
        upscale(image, nearest)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((4, 4, 3), np.int64), "of int64"),
        (np.zeros((3, 40, 40), np.uint8), "transpose"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        (np.full((4, 4, 3), 255.0), "divide by 255"),
        (np.full((4, 4, 3), np.nan), r"but \[0, 1\] is needed"),
        (torch.zeros(2, 3, 4, 4), "one picture is needed"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "one picture is needed"),
    ],
)
def test_what_is_no_picture_is_refused(nearest: LoadedModel, given: object, said: str) -> None:
    with pytest.raises(SrkdError, match=said):
        upscale(given, nearest)  # pyright: ignore[reportArgumentType]


def test_values_that_are_not_finite_are_an_error(nearest: LoadedModel, tmp_path: Path) -> None:
    class Broken(Nearest):
        def forward(self, lr: Tensor) -> Tensor:
            return super().forward(lr) * float("nan")

    write_png(tmp_path / "x.png", noise(H, W, 3))
    with pytest.raises(CheckFailedError, match="not finite"):
        upscale_file(tmp_path / "x.png", tmp_path / "y.png", replace(nearest, network=Broken()))
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_ctrl_c_leaves_nothing(tmp_path: Path, nearest: LoadedModel) -> None:
    class Interrupted(Nearest):
        def forward(self, lr: Tensor) -> Tensor:
            if lr.shape[-2] < 8:  # the last band
                raise KeyboardInterrupt
            return super().forward(lr)

    write_png(tmp_path / "x.png", noise(H, W, 3))
    with pytest.raises(KeyboardInterrupt):
        upscale_file(
            tmp_path / "x.png", tmp_path / "y.png", replace(nearest, network=Interrupted()), tile=8
        )
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_widest_convolution_of_a_foreign_network() -> None:
    assert feature_channels(nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 12, 3))) == 40
    assert feature_channels(build("edsr_tiny", 4)) == 16


# --- file to file ---------------------------------------------------------------------------------


def run_file(
    tmp_path: Path, model: LoadedModel, source: str, target: str, **options: object
) -> UpscaleReport:
    report = upscale_file(tmp_path / source, tmp_path / target, model, **options)  # pyright: ignore[reportArgumentType]
    assert not [p for p in tmp_path.iterdir() if ".part" in p.name]
    return report


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_depth_grey_and_alpha_are_kept(
    tmp_path: Path, nearest: LoadedModel, channels: int, dtype: type
) -> None:
    pixels = noise(H, W, channels, dtype=dtype).clip(1)  # an alpha that hides nothing
    write_png(tmp_path / "x.png", pixels)
    report = run_file(tmp_path, nearest, "x.png", "y.png", tile=8)
    got = read_picture(tmp_path / "y.png")
    assert report.notes == ()
    assert (report.lr_size, report.sr_size) == ((H, W), (SCALE * H, SCALE * W))
    assert (report.tiles, report.tile_px, report.bits) == (12, 8, 8 * np.dtype(dtype).itemsize)
    assert (got.bits, got.grey) == (report.bits, channels < 3)
    assert np.array_equal(got.rgb[..., 0], repeat(pixels[..., 0]))
    if channels in (2, 4):
        assert got.alpha is not None
        assert np.array_equal(got.alpha, bicubic_rows(pixels[..., -1], 0, H, SCALE))


class Bicubic(nn.Module):
    """Looks two pixels around, as networks look far around."""

    def forward(self, lr: Tensor) -> Tensor:
        return nn.functional.interpolate(lr, scale_factor=SCALE, mode="bicubic")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("tile", [None, 8])
def test_hidden_colours_do_not_show(
    tmp_path: Path, nearest: LoadedModel, dtype: type, tile: int | None
) -> None:
    """A red square on green that nobody sees."""
    full = np.iinfo(dtype).max
    pixels = np.zeros((H, W, 4), dtype)
    pixels[...] = 0, full, 0, 0
    pixels[6:13, 9:20] = full // 2, 0, 0, full
    write_png(tmp_path / "x.png", pixels)
    facts = replace(nearest.facts, receptive_field_px=2)
    model = replace(nearest, network=Bicubic(), facts=facts)
    report = run_file(tmp_path, model, "x.png", "y.png", tile=tile)
    assert report.notes == (
        "colours below transparent pixels were replaced by the nearest visible ones",
    )
    got = read_picture(tmp_path / "y.png")
    assert got.alpha is not None
    assert np.array_equal(got.alpha, bicubic_rows(pixels[..., 3], 0, H, SCALE))
    assert (got.rgb[got.alpha > 0] == (full // 2, 0, 0)).all()
    # Flattened where transparency cannot be kept, it is red on white, and nothing else.
    run_file(tmp_path, model, "x.png", "y.bmp", tile=tile)
    on_white = read_picture(tmp_path / "y.bmp").rgb.astype(int)
    assert (on_white[..., 1] == on_white[..., 2]).all()


def test_profile_and_orientation(tmp_path: Path, nearest: LoadedModel) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = noise(H, W, 3)
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif, icc_profile=profile)
    report = run_file(tmp_path, nearest, "x.png", "y.png")
    assert report.notes == ("EXIF orientation 6 applied",)
    with Image.open(tmp_path / "y.png") as image:
        assert image.getexif().get(0x0112) is None
        assert image.info["icc_profile"] == profile
        assert np.array_equal(np.asarray(image), repeat(np.rot90(pixels, -1)))


def test_what_the_format_cannot_hold_is_said(tmp_path: Path, nearest: LoadedModel) -> None:
    write_png(tmp_path / "x.png", noise(H, W, 4, dtype=np.uint16).clip(257))
    report = run_file(tmp_path, nearest, "x.png", "y.bmp")
    assert [note.split(",")[0] for note in report.notes] == [
        "16 bits rounded to 8",
        "transparency flattened on white",
    ]
    assert read_picture(tmp_path / "y.bmp").alpha is None
    report = run_file(tmp_path, nearest, "x.png", "y.tif")
    assert report.notes == ()
    assert read_picture(tmp_path / "y.tif").bits == 16


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".bmp", ".tif"])
def test_other_formats(tmp_path: Path, nearest: LoadedModel, suffix: str) -> None:
    smooth = np.linspace(0, 255, H * W * 3).astype(np.uint8).reshape(H, W, 3)
    write_png(tmp_path / "x.png", smooth)
    run_file(tmp_path, nearest, "x.png", f"y{suffix}")
    got = read_picture(tmp_path / f"y{suffix}")
    assert got.format == suffix[1:]
    assert np.abs(got.rgb.astype(int) - repeat(smooth)).max() <= (24 if suffix == ".jpg" else 0)


def test_limits_of_the_formats(tmp_path: Path, nearest: LoadedModel) -> None:
    write_png(tmp_path / "x.png", np.zeros((1, 8200), np.uint8))
    with pytest.raises(SrkdError, match=r"webp holds at most 16383 px a side; choose \.png"):
        run_file(tmp_path, nearest, "x.png", "y.webp")
    run_file(tmp_path, nearest, "x.png", "y.jpg")
    huge = replace(nearest, facts=replace(nearest.facts, scale=5000))
    with pytest.raises(SrkdError, match=r"other formats end at 200 megapixels\. Choose \.png"):
        run_file(tmp_path, huge, "x.png", "z.tif")
    assert not (tmp_path / "y.webp").exists()
    assert not (tmp_path / "z.tif").exists()


def test_one_pixel_picture(tmp_path: Path, model: LoadedModel) -> None:
    write_png(tmp_path / "x.png", noise(1, 1, 3))
    assert run_file(tmp_path, model, "x.png", "y.png").sr_size == (SCALE, SCALE)
    assert read_picture(tmp_path / "y.png").size == (SCALE, SCALE)


def test_progress_reaches_the_end(tmp_path: Path, nearest: LoadedModel) -> None:
    write_png(tmp_path / "x.png", noise(H, W, 3))
    seen: list[int] = []
    run_file(tmp_path, nearest, "x.png", "y.png", tile=8, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == H * W
    assert seen[0] == 8 * 8


def test_running_out_of_memory_is_noted(tmp_path: Path, nearest: LoadedModel) -> None:
    class Scarce(Nearest):
        def forward(self, lr: Tensor) -> Tensor:
            if lr.shape[-1] > 32:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(lr)

    pixels = noise(60, 100, 3)
    write_png(tmp_path / "x.png", pixels)
    report = run_file(tmp_path, replace(nearest, network=Scarce()), "x.png", "y.png", tile=None)
    assert report.notes[-1] == "out of memory, went on with tiles of 25 px"
    assert report.tile_px == 25
    assert np.array_equal(read_picture(tmp_path / "y.png").rgb, repeat(pixels))


def test_tiles_of_a_network_that_sees_the_whole_image_are_noted(
    tmp_path: Path, nearest: LoadedModel
) -> None:
    facts = replace(nearest.facts, receptive_field_px=None, exact_tiling=False)
    blind = replace(nearest, facts=facts)
    write_png(tmp_path / "x.png", noise(H, W, 3))
    report = run_file(tmp_path, blind, "x.png", "y.png", tile=8)
    assert "tiles of 8 px are not exact" in report.notes[0]
    assert run_file(tmp_path, blind, "x.png", "z.png", tile=None).notes == ()


# --- what to do with which file -------------------------------------------------------------------


def test_jobs_of_a_folder(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("b.png", "a.PNG"):
        write_png(photos / name, noise(3, 5, 3))
    (photos / "c.jpg").write_bytes(b"damaged")
    for name in ("notes.txt", ".hidden.png"):
        (photos / name).write_text("x")
    jobs, others = plan_jobs(photos, out)
    assert [(j.source.name, j.target.name, j.pixels) for j in jobs] == [
        ("a.PNG", "a.png", 15),
        ("b.png", "b.png", 15),
        ("c.jpg", "c.png", 0),
    ]
    assert others == ["notes.txt"]
    kept, _ = plan_jobs(photos, out, keep_format=True)
    assert [j.target.name for j in kept] == ["a.PNG", "b.png", "c.jpg"]


def test_jobs_that_are_refused_beforehand(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    with pytest.raises(SrkdError, match="there is no"):
        plan_jobs(tmp_path / "none", out)
    with pytest.raises(SrkdError, match="holds no pictures"):
        plan_jobs(photos, out)
    write_png(photos / "a.png", noise(3, 5, 3))
    write_png(photos / "b.png", noise(3, 5, 3))
    with pytest.raises(SrkdError, match="is the input itself"):
        plan_jobs(photos, photos, overwrite=True)
    with pytest.raises(SrkdError, match="is the input itself"):
        plan_jobs(photos / "a.png", photos / "../photos/a.png", overwrite=True)
    with pytest.raises(SrkdError, match="names no format that can be written"):
        plan_jobs(photos / "a.png", tmp_path / "a.gif")
    with pytest.raises(SrkdError, match="is a file, but the input is a folder"):
        plan_jobs(photos, photos / "a.png")
    for name in ("a.png", "b.png"):
        write_png(out / name, noise(3, 5, 3))
    with pytest.raises(SrkdError, match="2 of 2 outputs exist"):
        plan_jobs(photos, out)
    with pytest.raises(SrkdError, match="exists; add --overwrite"):
        plan_jobs(photos / "a.png", out / "a.png")
    assert len(plan_jobs(photos, out, overwrite=True)[0]) == 2
    assert plan_jobs(photos / "a.png", out, overwrite=True)[0][0].target == out / "a.png"
    (photos / "a.jpg").write_bytes(b"x")
    with pytest.raises(SrkdError, match=r"a\.jpg and a\.png would both become"):
        plan_jobs(photos, out, overwrite=True)


# --- the command ----------------------------------------------------------------------------------


def command(*words: object) -> list[str]:
    return [str(word) for word in words]


def test_a_file(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "x.png", tmp_path / "new" / "y.png"
    write_png(source, noise(H, W, 3))
    words = command(source, target, "--model", folder, "--tile", 8, "--device", "cpu")
    assert run_command(main, words) == 0
    out = capsys.readouterr().out
    assert f"{source} 27x20 -> {target} 54x40, 12 tiles" in out
    assert run_command(main, words) == 2
    assert "exists; add --overwrite" in capsys.readouterr().err
    assert run_command(main, [*words, "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    want = to_uint8(direct(load_model(folder), noise(H, W, 3))).astype(int)
    assert np.abs(read_picture(target).rgb - want).max() <= 1


def test_a_folder_with_a_bad_picture(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    write_png(photos / "a.png", noise(H, W, 3))
    (photos / "b.png").write_bytes(b"these are words")
    Image.fromarray(noise(H, W, 3)).quantize(8).save(photos / "c.png")
    words = command(photos, out, "--model", folder, "--json", "--device", "cpu")
    assert run_command(main, words) == 1
    told = capsys.readouterr()
    document = json.loads(told.out)
    assert [Path(p["target"]).name for p in document["pictures"]] == ["a.png", "c.png"]
    assert document["pictures"][1]["notes"] == ["palette converted to RGB"]
    assert document["scale"] == SCALE
    assert [Path(f["source"]).name for f in document["failed"]] == ["b.png"]
    assert "1 of 3 pictures failed" in told.err
    assert "note: " in told.err
    assert "Traceback" not in told.err
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "c.png"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tile", "0"], "no tile"),
        (["--tile", "big"], "no tile"),
        (["--max-pixels", "-5"], "no positive whole number"),
        (["--scale", "5"], "invalid choice"),
    ],
)
def test_bad_flags(
    tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command(tmp_path / "x.png", tmp_path / "y.png", "--model", "m", *flags))
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_bad_requests(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "x.png", tmp_path / "y.png"
    write_png(source, noise(H, W, 3))
    for words, code, said in (
        (
            command(source, target, "--model", "nothing_like_it"),
            2,
            "no file, run folder or shipped",
        ),
        (command(source, target, "--model", folder, "--scale", 4), 2, "x2 network, but x4"),
        (command(source, target, "--model", folder, "--max-pixels", 10), 2, "megapixels"),
        (command(source, target, "--model", folder, "--device", "abacus"), 2, "unknown device"),
        (command(source, target, "--model", folder, "--engine", "warp"), 2, "'warp'"),
        (command(source, source, "--model", folder, "--overwrite"), 2, "is the input itself"),
        (command(source, source / "y.png", "--model", folder), 2, "cannot write"),
    ):
        assert run_command(main, words) == code
        told = capsys.readouterr()
        assert said in told.err
        assert told.err.startswith("error: ")
        assert told.err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs Linux's read-only /sys")
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_png(tmp_path / "x.png", noise(H, W, 3))
    assert run_command(main, command(tmp_path / "x.png", "/sys/y.png", "--model", folder)) == 2
    assert "cannot write /sys/y.png" in capsys.readouterr().err


def run_python(code: str, *words: object) -> str:
    """Standard output of `code` in a process of its own; it finds `words` in sys.argv."""
    done = subprocess.run(
        [sys.executable, "-c", code, *command(*words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _upscale_on_a_full_disk(source: str, model: str, targets: list[str]) -> list[tuple[int, str]]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return [told_by(main, [source, t, "--model", model, "--overwrite"]) for t in targets]


def test_a_full_disk_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    """A limit on the size of files fails as a full disk does: late, in the middle of a write."""
    write_png(tmp_path / "x.png", noise(80, 80, 3))
    for suffix in (".png", ".tif"):
        (tmp_path / f"y{suffix}").write_bytes(b"what was there")
    targets = [str(tmp_path / f"y{suffix}") for suffix in (".png", ".tif")]
    found = in_child(_upscale_on_a_full_disk, str(tmp_path / "x.png"), str(folder), targets)
    for target, (exit_code, told) in zip(targets, found, strict=True):
        assert exit_code == 2
        assert told.startswith(f"error: cannot write {target}: File too large"), told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.png", "y.png", "y.tif"]
    for suffix in (".png", ".tif"):
        assert (tmp_path / f"y{suffix}").read_bytes() == b"what was there"


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A picture whose features alone take 192 MiB, with 96 MiB beyond what a small one has taken.

    `auto` asks what is left; `none` tries the whole picture and halves until it fits, to the same result.
    """
    h, w, scale, spare = 2048, 96, 4, 96 * 2**20
    assert 16 * scale**2 * h * w * 4 == 192 * 2**20
    save_model(tmp_path / "x4", build("edsr_tiny", scale), {})
    rows = np.linspace(0, 255, h).astype(np.uint8)
    write_png(tmp_path / "large.png", np.broadcast_to(rows[:, None, None], (h, w, 3)))
    write_png(tmp_path / "small.png", np.zeros((128, w, 3), np.uint8))
    code = """
import re, resource, sys
from scripts.upscale import main
folder, small, large, spare = sys.argv[1:]
main([small, small + ".out.png", "--model", folder, "--tile", "64", "--quiet"])
(taken,) = re.findall(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())
limit = int(taken) * 1024 + int(spare)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for tile in ("auto", "none"):
    main([large, large + tile + ".png", "--model", folder, "--tile", tile, "--quiet"])
"""
    run_python(code, tmp_path / "x4", tmp_path / "small.png", tmp_path / "large.png", spare)
    auto, none = (
        read_picture(tmp_path / f"large.png{tile}.png").rgb.astype(np.int16)
        for tile in ("auto", "none")
    )
    assert auto.shape == (scale * h, scale * w, 3)
    assert np.abs(auto - none).max() <= 1


def test_bands_are_not_collected(tmp_path: Path, nearest: LoadedModel) -> None:
    """Sharper than the above, which sees the allocator's noise: what numpy holds at the peak."""
    h, w = 4096, 256
    write_png(tmp_path / "x.png", np.zeros((h, w, 3), np.uint8))
    tracemalloc.start()
    try:
        upscale_file(tmp_path / "x.png", tmp_path / "y.png", nearest, tile=64)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    input_bytes = h * w * 3
    assert peak < 3 * input_bytes < SCALE**2 * input_bytes


def test_help_is_instant_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom scripts.upscale import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'PIL' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--tile" in done.stdout


def test_published_score_through_files_and_tiles(tmp_path: Path, shared_data: Path) -> None:
    """MLPerf's EDSR f32b5 x2 on Set5: 37.377 dB PSNR-Y (weights' sidecar), from 8-bit files in tiles."""
    loaded = load_model(shared_data / "weights/edsr_f32b5_x2_mlperf.safetensors")
    scores = []
    for hr_path in sorted((shared_data / "benchmarks/Set5/HR").glob("*.png")):
        lr_path = shared_data / f"benchmarks/Set5/LR_bicubic/X2/{hr_path.stem}x2.png"
        upscale_file(lr_path, tmp_path / hr_path.name, loaded, tile=100)
        sr = read_rgb8(tmp_path / hr_path.name).astype(float)
        hr = read_rgb8(hr_path)[: sr.shape[0], : sr.shape[1]]
        gap = ((hr - sr) @ np.array([65.481, 128.553, 24.966]) / 255)[2:-2, 2:-2]
        scores.append(10 * np.log10(255**2 / np.mean(gap**2)))
    assert len(scores) == 5
    assert np.mean(scores) == pytest.approx(37.377, abs=0.001)
