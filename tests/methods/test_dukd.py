"""DUKD: the augmentation and its inverse, the two zooms, the terms, the released settings."""

from __future__ import annotations

import copy
import itertools
import tomllib
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_pair import (
    Nearest,
    count_runs,
    images,
    part_of,
    step_of,
    student_of,
    teacher_of,
    training_of,
)
from torch import Tensor, nn

import srkd.methods.dukd
from srkd.data.degradation import downscale
from srkd.errors import SrkdError
from srkd.methods import plan
from srkd.methods.base import l1
from srkd.methods.dukd import Dukd, DukdConfig, augment, undo
from srkd.recipe import load_recipe, recipe_from
from srkd.step import loss_terms
from srkd.types import Batch, Pass, Setting, Step, View

# All 16 combinations of inversion, flip of the height, flip of the width, transpose.
ALL = torch.tensor(list(itertools.product((False, True), repeat=4)))


def dukd(**options: Any) -> Dukd:
    """Without networks of ours, where the method reads nothing from them."""
    return Dukd(DukdConfig(**options), nn.Identity(), (nn.Identity(),))


def undo_in_apply_order(image: Tensor, operations: Tensor) -> Tensor:
    """The mistake of the released files: the first operation is undone first."""
    return augment(image, operations)


# -- the augmentation and its inverse ---------------------------------------------------------------


def test_augmentation_by_hand() -> None:
    image = torch.tensor([[0.25, 0.5], [0.75, 1.0]]).expand(1, 3, 2, 2)
    expected = {
        (True, False, False, False): [[0.75, 0.5], [0.25, 0.0]],
        (False, True, False, False): [[0.75, 1.0], [0.25, 0.5]],
        (False, False, True, False): [[0.5, 0.25], [1.0, 0.75]],
        (False, False, False, True): [[0.25, 0.75], [0.5, 1.0]],
        # Flip of the height, then transpose: a quarter turn.
        (False, True, False, True): [[0.75, 0.25], [1.0, 0.5]],
    }
    for operations, values in expected.items():
        made = augment(image, torch.tensor([operations]))
        assert torch.equal(made, torch.tensor(values).expand(1, 3, 2, 2)), operations


def test_every_combination_is_undone() -> None:
    image, _ = images(1, px=5, levels=256)
    augmented = augment(image.expand(16, 3, 5, 5), ALL)
    assert len(torch.unique(augmented, dim=0)) == 16  # they all differ,
    assert torch.equal(undo(augmented, ALL), image.expand(16, 3, 5, 5))  # and all come back


def test_undoing_in_apply_order_fails_for_transpose_with_one_flip_alone() -> None:
    image, _ = images(1, px=5, levels=256)
    image = image.expand(16, 3, 5, 5)
    back = undo_in_apply_order(augment(image, ALL), ALL)
    wrong = (back != image).flatten(1).any(1)
    _, h, v, t = ALL.unbind(1)
    assert torch.equal(wrong, t & (h ^ v))
    # At p = 0.3 that is 0.3 * 2 * 0.3 * 0.7 = 0.126 of all samples.
    chance = torch.where(ALL, 0.3, 0.7).prod(1)
    assert chance[wrong].sum().item() == pytest.approx(0.126)


def test_nearest_neighbours_as_both_networks_give_zero_for_every_combination(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Dukd, "_operations", lambda *_: ALL)
    training = training_of("dukd", Nearest(), Nearest())
    lr, hr = images(16, px=6)
    terms = loss_terms(training, lr, hr)
    assert terms["logits"].item() == 0
    assert terms["dukd.zoom_in"].item() < 1e-6
    assert terms["dukd.zoom_out"].item() < 1e-6
    monkeypatch.setattr(srkd.methods.dukd, "undo", undo_in_apply_order)
    terms = loss_terms(training, lr, hr)
    assert terms["dukd.zoom_in"].item() > 0.01
    assert terms["dukd.zoom_out"].item() > 0.01


def draws(
    method: Dukd, name: str = "zoom_in", count: int = 64, seed: int = 0, at: int = 0, part: int = 0
) -> Tensor:
    batch = Batch(torch.zeros(1), torch.zeros(1), iteration=at, part=part, seed=seed)
    operations = method._operations(batch, name, count, torch.device("cpu"))
    assert operations is not None
    return operations


def test_operations_are_drawn_independently_at_their_probability() -> None:
    drawn = torch.cat([draws(dukd(), at=i) for i in range(100)]).double()  # 6400 samples
    assert torch.allclose(drawn.mean(0), torch.full((4,), 0.3).double(), atol=0.03)
    # No operation says anything about another, nor one sample about the next: 0.3 * 0.3.
    together = drawn.T @ drawn / len(drawn)
    assert all(abs(together[a, b] - 0.09) < 0.02 for a in range(4) for b in range(4) if a != b)
    neighbours = (drawn[1:] * drawn[:-1]).mean(0)
    assert torch.allclose(neighbours, torch.full((4,), 0.09).double(), atol=0.02)


def test_operations_depend_on_seed_iteration_part_and_view_alone() -> None:
    method = dukd()
    first = draws(method)
    torch.rand(5)  # somebody else's random numbers
    assert torch.equal(first, draws(method))
    others = [draws(method, seed=1), draws(method, at=1), draws(method, part=1)]
    assert not any(torch.equal(first, other) for other in [*others, draws(method, "zoom_out")])


# -- the views --------------------------------------------------------------------------------------


def numbered(count: int = 8, px: int = 6) -> Tensor:
    """(count, 3, px, px): no two pixels of one channel are equal."""
    values = torch.arange(count * px * px).view(count, 1, px, px)
    return torch.cat([values, values + 0.25, values + 0.5], 1) / 1024


@pytest.mark.parametrize("crop", ["random", "tile"])
def test_zoom_in_takes_pixels_of_the_hr_image_as_they_are(crop: str) -> None:
    method, hr = dukd(crop=crop), numbered()
    corners = set()
    for iteration in range(20):
        view = method.views(Batch(torch.zeros(8, 3, 3, 3), hr, iteration=iteration))["zoom_in"]
        assert view.student.shape == view.teacher.shape == (8, 3, 3, 3)
        for image, cut in zip(hr, view.teacher, strict=True):
            ((top, left),) = (image[0] == cut[0, 0, 0]).nonzero().tolist()
            assert torch.equal(cut, image[:, top : top + 3, left : left + 3])
            corners.add((top, left))
    steps = range(4) if crop == "random" else (0, 3)
    assert corners == set(itertools.product(steps, steps))


def test_two_crops_of_each_image() -> None:
    lr, hr = torch.zeros(4, 3, 3, 3), numbered(4)
    view = dukd(crops=2).views(Batch(lr, hr))["zoom_in"]
    assert view.teacher.shape == view.student.shape == (8, 3, 3, 3)
    of_image = (view.teacher[:, 0, 0, 0] * 1024).div(36, rounding_mode="floor").tolist()
    assert of_image == [0, 0, 1, 1, 2, 2, 3, 3]
    terms = loss_terms(training_of("dukd", Nearest(), Nearest(), crops=2), *images(2))
    assert terms["dukd.zoom_in"].item() < 1e-6


def test_only_the_student_sees_the_augmentation() -> None:
    lr, hr = images(8, levels=256)
    batch = Batch(lr, hr)
    method = dukd()
    views = method.views(batch)
    for name, view in views.items():
        operations = draws(method, name, 8)
        assert torch.allclose(undo(view.student, operations), view.teacher, atol=1e-6)
        changed = (view.student != view.teacher).flatten(1).any(1)
        assert torch.equal(changed, operations.any(1))
    clean = dukd(augment="none").views(batch)
    assert all(torch.equal(clean[n].teacher, view.teacher) for n, view in views.items())
    assert all(torch.equal(view.student, view.teacher) for view in clean.values())
    zoom_in_only = dukd(augment="zoom_in").views(batch)
    assert torch.equal(zoom_in_only["zoom_in"].student, views["zoom_in"].student)
    assert torch.equal(zoom_in_only["zoom_out"].student, views["zoom_out"].teacher)


def test_inversion_acts_on_images_in_0_to_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the network's mean subtraction and range, and undone after them."""
    inverted = torch.tensor([[True, False, False, False]]).expand(2, 4)
    monkeypatch.setattr(Dukd, "_operations", lambda *_: inverted)
    student, teacher = student_of("edsr"), teacher_of("edsr", 0)
    training = training_of("dukd", student, teacher)
    lr, hr = images()
    step = step_of(training, lr, hr)
    crops = part_of(training, "dukd").views(step.batch)["zoom_in"]
    assert torch.equal(crops.student, 1 - crops.teacher)
    expected = l1(1 - student(1 - crops.teacher), teacher(crops.teacher))
    assert loss_terms(training, lr, hr)["dukd.zoom_in"].item() == pytest.approx(expected.item())
    assert expected.item() > 0


def test_zoom_out_is_the_bicubic_of_the_data() -> None:
    lr, hr = images(px=12, scale=3)
    view = dukd(augment="none").views(Batch(lr, hr))["zoom_out"]
    assert torch.equal(view.teacher, downscale(lr, 3))
    assert view.teacher.shape == (2, 3, 4, 4)
    # By hand: weights sum to 1, and pixel i of a ramp lies between pixels 2i and 2i + 1 inside.
    ramp = torch.arange(16.0).expand(1, 3, 16, 16)
    flat = torch.full((1, 3, 16, 16), 0.375)
    batch = Batch(torch.cat([ramp, flat]), torch.zeros(2, 3, 32, 32))
    made = dukd(augment="none").views(batch)["zoom_out"].student
    assert torch.allclose(made[0, :, :, 2:6], torch.tensor([4.5, 6.5, 8.5, 10.5]))
    assert torch.allclose(made[1], torch.tensor(0.375))


def test_zoomed_out_images_come_back_at_the_size_of_lr() -> None:
    training = training_of("dukd", student_of("edsr"), teacher_of("edsr"))
    step = step_of(training, *images())
    view = step.views["dukd.zoom_out"]
    assert view.student.sr.shape == view.teacher.sr.shape == step.lr.shape
    assert step.views["dukd.zoom_in"].student.sr.shape == step.hr.shape


def test_a_patch_that_the_scale_does_not_divide() -> None:
    student, teacher = student_of("edsr", scale=3), teacher_of("edsr", scale=3)
    lr, hr = images(px=7, scale=3)
    options = {"augment": "none", "zoom_out_pixel_weight": 1.0}
    terms = loss_terms(training_of("dukd", student, teacher, **options), lr, hr)
    small = downscale(lr[..., :6, :6], 3)  # 7 px become 2, whose output has 6
    assert terms["dukd.zoom_out"].item() == pytest.approx(l1(student(small), teacher(small)).item())
    expected = l1(student(small), lr[..., :6, :6]).item()
    assert terms["dukd.zoom_out_pixel"].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [(4, 3, 8, 8), (2, 3, 4, 4)]),
        ({"crops": 3}, [(8, 3, 8, 8), (2, 3, 4, 4)]),
        ({"zoom_out": "off"}, [(4, 3, 8, 8)]),
        ({"zoom_out_weight": 0.0}, [(4, 3, 8, 8)]),
        ({"zoom_in_weight": 0.0}, [(2, 3, 8, 8), (2, 3, 4, 4)]),
        ({"zoom_in_weight": 0.0, "zoom_out_weight": 0.0}, [(2, 3, 8, 8)]),
        ({"zoom_out_weight": 0.0, "zoom_out_pixel_weight": 1.0}, [(4, 3, 8, 8), (2, 3, 4, 4)]),
    ],
)
def test_a_view_without_weight_is_not_run(
    options: dict[str, Any], sizes: list[tuple[int, ...]]
) -> None:
    student, teacher = student_of("edsr"), teacher_of("edsr")
    training = training_of("dukd", student, teacher, **options)
    seen = [count_runs(network) for network in (student, teacher)]
    loss_terms(training, *images())
    assert seen == [sizes, sizes]


# -- the terms --------------------------------------------------------------------------------------


def constant(value: float, px: int = 4) -> Pass:
    return Pass(network=nn.Identity(), sr=torch.full((1, 3, px, px), value))


def constant_step() -> Step:
    batch = Batch(torch.full((1, 3, 2, 2), 0.75), torch.full((1, 3, 4, 4), 0.25))
    views = {
        "zoom_in": View(constant(0.75), (constant(0.25),)),
        "zoom_out": View(constant(0.5, 2), (constant(0.375, 2),)),
    }
    return Step(batch, constant(0.5), (constant(0.375),), views)


def test_terms_by_hand() -> None:
    method = dukd(
        pixel_weight=2.0,
        logits_weight=3.0,
        zoom_in_weight=4.0,
        zoom_out_weight=5.0,
        zoom_out_pixel_weight=6.0,
        augment="none",
    )
    terms = {name: value.item() for name, value in method.loss(constant_step()).items()}
    assert terms == {
        "pixel": 0.5,  # 2 * |0.5 - 0.25|
        "logits": 0.375,  # 3 * |0.5 - 0.375|
        "zoom_in": 2.0,  # 4 * |0.75 - 0.25|
        "zoom_out": 0.625,  # 5 * |0.5 - 0.375|
        "zoom_out_pixel": 1.5,  # 6 * |0.5 - 0.75|
    }


def test_output_is_inverted_back_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dukd, "_operations", lambda *_: ALL[8:9])  # the inversion alone
    terms = dukd().loss(constant_step())
    assert terms["zoom_in"].item() == 0  # |1 - 0.75 - 0.25|
    assert terms["zoom_out"].item() == 0.125  # |1 - 0.5 - 0.375|


def test_student_equal_to_its_teacher_copies_it_everywhere() -> None:
    teacher = teacher_of("edsr")
    student = copy.deepcopy(teacher).requires_grad_(True)
    terms = loss_terms(training_of("dukd", student, teacher, augment="none"), *images())
    assert terms.pop("pixel").item() > 0
    assert {name: value.item() for name, value in terms.items()} == {
        "logits": 0,
        "dukd.zoom_in": 0,
        "dukd.zoom_out": 0,
    }
    # It need not copy itself on turned images: the augmentation is what it learns from.
    augmented = training_of("dukd", student, teacher, probability=1.0)
    assert loss_terms(augmented, *images())["dukd.zoom_in"].item() > 0


ABLATION: dict[str, tuple[str, dict[str, Any], set[str], bool]] = {
    # row: method, options, terms, whether the student's input is augmented
    "scratch": ("scratch", {}, {"pixel"}, False),
    "logits": ("logits", {}, {"pixel", "logits"}, False),
    "fakd": ("fakd", {}, {"pixel", "logits", "fakd.affinity"}, False),
    "zoom in": (
        "dukd",
        {"zoom_out": "off", "augment": "none"},
        {"pixel", "logits", "dukd.zoom_in"},
        False,
    ),
    "zoom out": (
        "dukd",
        {"zoom_in_weight": 0.0, "augment": "none"},
        {"pixel", "logits", "dukd.zoom_out"},
        False,
    ),
    "both": (
        "dukd",
        {"augment": "none"},
        {"pixel", "logits", "dukd.zoom_in", "dukd.zoom_out"},
        False,
    ),
    "zoom in + DA": ("dukd", {"zoom_out": "off"}, {"pixel", "logits", "dukd.zoom_in"}, True),
    "both + DA": ("dukd", {}, {"pixel", "logits", "dukd.zoom_in", "dukd.zoom_out"}, True),
}


@pytest.mark.parametrize("row", list(ABLATION))
def test_rows_of_the_ablation(row: str) -> None:
    name, options, expected, augmented = ABLATION[row]
    training = training_of(name, student_of("edsr"), teacher_of("edsr"), **options)
    lr, hr = images(8)
    assert set(loss_terms(training, lr, hr)) == expected
    views = training.method.views(Batch(lr, hr)).values()
    assert any(not torch.equal(v.student, v.teacher) for v in views) == augmented


PAIRS: dict[str, tuple[nn.Module, Any]] = {
    "edsr to rcan": (student_of("rcan"), teacher_of("edsr")),
    "swinir to rcan": (student_of("rcan"), teacher_of("swinir")),
    "rcan to swinir": (student_of("swinir"), teacher_of("rcan")),
    "foreign to edsr": (student_of("edsr"), Nearest()),
}


@pytest.mark.parametrize("pair", list(PAIRS))
def test_any_teacher_teaches_any_student(pair: str) -> None:
    student, teacher = copy.deepcopy(PAIRS[pair])
    before = copy.deepcopy(teacher.state_dict())
    training = training_of("dukd", student, teacher, pixel_weight=0.0, logits_weight=0.0)
    terms = loss_terms(training, *images())
    assert ("dukd.zoom_out" in terms) == ("swinir" not in pair)
    torch.stack(list(terms.values())).sum().backward()
    for label, p in student.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, label
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


# -- window networks, refusals ----------------------------------------------------------------------


def setting(patch_px: int) -> Setting:
    return Setting(patch_px=patch_px, batch=2, iterations=10, memory=2**30)


@pytest.mark.parametrize(("student", "teacher"), [("swinir", "edsr"), ("edsr", "swinir")])
def test_window_networks_do_not_zoom_out_unless_told_to(student: str, teacher: str) -> None:
    pair = student_of(student), teacher_of(teacher)
    usual = training_of("dukd", *pair)
    assert usual.method.check(setting(8)) == (
        "dukd: no zoom-out: a network of the pair has windows, as in the paper",
    )
    assert set(loss_terms(usual, *images())) == {"pixel", "logits", "dukd.zoom_in"}
    forced = training_of("dukd", *pair, zoom_out="on")
    assert forced.method.check(setting(24)) == ()
    assert "dukd.zoom_out" in loss_terms(forced, *images())
    told = training_of("dukd", *pair, zoom_out="off")
    assert told.method.check(setting(8)) == ()


def test_patch_that_cannot_be_made_smaller_is_refused_before_the_training() -> None:
    # Windows of 4 px can pad images of 3 px or more: 2 * 3.
    forced = training_of("dukd", student_of("swinir"), teacher_of("edsr"), zoom_out="on")
    (note,) = forced.method.check(setting(6))
    assert "zoomed-out crops are 3 px, the paper's smallest 12" in note
    assert forced.method.check(setting(24)) == ()  # 12 px
    loss_terms(forced, *images(px=6))
    with pytest.raises(SrkdError, match=r"data\.patch = 5, .* at least 6 .*zoom_out=off"):
        forced.method.check(setting(5))


def test_auto_leaves_zoom_out_away_where_the_crop_is_too_small_and_says_so() -> None:
    pair = student_of("edsr", scale=4), teacher_of("rcan", scale=4)
    plain = training_of("dukd", *pair)
    (note,) = plain.method.check(setting(4))
    assert "crops are 1 px" in note
    assert "dukd.zoom_out" in loss_terms(plain, *images(px=4, scale=4))
    (note,) = plain.method.check(setting(3))
    assert "needs LR crops of 4 px, and data.patch is 3" in note
    assert "dukd.zoom_out" not in loss_terms(plain, *images(px=3, scale=4))


def test_more_crops_than_memory_holds_are_refused() -> None:
    # One image at x4: 2 (networks) * (1 + 4 * 4) * 3 channels * 4 bytes * 8 * 8 = 26,112 bytes.
    method = dukd(crops=3, zoom_out="off")
    fits = Setting(patch_px=8, batch=2, iterations=10, memory=26_112 * 2 * 3)
    assert method.check(fits) == ()
    with pytest.raises(SrkdError, match="makes 6 more images a step"):
        method.check(replace(fits, memory=fits.memory - 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 1.5}, r"a probability lies in 0\.\.1"),
        ({"crops": 0}, "at least one crop is needed.*zoom_in_weight=0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SrkdError, match=message):
        dukd(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "releasd"}, "did you mean 'released'"),
        ({"crop": "grid"}, "method.dukd.crop = 'grid'"),
        ({"zoom_in_weight": -1.0}, "a finite number of 0 or above"),
        ({"crops": 1.5}, "int is needed"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SrkdError, match=message):
        plan("dukd", options)


# -- the released settings --------------------------------------------------------------------------

# (family, scale): pixel weight, zoom-out, probability, crops of each image
RELEASED = {
    ("edsr", 2): (5.0, "on", 0.3, 2),
    ("edsr", 3): (5.0, "on", 0.3, 1),
    ("edsr", 4): (5.0, "on", 0.3, 1),
    ("rcan", 2): (1.0, "off", 0.0, 1),
    ("rcan", 3): (2.0, "on", 0.3, 1),
    ("rcan", 4): (1.0, "off", 0.0, 1),
    ("swinir", 2): (5.0, "off", 0.3, 1),
    ("swinir", 3): (5.0, "off", 0.3, 1),
    ("swinir", 4): (5.0, "off", 0.3, 1),
}


@pytest.mark.parametrize(("family", "scale"), list(RELEASED))
def test_released_settings(family: str, scale: int) -> None:
    pixel, zoom_out, probability, crops = RELEASED[family, scale]
    assert plan("dukd", {"preset": "released"}, family, scale).configs["dukd"] == DukdConfig(
        preset="released",
        pixel_weight=pixel,
        logits_weight=1.0,
        zoom_in_weight=1.0,
        zoom_out_weight=1.0,
        zoom_out=zoom_out,
        zoom_out_pixel_weight=pixel if zoom_out == "on" else 0.0,
        augment="zoom_in",
        probability=probability,
        crop="tile",
        crops=crops,
    )


def test_paper_settings_are_the_default() -> None:
    assert plan("dukd", {"preset": "paper"}, "edsr", 2) == plan("dukd", {})


def test_options_set_by_hand_win_over_the_preset() -> None:
    options = {"preset": "released", "crops": 3, "dukd": {"pixel_weight": 2}}
    config = plan("dukd", options, "edsr", 2).configs["dukd"]
    assert (config.crops, config.pixel_weight, config.crop) == (3, 2.0, "tile")


def test_released_recipe_is_saved_resolved() -> None:
    chosen = ["method.name=dukd", "method.preset=released", "method.crops=3"]
    recipe = load_recipe(None, [*chosen, "student.network=edsr_tiny", "student.scale=2"])
    config = recipe.method.configs["dukd"]
    assert (config.pixel_weight, config.crops) == (5.0, 3)
    assert recipe_from(tomllib.loads(recipe.to_toml())) == recipe


def test_released_settings_train() -> None:
    training = training_of("dukd", student_of("edsr"), teacher_of("edsr"), preset="released")
    terms = loss_terms(training, *images())
    assert set(terms) == {
        *("pixel", "logits"),
        *("dukd.zoom_in", "dukd.zoom_out", "dukd.zoom_out_pixel"),
    }


def test_released_preset_of_another_family_is_refused() -> None:
    with pytest.raises(
        SrkdError, match="is known for students of edsr, rcan, swinir, not of 'bsrn'"
    ):
        plan("dukd", {"preset": "released"}, "bsrn", 4)
