"""L2T-ww: every equation by hand, what is learned from which loss, the meta-gradient against differences."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_pair import images, step_at, student_of, teacher_of
from torch import Tensor, nn

import srkd.methods
from srkd.bilevel import BilevelState, bilevel_iteration, meta_gradient, split
from srkd.errors import SrkdError
from srkd.methods import METHODS, plan
from srkd.methods.base import Method
from srkd.methods.l2tww import (
    L2tww,
    L2twwConfig,
    channel_gaps,
    matching,
    what_weights,
    where_weights,
)
from srkd.methods.mkd import Mkd, MkdConfig, by_rms

TWO = ("group1:group2", "group4:group4")


def l2tww(**config: Any) -> L2tww:
    """For RCANs of four groups, 4 channels and 6."""
    torch.manual_seed(2)
    return L2tww(L2twwConfig(**config), student_of("rcan"), (teacher_of("rcan", channels=6),))


def features(method: L2tww, samples: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    random = torch.Generator().manual_seed(3)
    ours = {t: torch.randn(samples, 4, 6, 6, generator=random) for t in method.student_taps}
    theirs = {t: torch.randn(samples, 6, 6, 6, generator=random) for t in method.teacher_taps}
    for feature in theirs.values():  # means that differ from sample to sample
        feature += torch.randn(samples, 6, 1, 1, generator=random)
    return ours, theirs


def stir(method: L2tww) -> None:
    """Weights of channels and positions that differ from sample to sample."""
    for p in (*method.what.parameters(), *method.where.parameters()):
        nn.init.normal_(p)


class Run:
    """A tiny student, a teacher and L2T-ww on two images."""

    def __init__(self, double: bool = False, **config: Any) -> None:
        self.student, teacher = student_of("rcan"), teacher_of("rcan", channels=6)
        self.method = l2tww(**config)
        self.lr, self.hr = images()
        if double:
            for network in (self.student, teacher, self.method):
                network.double()
            self.lr, self.hr = self.lr.double(), self.hr.double()
        with torch.no_grad():
            self.taught = teacher.features(self.lr, self.method.teacher_taps)
        self.plan = self.method.bilevel

    def meta(self, alpha: float) -> tuple[list[Tensor], Tensor]:
        return meta_gradient(
            self.student, self.method, self.plan, self.lr, self.hr, self.taught, alpha
        )

    def reached(self, alpha: float) -> float:
        """|S(x) - y|_1 after T steps of student and r on (4) and one on |S(x) - y|_1, with copies."""
        student, method = copy.deepcopy(self.student), copy.deepcopy(self.method)
        theta = [*student.parameters(), *method.match.parameters()]

        def descend(loss: Tensor) -> None:
            slopes = torch.autograd.grad(loss, theta, allow_unused=True, materialize_grads=True)
            for p, slope in zip(theta, slopes, strict=True):
                p.data -= alpha * slope

        for _ in range(self.plan.inner_steps):
            ours = student.features(self.lr, method.student_taps)
            descend(method.distance(ours, self.taught))
        descend((student(self.lr) - self.hr).abs().mean())
        return (student(self.lr) - self.hr).abs().mean().item()


# -- the equations ----------------------------------------------------------------------------------


def test_gaps_are_means_over_places() -> None:
    # One sample, two channels of two places: (9 + 1) / 2 and (0 + 4) / 2.
    f_s = torch.tensor([[[[3.0, 1.0]], [[5.0, 2.0]]]])
    f_t = torch.tensor([[[[0.0, 0.0]], [[5.0, 4.0]]]])
    assert channel_gaps(f_s, f_t).tolist() == [[5.0, 2.0]]


def test_weights_by_hand() -> None:
    # e^0 : e^log 3 = 1 : 3, in the second sample; equal scores in the first.
    what = what_weights(torch.tensor([[2.0, 2.0], [0.0, math.log(3)]]))
    torch.testing.assert_close(what, torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    assert where_weights(torch.tensor([[-1.0], [2.0], [7.0]])).tolist() == [0, 2, 6]


def test_every_sample_has_its_own_weights() -> None:
    gaps = torch.tensor([[4.0, 8.0], [2.0, 6.0]])
    what = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    # Samples 4 and 0.5 + 4.5 = 5: mean 4.5; times 3 and 0.
    assert matching(gaps, what, None).item() == 4.5
    assert matching(gaps, what, torch.tensor([3.0, 0.0])).item() == 6


# -- the method -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [False, True])
def test_channels_count_alike_at_the_start(where: bool) -> None:
    method = l2tww(where=where)
    for layer in method.where:
        assert isinstance(layer, nn.Linear) and layer.bias.item() == 1
        nn.init.zeros_(layer.weight)  # lambda is 1
    ours, theirs = features(method)
    wanted = [
        F.mse_loss(match(by_rms(ours[s])), by_rms(theirs[t]))
        for (s, t), match in zip(method.pairs, method.match, strict=True)
    ]
    assert len(wanted) == 4 and len(method.where) == 4 * where
    torch.testing.assert_close(method.distance(ours, theirs), 0.5 * torch.stack(wanted).sum())


@pytest.mark.parametrize("where", [False, True])
def test_a_batch_is_the_mean_of_its_samples(where: bool) -> None:
    method = l2tww(where=where, feature_norm="none")
    stir(method)
    ours, theirs = features(method, samples=3)
    alone = [
        method.distance(
            {tap: f[i : i + 1] for tap, f in ours.items()},
            {tap: f[i : i + 1] for tap, f in theirs.items()},
        )
        for i in range(3)
    ]
    torch.testing.assert_close(method.distance(ours, theirs), torch.stack(alone).mean())
    assert torch.stack(alone).std() > 0.1


def test_weights_are_those_of_the_teachers_means() -> None:
    method = l2tww(where=True, positions=("group1:group1",), weight=2.0)
    stir(method)
    ours, theirs = features(method)
    f_s, f_t = by_rms(ours["group1"]), by_rms(theirs["group1"])
    what, where, match = method.what[0], method.where[0], method.match[0]
    means = F.adaptive_avg_pool2d(f_t, 1).flatten(1)
    gaps = (match(f_s) - f_t).square().mean((2, 3))
    each = (F.softmax(what(means), 1) * gaps).sum(1) * F.relu6(where(means)[:, 0])
    torch.testing.assert_close(method.distance(ours, theirs), 2 * each.mean())


@pytest.mark.parametrize(("ours", "theirs"), [(4, 4), (2, 4), (3, 7)])
def test_positions_are_those_of_mkd(ours: int, theirs: int) -> None:
    student = student_of("rcan", group_count=ours)
    teachers = (teacher_of("rcan", group_count=theirs),)
    wanted = Mkd(MkdConfig(), student, teachers).pairs
    assert L2tww(L2twwConfig(), student, teachers).pairs == wanted


def test_positions_by_hand() -> None:
    method = l2tww(positions=TWO, where=True)
    assert method.pairs == (("group1", "group2"), ("group4", "group4"))
    assert len(method.match) == len(method.what) == len(method.where) == 2


def test_scale_of_features_counts_only_without_norm() -> None:
    for norm in ("rms", "none"):
        method = l2tww(feature_norm=norm)
        ours, theirs = features(method)
        louder = {tap: 10 * feature for tap, feature in theirs.items()}
        ratio = (method.distance(ours, louder) / method.distance(ours, theirs)).item()
        assert ratio == pytest.approx(1) if norm == "rms" else ratio > 30


def test_equal_features_behind_the_identity_have_no_distance() -> None:
    student = student_of("rcan")
    method = L2tww(L2twwConfig(), student, (copy.deepcopy(student),))
    for match in method.match:
        assert isinstance(match, nn.Conv2d) and match.bias is not None
        nn.init.dirac_(match.weight)
        nn.init.zeros_(match.bias)
    ours, _ = features(method)
    assert method.distance(ours, ours).item() == 0
    assert method.distance(ours, {tap: -f for tap, f in ours.items()}).item() > 1


def test_distance_trains_student_and_layers_never_the_teacher() -> None:
    method = l2tww(where=True)
    ours, theirs = features(method)
    for feature in (*ours.values(), *theirs.values()):
        feature.requires_grad_()
    method.distance(ours, theirs).backward()
    assert all(f.grad is None for f in theirs.values())
    assert all(f.grad is not None and f.grad.abs().sum() > 0 for f in ours.values())
    for name, p in method.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_distance_is_in_float32_under_autocast() -> None:
    method = l2tww(where=True)
    ours, theirs = features(method)
    ours = {tap: f.bfloat16() for tap, f in ours.items()}
    with torch.autocast("cpu", torch.bfloat16):
        distance = method.distance(ours, theirs)
    assert distance.dtype == torch.float32
    wide = {tap: f.float() for tap, f in ours.items()}
    assert torch.equal(distance, method.distance(wide, theirs))


def test_the_step_of_the_loop_is_on_pixels_alone() -> None:
    student, teacher = student_of("rcan"), teacher_of("rcan", channels=6)
    method = L2tww(L2twwConfig(pixel_weight=2.0), student, (teacher,))
    step = step_at(method, student, teacher)
    terms = method.loss(step)
    assert list(terms) == ["pixel"]
    torch.testing.assert_close(terms["pixel"], 2 * F.l1_loss(step.student.sr, step.hr))
    assert not method.needs_teacher_pass


# -- the bilevel step -------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "where"), [(1, True), (2, False), (2, True)])
def test_meta_gradient_is_that_of_differences(steps: int, where: bool) -> None:
    run = Run(double=True, positions=TWO, where=where, inner_steps=steps)
    stir(run.method)
    alpha, epsilon = 0.02, 1e-6
    gradients, value = run.meta(alpha)
    assert value.item() == pytest.approx(run.reached(alpha), rel=1e-12)
    random = torch.Generator().manual_seed(5)
    phi = split(run.method, run.plan)[1]
    assert len(phi) == (8 if where else 4)
    for (name, p), gradient in zip(phi.items(), gradients, strict=True):
        along = torch.randn(p.shape, generator=random, dtype=p.dtype)
        ends = []
        for sign in (1, -1):
            p.data += sign * epsilon * along
            ends.append(run.reached(alpha))
            p.data -= sign * epsilon * along
        slope = (ends[0] - ends[1]) / (2 * epsilon)
        assert (gradient * along).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-10), name


def test_every_meta_parameter_has_a_gradient_at_the_start() -> None:
    run = Run(where=True)
    phi = split(run.method, run.plan)[1]
    assert len(phi) == 4 * 4
    for name, gradient in zip(phi, run.meta(1e-3)[0], strict=True):
        assert gradient.isfinite().all() and gradient.any(), name


def test_the_convolutions_learn_with_the_student_and_the_weights_from_the_meta_part() -> None:
    run = Run(where=True)
    inner, phi = split(run.method, run.plan)
    assert {id(p) for p in inner.values()} == {id(p) for p in run.method.match.parameters()}
    state = BilevelState.of(run.student, run.method, run.plan, 1e-3, (0.9, 0.999))
    assert state.meta is not None
    terms = bilevel_iteration(
        run.student,
        run.method,
        run.plan,
        state,
        run.lr,
        run.hr,
        run.taught,
        iteration=0,
        learning_rate=1e-3,
    )
    assert set(terms) == {"kd", "meta"}
    assert set(state.meta.state) == set(phi.values())
    assert set(inner.values()) < set(state.kd.state)


def test_plan_of_the_bilevel_step() -> None:
    made = l2tww(inner_steps=3, meta_every=5, meta_learning_rate=0.25).bilevel
    assert (made.inner_steps, made.meta_every, made.meta_learning_rate) == (3, 5, 0.25)
    assert made.meta and made.task_step


# -- options and compositions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner_steps": 0}, r"method\.l2tww\.inner_steps = 0, but 1 or more"),
        ({"meta_every": 0}, r"method\.l2tww\.meta_every = 0, but 1 or more"),
        ({"feature_norm": "auto"}, r"method\.l2tww\.feature_norm = 'auto'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SrkdError, match=words):
        plan("l2tww", options)


def test_two_bilevel_methods_are_refused() -> None:
    words = r"'mkd\+fitnet\+l2tww' cannot be combined: 'mkd' and 'l2tww' each update the student"
    with pytest.raises(SrkdError, match=words):
        plan("mkd+fitnet+l2tww", {})
    assert plan("fitnet+l2tww", {}).parts == ("fitnet", "l2tww")


@pytest.mark.parametrize("name", METHODS)
def test_the_table_knows_which_methods_have_a_bilevel_step(name: str) -> None:
    made = srkd.methods._load(METHODS[name].path)
    assert METHODS[name].bilevel == (made.bilevel is not Method.bilevel)
