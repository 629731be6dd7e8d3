"""Attribution of an aggregated teacher: one map, index and share for each of its teachers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from scripts.attribute import main, notes
from srkd.aggregate import Aggregate
from srkd.attribution import (
    BlurPath,
    attribute,
    attribute_all,
    attribution,
    heat_map,
    shares,
)
from srkd.attribution_maps import document, heat_picture, input_picture, overlay_picture
from srkd.console import run_command
from srkd.errors import SrkdError
from srkd.images import to_tensor, to_uint8, write_png
from srkd.loaded import LoadedModel
from srkd.models import load_model, save_aggregate, save_model, weights_hash
from srkd.networks import build
from srkd.networks.dctswin import DctSwin, DctSwinConfig
from srkd.types import Facts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HALF = 1 / math.sqrt(2 * math.log(2))  # the sigma whose kernel of 3 px is [1 2 1] / 4
BY_HAND = BlurPath(sigma_max=HALF, steps=2, kernel_px=3)
SHORT = BlurPath(steps=2, kernel_px=5)
FACTS = Facts(scale=2, receptive_field_px=0, exact_tiling=True)
CONFIG = DctSwinConfig(
    teachers=2, scale=2, channels=6, depths=(1,), heads=2, window=4, image_skip="mean"
)


class Nearest(nn.Module):
    """Repeats every pixel, x2, and multiplies it."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, lr: Tensor) -> Tensor:
        return self.gain * lr.repeat_interleave(2, -1).repeat_interleave(2, -2)


class Columns(nn.Module):
    """Column c has the value gain * c^2 / 49, whatever the input of 4x4 px shows."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, lr: Tensor) -> Tensor:
        return (self.gain * torch.arange(8.0) ** 2 / 49).expand(len(lr), 3, 8, 8)


class Only(nn.Module):
    """The image of one teacher, counted from 0."""

    def __init__(self, teacher: int) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, stack: Tensor) -> Tensor:
        return stack.split(3, 1)[self.teacher]


def loaded(network: nn.Module, name: str) -> LoadedModel:
    return LoadedModel(network, name, Path(name), FACTS)


def aggregated(
    *teachers: nn.Module, network: nn.Module | None = None, names: Sequence[str] = "ABC"
) -> LoadedModel:
    """Their plain mean (an untrained network with image_skip = mean), or what `network` makes of them."""
    models = [loaded(t, name) for t, name in zip(teachers, names, strict=False)]
    own = DctSwin(DctSwinConfig(**{**CONFIG.__dict__, "teachers": len(teachers)}))
    aggregate = Aggregate(models, own)
    if network is not None:
        aggregate.network = network  # pyright: ignore[reportAttributeAccessIssue]
    return LoadedModel(aggregate.eval(), "both", Path("both"), aggregate.facts, notes=("a note",))


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_shares_by_hand():
    signed = torch.tensor([[[1.0, -2]], [[3, 0]], [[-1, 1]], [[0, 0]]])
    assert shares(signed, 2) == [0.75, 0.25]
    assert shares(signed, 1) == [0.375, 0.375, 0.25, 0.0]
    assert all(math.isnan(share) for share in shares(torch.zeros(6, 2, 2)))


def test_rows_by_hand():
    """D of the mean of columns that grow is last minus first column, so LAM is their change."""
    model = aggregated(Columns(1.0), Columns(0.5), Columns(0.25))
    rows = attribute_all([model], photo(4, 4), (2, 1, 3), path=BY_HAND)
    assert [row.label for row in rows] == ["both: A", "both: B", "both: C"]
    for row, gain in zip(rows, (1, 0.5, 0.25), strict=True):
        change = (
            gain / 3 * 2 / 49 / 4
        )  # a third of a quarter of the second difference of gain * c^2 / 49
        expected = torch.zeros(3, 8, 8, dtype=torch.float64)
        expected[:, 1:4, 2], expected[:, 1:4, 5] = change, -change
        torch.testing.assert_close(row.attribution.signed, expected, atol=1e-8, rtol=0)
        assert row.heat.share == pytest.approx(gain / 1.75, rel=1e-4)
        # 6 of 64 pixels have all of it, in equal parts.
        torch.testing.assert_close(row.heat.map, (expected[0] != 0).double(), atol=1e-4, rtol=0)
        assert row.heat.diffusion_index == pytest.approx(100 * 6 / 64, abs=0.01)


def test_equal_teachers_have_equal_maps_and_shares():
    lr = photo(9, 10)
    rows = attribute_all([aggregated(Nearest(), Nearest())], lr, (6, 4, 8), path=SHORT)
    alone = attribution(lambda x: x, rows_image(lr), (6, 4, 8), SHORT)
    for row in rows:
        torch.testing.assert_close(row.attribution.signed, alone.signed / 2, atol=1e-6, rtol=0)
        assert row.heat.share == pytest.approx(0.5, abs=1e-6)
        assert row.attribution.rise == pytest.approx(alone.rise, rel=1e-5)
    assert torch.equal(rows[0].heat.map, rows[1].heat.map)


def rows_image(lr: np.ndarray) -> Tensor:
    """The SR image of `Nearest`, (1, 3, H, W)."""
    with torch.no_grad():
        return Nearest()(to_tensor(lr))


@pytest.mark.parametrize("used", [0, 1])
def test_a_teacher_that_is_ignored_has_no_map(used: int):
    lr = photo(8, 9)
    model = aggregated(Nearest(), Nearest(), network=Only(used))
    rows = attribute_all([model], lr, (2, 4, 6), path=SHORT)
    alone = attribution(lambda x: x, rows_image(lr), (2, 4, 6), SHORT)
    own, ignored = rows[used], rows[1 - used]
    assert torch.equal(own.attribution.signed, alone.signed) and own.heat.share == 1
    assert torch.equal(own.heat.map, heat_map(alone.signed)) and own.heat.known
    assert not ignored.heat.map.any() and ignored.heat.share == 0 and not ignored.heat.known
    values = {m["teacher"]: m for m in document(rows, "x.png", SHORT, hr=False)["models"]}
    assert values["AB"[used]]["share"] == 1 and values["AB"[1 - used]]["share"] == 0
    assert values["AB"[1 - used]]["attributed"] == 0
    assert values["A"]["rise"] == values["B"]["rise"] == alone.rise


def test_one_pass_of_the_teachers_and_one_gradient_for_all():
    teachers = Nearest(), Nearest(0.5), Nearest(0.2)
    model = aggregated(*teachers)
    assert isinstance(model.network, Aggregate)
    calls: list[tuple[str, tuple[int, ...], bool]] = []

    def noted(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        return lambda _, x, sr: calls.append((name, tuple(x[0].shape), sr.requires_grad))

    for name, module in zip("ABC", teachers, strict=True):
        module.gain.requires_grad_()
        module.register_forward_hook(noted(name))
    model.network.network.register_forward_hook(noted("network"))
    attribute_all([model], photo(8, 8), (4, 4, 8), path=BlurPath(steps=3), batch=2)
    assert calls == [
        *((name, (1, 3, 8, 8), False) for name in "ABC"),
        ("network", (1, 9, 16, 16), False),  # the most blurred one, for `rise`
        ("network", (2, 9, 16, 16), True),
        ("network", (1, 9, 16, 16), True),
    ]
    assert all(t.gain.grad is None and t.gain.requires_grad for t in teachers)


def test_blur_and_window_are_in_sr_pixels():
    """A kernel of 9 px needs 5 px a side: LR images of 4 px have 8 SR pixels, and a window of 8 fits."""
    model = aggregated(Nearest(), Nearest())
    rows = attribute_all([model], photo(4, 4), (0, 0, 8), path=BlurPath(steps=2))
    assert [row.heat.map.shape for row in rows] == [(8, 8), (8, 8)]
    with pytest.raises(SrkdError, match="not inside the output, which is 8x8 px; it needs x <= 4"):
        attribute_all([model], photo(4, 4), (5, 0, 4))


def test_beside_a_network_each_keeps_its_own_rows():
    lr, seen = photo(8, 8), []
    network = loaded(Nearest(), "nearest")
    model = aggregated(Nearest(), Nearest(0.5))
    rows = attribute_all(
        [network, model, network], lr, (2, 4, 6), path=SHORT, progress=lambda *n: seen.append(n)
    )
    assert [row.teacher for row in rows] == ["", "A", "B", ""]
    alone = attribute(network, lr, (2, 4, 6), path=SHORT)
    assert alone.label == "nearest" and alone.heat.share == 1
    for row in (rows[0], rows[3]):
        assert torch.equal(row.attribution.signed, alone.attribution.signed)
    assert rows[0].heat.map.shape == (8, 8) and rows[1].heat.map.shape == (16, 16)
    assert seen == [(done, 6) for done in range(1, 7)]


def test_teachers_of_one_name_are_told_apart_by_their_place():
    model = aggregated(Nearest(), Nearest(), Nearest(), names=("x4", "edsr", "x4"))
    rows = attribute_all([model], photo(8, 8), (2, 4, 6), path=SHORT)
    assert [row.label for row in rows] == ["both: 1 x4", "both: edsr", "both: 3 x4"]


def test_one_map_is_refused_for_an_aggregated_teacher():
    with pytest.raises(SrkdError, match=r"both is an aggregated teacher.*\(A, B\).*attribute_all"):
        attribute(aggregated(Nearest(), Nearest()), photo(8, 8), (2, 4, 6), path=SHORT)


def test_overlay_lies_over_the_teachers_own_image():
    lr = photo(8, 8)
    model = aggregated(Nearest(), Nearest(0.5), network=Only(0))
    first, ignored = attribute_all([model], lr, (4, 4, 8), path=SHORT)
    # A zero map is black, half of which leaves half of the grey image.
    grey = np.asarray(Image.fromarray(to_uint8(rows_image(lr) / 2)).convert("L"))
    inside = np.zeros((16, 16), bool)
    inside[3:13, 3:13] = True  # the frame is among these
    shown = overlay_picture(ignored)
    assert shown.shape == (16, 16, 3) and not heat_picture(ignored).any()
    assert np.abs(shown[~inside] - grey[~inside, None] / 2).max() <= 1
    lighter = np.asarray(Image.fromarray(to_uint8(rows_image(lr))).convert("L"))
    assert np.abs(overlay_picture(first)[0] - lighter[0, :, None] / 2).max() <= 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers at x2, `stage1` that aggregates them, and a picture of 27x23 px."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        save_model(folder / name, build("edsr_tiny", 2), {})
    teachers = [load_model(folder / name) for name in ("one", "two")]
    hashes = [weights_hash(teacher) for teacher in teachers]
    save_aggregate(folder / "stage1", DctSwin(CONFIG), teachers, hashes, {})
    places = [str(folder / name) for name in ("one", "two")]
    (folder / "stage1" / "recipe.toml").write_text(f"[teacher]\nmodels = {places}\n")
    write_png(folder / "large.png", photo(23, 27))
    return folder


def test_the_command_writes_a_map_for_each_teacher(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    models = [str(place / name) for name in ("stage1", "one")]
    ask = [*models, str(place / "large.png"), "--hr", "--window", "4,2,8", "--steps", "2"]
    assert main([*ask, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    out = tmp_path / "attribution" / f"large_{place.name}_stage1_one_4_2_8"
    names = (f"{place.name}_stage1_one", f"{place.name}_stage1_two", "one")
    pictures = {f"{name}_{what}.png" for name in names for what in ("map", "overlay")}
    assert {p.name for p in out.iterdir()} == pictures | {"attribution.json", "side_by_side.png"}
    for name in names:
        with Image.open(out / f"{name}_overlay.png") as picture:
            assert picture.size == (26, 22)
    described = json.loads((out / "attribution.json").read_text())
    first, second, plain = described["models"]
    assert [m["model"] for m in (first, second, plain)] == [
        *(f"{place.name}/stage1: one", f"{place.name}/stage1: two"),
        "one",
    ]
    assert [first["teacher"], second["teacher"]] == ["one", "two"]
    assert "share" not in plain and "teacher" not in plain
    assert first["share"] + second["share"] == pytest.approx(1)
    rows = attribute_all(models, place / "large.png", (4, 2, 8), hr=True, path=BlurPath(steps=2))
    assert [m["attributed"] for m in described["models"]] == pytest.approx(
        [row.attribution.signed.sum().item() for row in rows]
    )
    with Image.open(out / "side_by_side.png") as sheet:
        pixels = np.asarray(sheet)[24:, 8:]  # after the titles
    for panel, picture in enumerate([input_picture(rows[0]), *map(overlay_picture, rows)]):
        left = panel * (2 * 26 + 8)  # twice as large, and a gap
        assert (pixels[: 2 * 22 : 2, left : left + 2 * 26 : 2] == picture).all()
    info = json.loads((place / "stage1" / "model.json").read_text())
    assert first["weights_sha256"] == second["weights_sha256"] == info["weights_sha256"]
    for m in (first, second):
        assert f"{m['diffusion_index']:.2f}" in said and f"{m['share']:.3f}" in said
    assert said.count("compare these indices among themselves") == 1
    assert (
        main([str(place / "one"), *ask[2:], "--device", "cpu", "--out", str(tmp_path / "o")]) == 0
    )
    assert "share" not in capsys.readouterr().out


def test_what_is_said_of_an_aggregated_teacher():
    lr, model = photo(8, 8), aggregated(Nearest(), Nearest(), network=Only(0))
    rows = attribute_all([model], lr, (2, 4, 6), path=SHORT)
    assert notes(rows) == [
        "both: a note",
        "both: B: nothing of this image takes part, so there is no index",
    ]
    flat = attribute_all([model], np.full_like(lr, 77), (2, 4, 6), path=SHORT)
    assert notes(flat)[1:] == [
        "both: no pixel takes part, so there is no index; choose a window with some texture"
    ]
    assert all(math.isnan(row.heat.share) for row in flat)


def test_a_window_outside_ends_in_a_sentence(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ask = [str(place / "stage1"), str(place / "large.png"), "--hr", "--window", "12,10,16"]
    assert run_command(main, [*ask, "--quiet", "--out", str(tmp_path / "out")]) == 2
    assert "the output, which is 26x22 px; it needs x <= 10 and y <= 6" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
