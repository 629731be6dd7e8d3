"""Evaluation against figures of others, and against hand-worked ones on tiny sets."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.evaluate import main
from srkd.console import run_command
from srkd.data.sets import open_set
from srkd.errors import SrkdError
from srkd.evaluate import (
    Bicubic,
    Entry,
    document,
    eightfold,
    evaluate,
    evaluate_all,
    open_sets,
    score,
    score_bicubic,
    write_scores,
)
from srkd.images import read_rgb8, write_png
from srkd.metrics import PAPER_Y, RGB, Protocol, psnr_ssim
from srkd.models import LoadedModel, load_model, save_model
from srkd.networks import build
from srkd.types import Facts

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests" / "golden" / "scores.json").read_text())
ONE_LEVEL_DB = 20 * math.log10(255)


# -- figures of others --------------------------------------------------------------------------


def assert_golden(result: tuple[float, float], golden: list[float]) -> None:
    """Half a unit of the last printed digit, and a little for other processors' float32."""
    assert result[0] == pytest.approx(golden[0], abs=0.0007)
    assert result[1] == pytest.approx(golden[1], abs=0.00007)


@pytest.mark.parametrize(
    ("scale", "name"),
    [(s, n) for s in (2, 3, 4) for n in ("Set5", "Set14")],
)
def test_bicubic_has_the_known_score(shared_data: Path, scale: int, name: str) -> None:
    result = score_bicubic(open_set(name, scale))
    assert_golden((result.psnr, result.ssim), GOLDEN["bicubic"][str(scale)][name])
    assert result.lr_origin == "official files"
    assert len(result.images) == {"Set5": 5, "Set14": 14}[name]


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_has_the_known_score_on_bsd100(shared_data: Path, scale: int) -> None:
    result = score_bicubic(open_set("BSD100", scale))
    assert_golden((result.psnr, result.ssim), GOLDEN["bicubic"][str(scale)]["BSD100"])
    assert len(result.images) == 100


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("edsr_f32b5_x2_mlperf", "Set5"),
        ("edsr_f32b5_x2_mlperf", "Set14"),
        pytest.param("edsr_f32b5_x2_mlperf", "BSD100", marks=pytest.mark.slow),
        ("edsr_f64b5_x2_mlperf", "Set5"),
        pytest.param("edsr_f64b5_x2_mlperf", "Set14", marks=pytest.mark.slow),
        pytest.param("edsr_f64b5_x2_mlperf", "BSD100", marks=pytest.mark.slow),
    ],
)
def test_published_weights_have_the_known_score(shared_data: Path, model: str, name: str) -> None:
    loaded = load_model(shared_data / "weights" / f"{model}.safetensors")
    (result,) = evaluate(loaded, [name])
    assert_golden((result.psnr, result.ssim), GOLDEN["networks"][model][name])


# -- tiny sets ----------------------------------------------------------------------------------


@pytest.fixture
def grey_levels(tmp_path: Path) -> Path:
    """A folder of two pictures of one colour each: level 100 and level 200."""
    for name, level in (("a", 100), ("b", 200)):
        write_png(tmp_path / "levels" / f"{name}.png", np.full((36, 48, 3), level, np.uint8))
    return tmp_path / "levels"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two noisy pictures of different sizes, multiples of 2 and 3."""
    generator = np.random.default_rng(0)
    for name, (height, width) in (("first", (36, 48)), ("second", (60, 36))):
        picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        write_png(tmp_path / "photos" / f"{name}.png", picture)
    return tmp_path / "photos"


class Nearest(nn.Module):
    """Repeats pixels and adds `levels` of 255 to the picture where it is brighter than a half."""

    def __init__(self, levels: float = 0.0, scale: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(levels / 255))
        self.inner = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
        self.scale = scale

    def forward(self, lr: Tensor) -> Tensor:
        bright = (lr > 0.5).float()
        return F.interpolate(lr + self.weight * (1 + bright), scale_factor=self.scale)


def loaded(network: nn.Module, scale: int = 2, minimum_px: int = 1) -> LoadedModel:
    facts = Facts(scale=scale, receptive_field_px=1, exact_tiling=True, minimum_px=minimum_px)
    return LoadedModel(network, "nearest", Path("nowhere"), facts)


def test_the_score_of_a_set_is_the_mean_over_its_images(grey_levels: Path) -> None:
    result = score(Nearest(levels=1), open_set(grey_levels, 2), RGB)
    assert [image.name for image in result.images] == ["a", "b"]
    # a is one level off, b is two.
    in_db = [ONE_LEVEL_DB, ONE_LEVEL_DB - 20 * math.log10(2)]
    assert [image.psnr for image in result.images] == pytest.approx(in_db, abs=1e-9)
    assert result.psnr == pytest.approx(ONE_LEVEL_DB - 10 * math.log10(2), abs=1e-9)
    ssims = [(2 * x * y + 6.5025) / (x * x + y * y + 6.5025) for x, y in ((101, 100), (202, 200))]
    assert result.ssim == pytest.approx(sum(ssims) / 2, abs=1e-9)
    assert result.protocol is RGB
    assert "made" in result.lr_origin
    assert all(image.seconds > 0 for image in result.images)
    assert result.seconds == pytest.approx(sum(image.seconds for image in result.images))


def test_an_exact_image_makes_the_mean_infinite(grey_levels: Path) -> None:
    result = score(Nearest(), open_set(grey_levels, 2))
    assert (result.psnr, result.ssim) == (math.inf, pytest.approx(1))


def test_validation_leaves_training_as_it_was(grey_levels: Path) -> None:
    class Watch(Nearest):
        def forward(self, lr: Tensor) -> Tensor:
            assert lr.shape == (1, 3, 18, 24)
            assert lr.dtype == torch.float32
            assert not any(module.training for module in self.modules())
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.is_grad_enabled()
            assert torch.get_float32_matmul_precision() == "highest"
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 3:
                raise ZeroDivisionError
            return super().forward(lr)

    network = Watch().train()
    network.inner[0].eval()  # a frozen normalisation must stay frozen
    before = [module.training for module in network.modules()]
    evaluation_set = open_set(grey_levels, 2)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            score(network, evaluation_set)
            assert network.calls == 2
            assert [module.training for module in network.modules()] == before
            assert torch.is_autocast_enabled("cpu")
            with pytest.raises(ZeroDivisionError):
                score(network, evaluation_set)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [module.training for module in network.modules()] == before


def test_a_network_can_be_trained_after_validation(photos: Path) -> None:
    network = build("edsr_tiny", 2).train()
    score(network, open_set(photos, 2))
    network(torch.rand(1, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_self_ensemble_is_the_mean_over_eight_symmetries() -> None:
    generator = torch.Generator().manual_seed(0)
    lr = torch.rand(1, 3, 5, 7, generator=generator)
    kernel = torch.rand(3, 3, 3, 3, generator=generator)
    seen = []

    def upscale(image: Tensor) -> Tensor:
        seen.append(image)
        return F.interpolate(F.conv2d(image, kernel, padding=1), scale_factor=2) ** 2

    expected = torch.zeros(1, 3, 10, 14)
    for mirrored in (False, True):
        for quarter in range(4):
            turned = torch.rot90(lr.flip(-1) if mirrored else lr, quarter, (-2, -1))
            back = torch.rot90(upscale(turned), -quarter, (-2, -1))
            expected += (back.flip(-1) if mirrored else back) / 8
    seen.clear()
    assert torch.allclose(eightfold(upscale)(lr), expected, atol=1e-6)
    assert len(seen) == 8
    assert len({(image.shape, tuple(image.flatten().tolist())) for image in seen}) == 8


def test_self_ensemble_reaches_the_score(photos: Path) -> None:
    torch.manual_seed(0)
    model = loaded(build("edsr_tiny", 2))
    plain = evaluate(model, [str(photos)])[0]
    better = evaluate(model, [str(photos)], self_ensemble=True)[0]
    evaluation_set = open_set(photos, 2)
    for image, mine, other in zip(evaluation_set, better.images, plain.images, strict=True):
        lr = torch.tensor(image.lr).permute(2, 0, 1)[None].float() / 255
        hr = torch.tensor(image.hr).permute(2, 0, 1)[None]
        with torch.no_grad():
            expected, _ = psnr_ssim(eightfold(model.network)(lr), hr, 2)
        assert mine.psnr == pytest.approx(expected.item(), abs=1e-4)
        assert mine.psnr != other.psnr


@pytest.mark.parametrize("protocol", [PAPER_Y, RGB])
def test_the_pictures_kept_have_the_scores(
    photos: Path, tmp_path: Path, protocol: Protocol
) -> None:
    torch.manual_seed(0)
    (result,) = evaluate(
        loaded(build("edsr_tiny", 2)), [str(photos)], protocol=protocol, save=tmp_path / "kept"
    )
    files = sorted(path.relative_to(tmp_path) for path in (tmp_path / "kept").rglob("*"))
    assert [str(f) for f in files if f.suffix] == [
        "kept/photos/first.png",
        "kept/photos/second.png",
    ]
    for image in result.images:
        pair = (tmp_path / "kept" / "photos", photos)
        sr, hr = (
            torch.tensor(read_rgb8(folder / f"{image.name}.png")).permute(2, 0, 1)[None]
            for folder in pair
        )
        in_db, similarity = psnr_ssim(sr, hr, 2, protocol)
        assert (in_db.item(), similarity.item()) == (image.psnr, image.ssim)


# -- refusals -----------------------------------------------------------------------------------


def test_what_cannot_be_scored_is_refused_in_a_sentence(photos: Path, tmp_path: Path) -> None:
    folder = str(photos)
    with pytest.raises(SrkdError, match="does not tell its scale"):
        evaluate(F.relu, [folder])
    with pytest.raises(SrkdError, match="nearest is a x2 network, but x3 was asked for"):
        evaluate(loaded(Nearest()), [folder], scale=3)
    with pytest.raises(SrkdError, match="photos was opened at x3, the model is x2"):
        evaluate(loaded(Nearest()), [open_set(photos, 3)])
    with pytest.raises(SrkdError, match=r"photos/first: .*\(1, 3, 54, 72\) and \(1, 3, 36, 48\)"):
        score(Nearest(scale=3), open_set(photos, 2))
    with pytest.raises(SrkdError, match="photos/first: the image holds 5184 values that are NaN"):
        score(Nearest(levels=math.nan), open_set(photos, 2))
    with pytest.raises(SrkdError, match=r"photos/first: the LR image is 24x18 px.* at least 20 px"):
        evaluate(loaded(Nearest(), minimum_px=20), [folder])
    other = tmp_path / "other" / "photos"
    write_png(other / "x.png", np.zeros((36, 36, 3), np.uint8))
    with pytest.raises(SrkdError, match="two sets are named 'photos'"):
        open_sets([folder, str(other)], 2)


def test_a_small_image_is_named(tmp_path: Path) -> None:
    write_png(tmp_path / "small" / "dot.png", np.zeros((12, 30, 3), np.uint8))
    with pytest.raises(SrkdError, match=r"small/dot: .*30x12 px is too small .* at least 15x15"):
        score_bicubic(open_set(tmp_path / "small", 2))


# -- several models -----------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, str]:
    """Three run folders: two of one name at x2, one at x3."""
    torch.manual_seed(0)
    folders = {"a": ("a/student", 2), "b": ("b/student", 2), "c": ("third", 3)}
    for folder, scale in folders.values():
        save_model(tmp_path / folder, build("edsr_tiny", scale), {})
    return {name: str(tmp_path / folder) for name, (folder, _) in folders.items()}


def test_rows_of_a_table(photos: Path, runs: dict[str, str], tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    entries = evaluate_all(
        ["bicubic", runs["a"], runs["b"], runs["c"]],
        [str(photos)],
        self_ensemble=True,
        save=tmp_path / "kept",
        progress=lambda done, total: steps.append((done, total)),
    )
    assert [(e.label, e.scale, e.self_ensemble) for e in entries] == [
        ("bicubic", 2, False),  # at every scale that the models have
        ("bicubic", 3, False),
        (runs["a"], 2, False),  # two are named "student", so their folders tell them apart
        (f"{runs['a']} + self-ensemble", 2, True),
        (runs["b"], 2, False),
        (f"{runs['b']} + self-ensemble", 2, True),
        ("third", 3, False),
        ("third + self-ensemble", 3, True),
    ]
    assert entries[0].parameters is None
    assert entries[6].parameters == sum(p.numel() for p in build("edsr_tiny", 3).parameters())
    assert entries[1].scores[0].psnr == score_bicubic(open_set(photos, 3)).psnr
    expected = evaluate(load_model(runs["b"]), [str(photos)])[0]
    assert entries[4].scores[0].psnr == expected.psnr
    # Passes: 2 images, bicubic twice, three networks once and eight times.
    assert steps[-1] == (58, 58)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert len(list((tmp_path / "kept").rglob("*.png"))) == 2 * len(entries)
    assert (tmp_path / "kept" / "bicubic_x3" / "photos" / "first.png").is_file()


def test_bicubic_needs_a_scale(photos: Path) -> None:
    with pytest.raises(SrkdError, match="add --scale 2, 3 or 4"):
        evaluate_all(["bicubic"], [str(photos)])
    (entry,) = evaluate_all(["bicubic"], [str(photos)], scale=3)
    assert entry.scale == 3


def test_files_say_how_the_numbers_were_made(grey_levels: Path, tmp_path: Path) -> None:
    exact = score(Nearest(), open_set(grey_levels, 2), RGB)
    off = score(Nearest(levels=1), open_set(grey_levels, 2), RGB)
    entries = [
        Entry("exact", "here", 2, 1, False, notes=("guessed",), scores=(exact,)),
        Entry("off", "there", 2, None, True, notes=(), scores=(off,)),
    ]
    as_json, as_csv = write_scores(tmp_path / "out", entries, RGB, "cpu")
    assert (as_json.name, as_csv.name) == ("scores_rgb.json", "scores_rgb.csv")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    written = json.loads(as_json.read_text(), parse_constant=refuse)
    assert written == document(entries, RGB, "cpu")
    assert (written["protocol"], written["device"]) == ("rgb", "cpu")
    first, second = written["models"]
    assert first["notes"] == ["guessed"]
    assert first["sets"][0]["psnr_db"] is None  # infinite
    assert second["sets"][0]["psnr_db"] == off.psnr
    assert second["sets"][0]["lr_origin"] == off.lr_origin
    assert [row["image"] for row in second["sets"][0]["per_image"]] == ["a", "b"]

    with as_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["protocol"], r["model"], r["set"], r["image"]) for r in rows] == [
        ("rgb", model, "levels", image) for model in ("exact", "off") for image in ("a", "b")
    ]
    assert [float(r["psnr_db"]) for r in rows] == [
        math.inf,
        math.inf,
        *(i.psnr for i in off.images),
    ]
    assert [r["self_ensemble"] for r in rows] == ["False", "False", "True", "True"]


# -- the command --------------------------------------------------------------------------------


def test_the_command_prints_the_papers_table(
    photos: Path, runs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bicubic", runs["a"], "--data", str(photos), "--device", "cpu", "--quiet"]) == 0
    printed = capsys.readouterr().out
    result = score_bicubic(open_set(photos, 2))
    (row,) = (line for line in printed.splitlines() if "bicubic" in line and "LR" not in line)
    assert row.split() == ["bicubic", "x2", "-", f"{result.psnr:.2f}", "/", f"{result.ssim:.4f}"]
    assert "photos (2)" in printed
    assert f"{sum(p.numel() for p in build('edsr_tiny', 2).parameters()):,}" in printed
    assert "PSNR-Y in dB / SSIM-Y. paper-y: Y of BT.601" in printed
    assert "LR images: photos: made by" in printed


def test_a_wide_table_is_not_cut(
    grey_levels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [shutil.copytree(grey_levels, tmp_path / f"a_set_with_a_name_{i}") for i in range(6)]
    data = ["--data", *map(str, folders)]
    assert main(["bicubic", "--scale", "2", "--protocol", "rgb", "--quiet", *data]) == 0
    header, _, row = capsys.readouterr().out.splitlines()[1:4]
    assert header.count("a_set_with_a_name_") == 6
    assert row.split().count("1.0000") == 6


def test_the_command_prints_one_json_document(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["bicubic", "--scale", "3", "--data", str(photos), "--protocol", "rgb"]
    assert main([*common, "--json", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    expected = score_bicubic(open_set(photos, 3), RGB)
    assert values["models"][0]["sets"][0]["psnr_db"] == expected.psnr
    assert values["protocol"] == "rgb"
    assert (tmp_path / "out" / "scores_rgb.csv").is_file()
    assert "scores_rgb.json" in printed.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["bicubic"], 2, "add --scale"),
        (["no_such_model"], 2, "no_such_model"),
        (["bicubic", "--scale", "2", "--data", "NoSuchSet"], 2, "NoSuchSet"),
        (["bicubic", "--scale", "2", "--device", "cuda:99"], 3, "cuda:99"),
    ],
)
def test_mistakes_end_in_a_sentence(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, arguments) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_help_needs_no_torch() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['evaluate.py', '--help']\n"
        "try:\n    runpy.run_path('scripts/evaluate.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'rich', 'PIL'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


def test_bicubic_is_an_upscaler(photos: Path) -> None:
    evaluation_set = open_set(photos, 3)
    (as_function,) = evaluate(Bicubic(3), [evaluation_set], scale=3)
    assert as_function.psnr == score_bicubic(evaluation_set).psnr


@pytest.mark.gpu
def test_the_gpu_scores_in_float32(photos: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    model = loaded(build("edsr_baseline", 2))
    here = evaluate(model, [str(photos)], device="cpu")[0]
    there = evaluate(model, [str(photos)], device="cuda")[0]
    # Pixels on a rounding tie may fall to the other side; TF32 would move every tenth one.
    assert there.psnr == pytest.approx(here.psnr, abs=1e-3)
    assert next(model.network.parameters()).device.type == "cuda"
