"""`dukd+mipkd`: several methods over one set of passes, and what is refused."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_pair import Nearest, images, part_of, step_of, student_of, teacher_of, training_of

from srkd.errors import SrkdError
from srkd.methods import check_teachers, make, plan
from srkd.step import loss_terms
from srkd.types import Batch, Setting

if TYPE_CHECKING:
    from srkd.training import Training

# composition -> its terms
TERMS = {
    "dukd+mipkd": {"dukd.zoom_in", "dukd.zoom_out"}
    | {"mipkd.feature", "mipkd.block", "mipkd.autoencoder"},
    "mipkd+dukd": {"dukd.zoom_in", "dukd.zoom_out"}
    | {"mipkd.feature", "mipkd.block", "mipkd.autoencoder"},
    "dukd+fakd": {"dukd.zoom_in", "dukd.zoom_out", "fakd.affinity"},
    "logits+at": {"at.attention"},
    "dukd+mipkd+at": {"dukd.zoom_in", "dukd.zoom_out", "at.attention"}
    | {"mipkd.feature", "mipkd.block", "mipkd.autoencoder"},
}


def pair_for(name: str, **options: Any) -> Training:
    return training_of(name, student_of("edsr"), teacher_of("edsr", channels=6), **options)


def alone(training: Training, part: str) -> Training:
    """The same networks and the same extra layers with one method of the composition."""
    single = copy.copy(training)
    single.method = make(
        plan(part, vars(training.recipe.method.configs[part])),
        training.student,
        (training.teachers[0].network,),
    )
    layers = part_of(training, part).state_dict()
    part_of(single, part).load_state_dict(copy.deepcopy(layers))
    return single


@pytest.mark.parametrize("name", list(TERMS))
def test_terms_are_those_of_the_parts_with_shared_ones_once(name: str) -> None:
    training = pair_for(name)
    lr, hr = images(4)
    together = loss_terms(training, lr, hr)
    assert set(together) == {"pixel", "logits"} | TERMS[name]
    union: dict[str, torch.Tensor] = {}
    for part in name.split("+"):
        union |= loss_terms(alone(training, part), lr, hr)
    assert set(union) == set(together)
    for term, value in together.items():
        assert value.item() == pytest.approx(union[term].item(), rel=1e-4), term
        assert value.item() > 0
    totals = [sum(value.item() for value in terms.values()) for terms in (together, union)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


@pytest.mark.parametrize("name", list(TERMS))
def test_gradients_reach_the_student_and_all_extra_layers(name: str) -> None:
    training = pair_for(name)
    lr, hr = images(4)
    for iteration in range(10):
        training.done = iteration
        torch.stack(list(loss_terms(training, lr, hr).values())).sum().backward()
    for label, p in [*training.student.named_parameters(), *training.method.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), label
    assert all(p.grad is None for p in training.teachers[0].network.parameters())


def test_views_bear_the_name_of_their_part() -> None:
    training = pair_for("mipkd+dukd")
    lr, hr = images()
    views = training.method.views(Batch(lr, hr))
    assert list(views) == ["dukd.zoom_in", "dukd.zoom_out"]
    assert list(step_of(training, lr, hr).views) == list(views)
    single = part_of(training, "dukd").views(Batch(lr, hr))
    for name, view in single.items():
        assert torch.equal(views[f"dukd.{name}"].student, view.student)


def test_a_composition_draws_what_its_parts_draw_alone() -> None:
    """Random numbers have names, so that a second method does not move those of the first."""
    lr, hr = images()
    batch = Batch(lr, hr, iteration=3, seed=5)
    views = [pair_for(name).method.views(batch) for name in ("dukd", "mipkd+dukd+at")]
    assert views[0].keys() == views[1].keys()
    assert all(torch.equal(views[0][n].student, views[1][n].student) for n in views[0])


def test_taps_of_all_parts_are_read_once() -> None:
    method = pair_for("mipkd+at+crosskd").method
    assert method.student_taps == method.teacher_taps == ("block1", "block3", "body", "block2")
    assert pair_for("dukd").method.student_taps == ()


def test_a_shared_weight_is_the_first_methods_unless_set_by_hand() -> None:
    released = {"dukd": {"preset": "released"}}
    for name, options, pixel in (
        ("dukd+mipkd", released, 5.0),
        ("mipkd+dukd", released, 1.0),
        ("mipkd+dukd", {"dukd": {"preset": "released", "pixel_weight": 3.0}}, 3.0),
        ("dukd+mipkd", {**released, "pixel_weight": 2.0}, 2.0),
    ):
        training = pair_for(name, **options)
        weights = {c.pixel_weight for c in training.recipe.method.configs.values()}
        assert weights == {pixel}
        lr, hr = images()
        expected = pixel * (training.student(lr) - hr).abs().mean().item()
        found = loss_terms(training, lr, hr)["pixel"].item()
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_term_that_the_first_method_lacks_comes_from_the_next() -> None:
    terms = loss_terms(pair_for("crosskd+logits"), *images())
    assert {"pixel", "logits"} <= set(terms)
    assert not any(name.endswith((".pixel", ".logits")) for name in terms)


def test_layers_of_parts_are_kept_apart() -> None:
    training = pair_for("mipkd+crosskd")
    names = {n.split(".")[1] for n, _ in training.method.named_parameters()}
    assert names == {"mipkd", "crosskd"}


def test_notes_and_refusals_of_parts_bear_their_name() -> None:
    training = training_of("dukd+logits", student_of("swinir"), teacher_of("edsr"))
    setting = Setting(patch_px=8, batch=2, iterations=10, memory=2**30)
    (note,) = training.method.check(setting)
    assert note.startswith("dukd: no zoom-out")
    mixed = training_of("dukd+mipkd", student_of("swinir"), teacher_of("edsr"))
    with pytest.raises(SrkdError, match=r"make data\.patch a multiple of 4"):
        mixed.method.check(Setting(patch_px=6, batch=2, iterations=10, memory=2**30))


@pytest.mark.parametrize(
    ("name", "ours", "message"),
    [
        ("dukd+mipkd", [], "method 'dukd' needs a teacher"),
        ("dukd+mipkd", [True, True], "method 'dukd' takes 1 teacher, got 2"),
        ("dukd+mipkd", [False], r"method 'mipkd' reads features.*work: .*dukd"),
    ],
)
def test_teachers_that_do_not_fit_a_part_are_refused(
    name: str, ours: list[bool], message: str
) -> None:
    with pytest.raises(SrkdError, match=message):
        check_teachers(plan(name, {}), ours)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dukd+dukd", {}, "names one part twice; each part counts once"),
        ("dukd+mipk", {}, "did you mean 'mipkd'"),
        ("scratch+logits", {}, "'scratch' takes no teacher and 'logits' needs 1; leave 'scratch'"),
        ("dukd+mipkd", {"fakd": {}}, r"\[method.fakd\] belongs to no part of 'dukd\+mipkd'"),
        ("dukd+mipkd", {"zoom_weight": 1.0}, "has no option 'zoom_weight'"),
        (
            "dukd+mipkd",
            {"dukd": {"logits_weight": 1.0}, "mipkd": {"logits_weight": 2.0}},
            r"set to different values for dukd and mipkd.*as method\.logits_weight",
        ),
    ],
)
def test_refused_plans(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SrkdError, match=message):
        plan(name, options)


def test_a_foreign_teacher_composes_with_methods_of_outputs() -> None:
    training = training_of("logits+dukd", student_of("edsr"), Nearest())
    terms = loss_terms(training, *images())
    assert set(terms) == {"pixel", "logits", "dukd.zoom_in", "dukd.zoom_out"}
