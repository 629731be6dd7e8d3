"""Every method through the training's own step: exact resume, seeds, half precision, frozen teachers."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from srkd.methods import METHODS
from srkd.models import save_model
from srkd.networks import ZOO, ZooEntry, build_family
from srkd.recipe import Recipe, load_recipe
from srkd.resuming import restore, state_of
from srkd.step import train_step
from srkd.training import Training, prepare

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from srkd.inputs import Inputs

COMPOSITIONS = ("dukd+mipkd", "dukd+fakd", "logits+at", "dukd+mipkd+at", "mipkd+rkd")
# csd trains its student as a slice of a wider network: its own tests run it.
NAMES = [*(name for name in METHODS if name != "csd"), *COMPOSITIONS]
# Calibration spans the kill; all schedules of MiPKD change within the four steps.
OPTIONS = {
    "rkd": ("method.rkd.calibrate_from=1", "method.rkd.calibrate_to=3"),
    "mipkd": ("method.mipkd.autoencoder_share=0.75", "method.mipkd.feature_norm=rms"),
}
STEPS = 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    sizes = {"channels": 8, "blocks": 6, "scale": 2}
    save_model(folder, build_family("edsr", sizes), {})
    return folder


def recipe_for(name: str, teacher: Path, *changes: str) -> Recipe:
    small = [
        f"method.name={name}",
        "student.network=edsr_tiny",
        "student.scale=2",
        "data.patch=8",
        "train.batch=3",
        f"train.iterations={STEPS}",
        "train.learning_rate=1e-3",
        "train.precision=fp32",
        *(option for part in name.split("+") for option in OPTIONS.get(part, ())),
    ]
    if name not in ("scratch", "pisr"):  # pisr's own teacher has fresh weights here
        small.append(f"teacher.models=['{teacher}']")
    return load_recipe(None, [*small, *changes])


def crops(step: int) -> tuple[Tensor, Tensor]:
    """uint8 crops that depend on the step alone, as a run's do."""
    random = torch.Generator().manual_seed(step)
    lr, hr = (torch.randint(256, (3, 3, px, px), generator=random) for px in (8, 16))
    return lr.to(torch.uint8), hr.to(torch.uint8)


NO_INPUTS = cast("Inputs", SimpleNamespace(data=SimpleNamespace(digest="crops of random numbers")))


def advance(training: Training, until: int) -> list[dict[str, float]]:
    """Train up to a step; returns the terms of each."""
    terms = []
    while training.done < until:
        made = train_step(training, *crops(training.done))
        terms.append({name: value.item() for name, value in made.items()})
    return terms


def saved(training: Training) -> dict[str, Any]:
    """The state as a file gives it back."""
    file = io.BytesIO()
    torch.save(state_of(training, NO_INPUTS), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_is_bit_for_bit_the_same(
    name: str, teacher: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(name, teacher)
    whole = prepare(recipe, "cpu")
    guides = [copy.deepcopy(t.network.state_dict()) for t in whole.teachers]
    first = saved(whole)
    terms = advance(whole, 2)
    middle = saved(whole)
    terms += advance(whole, STEPS)
    last = saved(whole)
    # Student and extra layers (or counters) have moved, the teacher has not.
    assert not same(first["student"], middle["student"])
    assert not first["method"] or not same(first["method"], middle["method"])
    assert all(same(g, t.network.state_dict()) for g, t in zip(guides, whole.teachers, strict=True))

    torch.rand(11)  # somebody else draws numbers in between
    resumed = prepare(recipe, "cpu")
    restore(resumed, NO_INPUTS, middle, tmp_path)
    assert resumed.done == 2
    assert advance(resumed, STEPS) == terms[2:]
    assert same(saved(resumed), last)
    assert all(set(t) == set(terms[0]) for t in terms)


def test_a_state_without_the_method_would_not_be_the_same(teacher: Path, tmp_path: Path) -> None:
    """What the test above would catch: forgotten layers change the steps after the kill."""
    recipe = recipe_for("mipkd", teacher)
    whole = prepare(recipe, "cpu")
    advance(whole, 2)
    middle = saved(whole)
    terms = advance(whole, STEPS)
    resumed = prepare(recipe, "cpu")
    middle["method"] = resumed.method.state_dict()
    restore(resumed, NO_INPUTS, middle, tmp_path)
    assert advance(resumed, STEPS) != terms


@pytest.mark.parametrize("name", ["dukd", "mipkd"])
def test_draws_depend_on_the_seed(name: str, teacher: Path) -> None:
    """The same networks and crops: what differs is what the method draws."""
    terms = []
    for seed in (0, 0, 1):
        first = prepare(recipe_for(name, teacher), "cpu")
        training = prepare(recipe_for(name, teacher, f"seed={seed}"), "cpu")
        training.student.load_state_dict(first.student.state_dict())
        training.method.load_state_dict(first.method.state_dict())
        terms += advance(training, 1)
    assert terms[0] == terms[1]
    own = f"{name}.{'zoom_in' if name == 'dukd' else 'feature'}"
    assert terms[0]["pixel"] == terms[2]["pixel"] and terms[0][own] != terms[2][own]


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_finite(name: str, teacher: Path) -> None:
    training = prepare(recipe_for(name, teacher, "train.precision=bf16"), "cpu")
    (terms,) = advance(training, 1)
    assert all(torch.isfinite(torch.tensor(value)) for value in terms.values())
    exact = prepare(recipe_for(name, teacher), "cpu")
    (expected,) = advance(exact, 1)
    assert terms == pytest.approx(expected, rel=0.05, abs=1e-3)
    kept = [*training.student.parameters(), *training.method.parameters()]
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in kept)


@pytest.mark.parametrize("name", ["dukd", "mipkd", "dukd+mipkd"])
def test_parts_of_a_step_are_averaged(name: str, teacher: Path) -> None:
    """Three micro-batches: each its own draw of images and masks, one optimiser step."""
    changes = ("train.accumulate=3", "train.channels_last=false")
    training = prepare(recipe_for(name, teacher, *changes), "cpu")
    whole = prepare(recipe_for(name, teacher, "train.channels_last=false"), "cpu")
    (terms,), (expected,) = advance(training, 1), advance(whole, 1)
    assert training.done == 1 and set(terms) == set(expected)
    assert terms["pixel"] == pytest.approx(expected["pixel"], rel=1e-5)
    assert terms["logits"] == pytest.approx(expected["logits"], rel=1e-5)


def test_window_students_resume_with_mixers(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stochastic depth inside the rests of the network is part of the state, too."""
    sizes = {"channels": 4, "depths": (1,) * 4, "heads": 2, "drop_path": 0.5}
    monkeypatch.setitem(ZOO, "windows", ZooEntry("swinir", "a toy", sizes))
    recipe = recipe_for("dukd+mipkd", teacher, "student.network=windows")
    whole = prepare(recipe, "cpu")
    advance(whole, 2)
    middle = saved(whole)
    expected = advance(whole, STEPS)
    torch.rand(11)
    resumed = prepare(recipe, "cpu")
    restore(resumed, NO_INPUTS, middle, tmp_path)
    assert advance(resumed, STEPS) == expected
    assert same(saved(resumed), saved(whole))
    # The numbers do matter: with others the same state goes elsewhere.
    other = prepare(recipe, "cpu")
    restore(other, NO_INPUTS, middle, tmp_path)
    torch.rand(11)
    assert advance(other, STEPS) != expected


def test_rkd_calibrates_across_the_kill(teacher: Path) -> None:
    """Otherwise the test of its resume would show nothing."""
    terms = advance(prepare(recipe_for("rkd", teacher), "cpu"), STEPS)
    assert [t["rkd.relations"] > 0 for t in terms] == [False, False, False, True]
