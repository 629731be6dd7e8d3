"""The bilevel step: the meta-gradient against differences, what each part of an iteration changes."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_pair import images, student_of, teacher_of
from torch import Tensor, nn

from srkd.bilevel import BilevelState, bilevel_iteration, meta_gradient, split
from srkd.methods.mkd import Mkd, MkdConfig

if TYPE_CHECKING:
    from srkd.networks.base import Network

RATE = 1e-3
BETAS = (0.9, 0.999)


class Run:
    """A tiny student, a teacher, MKD and all optimisers, on two images."""

    def __init__(self, family: str = "rcan", double: bool = False, **config: Any) -> None:
        self.student = student_of(family)
        self.teacher = teacher_of("rcan", channels=6)
        torch.manual_seed(2)
        config = {"channels_out": 4, "positions": ("group1:group2", "group4:group4"), **config}
        self.method = Mkd(MkdConfig(**config), self.student, (self.teacher,))
        self.lr, self.hr = images()
        if double:
            for network in (self.student, self.teacher, self.method):
                network.double()
            self.lr, self.hr = self.lr.double(), self.hr.double()
        with torch.no_grad():
            self.taught = self.teacher.features(self.lr, self.method.teacher_taps)
        self.plan = self.method.bilevel
        self.state = BilevelState.of(self.student, self.method, self.plan, RATE, BETAS)
        self.task = torch.optim.Adam(self.student.parameters(), RATE, fused=True)

    def bilevel(
        self, iteration: int = 0, rate: float = RATE, bf16: bool = False
    ) -> dict[str, Tensor]:
        return bilevel_iteration(
            self.student,
            self.method,
            self.plan,
            self.state,
            self.lr,
            self.hr,
            self.taught,
            iteration=iteration,
            learning_rate=rate,
            bf16=bf16,
        )

    def task_step(self) -> None:
        self.task.zero_grad()
        (self.student(self.lr) - self.hr).abs().mean().backward()
        self.task.step()

    def meta(self, alpha: float = RATE, steps: int = 2) -> tuple[list[Tensor], Tensor]:
        plan = replace(self.plan, inner_steps=steps)
        return meta_gradient(self.student, self.method, plan, self.lr, self.hr, self.taught, alpha)

    def distance(self, student: Network) -> Tensor:
        return self.method.distance(
            student.features(self.lr, self.method.student_taps), self.taught
        )


def weights_of(module: nn.Module) -> list[Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def reached(run: Run, alpha: float, steps: int) -> float:
    """L_org after plain descent with copies of student and method: what (3) is the gradient of."""
    student, method = copy.deepcopy(run.student), copy.deepcopy(run.method)
    theta = [*student.parameters(), *split(method, run.plan)[0].values()]

    def descend(loss: Tensor) -> None:
        slopes = torch.autograd.grad(loss, theta, allow_unused=True, materialize_grads=True)
        for p, slope in zip(theta, slopes, strict=True):
            p.data -= alpha * slope

    for _ in range(steps):
        features = student.features(run.lr, method.student_taps)
        descend(method.distance(features, run.taught))
    if run.plan.task_step:
        descend((student(run.lr) - run.hr).abs().mean())
    with torch.no_grad():
        return (student(run.lr) - run.hr).abs().mean().item()


# -- the meta-gradient ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "options", "changes"),
    [
        pytest.param(1, {}, {}, marks=pytest.mark.slow),  # the first half of the next
        (2, {}, {}),
        (2, {"case": "1", "distance": "charbonnier"}, {}),
        (2, {}, {"inner": ("networks.0.match.0.weight", "networks.1.mix1.bias")}),
        (1, {}, {"task_step": True}),
    ],
)
def test_meta_gradient_is_that_of_differences(
    steps: int, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    run, alpha, epsilon = Run(double=True, **options), 0.02, 1e-7
    run.plan = replace(run.plan, **changes)
    gradients, value = run.meta(alpha, steps)
    assert value.item() == pytest.approx(reached(run, alpha, steps), rel=1e-12)
    random = torch.Generator().manual_seed(5)
    learned = split(run.method, run.plan)[1]
    for (name, phi), gradient in zip(learned.items(), gradients, strict=True):
        # Along one direction, in which all entries take part, and along one entry.
        one = torch.zeros_like(phi)
        one.view(-1)[-1] = 1
        for along in (torch.randn(phi.shape, generator=random, dtype=phi.dtype), one):
            ends = []
            for sign in (1, -1):
                phi.data += sign * epsilon * along
                ends.append(reached(run, alpha, steps))
                phi.data -= sign * epsilon * along
            slope = (ends[0] - ends[1]) / (2 * epsilon)
            assert (gradient * along).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-8), name


def test_every_parameter_of_the_knowledge_networks_has_a_meta_gradient() -> None:
    run = Run(positions=())
    names = [name for name, _ in run.method.named_parameters()]
    assert len(names) == 4 * 8
    for name, gradient in zip(names, run.meta()[0], strict=True):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0, name


@pytest.mark.parametrize(("distance", "learns"), [("l1", False), ("auto", True)])
def test_the_teachers_convolution_of_case_2_needs_the_smooth_distance(
    distance: str, learns: bool
) -> None:
    run = Run(case="2", distance=distance)
    names = [name for name, _ in run.method.named_parameters()]
    for name, gradient in zip(names, run.meta()[0], strict=True):
        if ".teacher." in name:
            assert bool(gradient.any()) == learns, name
        if name.endswith(".student.weight"):
            assert gradient.any(), name


def test_the_meta_part_leaves_the_student_as_it_is() -> None:
    run = Run()
    for p in run.student.parameters():
        p.grad = torch.full_like(p, 0.5)
    before = weights_of(run.student)
    run.meta()
    assert same(before, weights_of(run.student))
    assert all(p.grad is not None and (p.grad == 0.5).all() for p in run.student.parameters())
    assert all(p.grad is None for p in run.method.parameters())
    assert all(p.grad is None for p in run.teacher.parameters())


def test_the_meta_part_leaves_running_statistics_as_they_are() -> None:
    run = Run()
    group = run.student.groups[0]
    run.student.groups[0] = nn.Sequential(group, nn.BatchNorm2d(4))
    before = weights_of(run.student)
    run.meta()
    assert same(before, weights_of(run.student))


def test_meta_gradient_is_in_float32_under_autocast() -> None:
    run = Run()
    plain = run.meta()
    with torch.autocast("cpu", torch.bfloat16):
        inside = run.meta()
    assert same(plain[0], inside[0]) and plain[1].dtype == torch.float32


@pytest.mark.parametrize("family", ["edsr", "swinir"])
def test_layers_of_other_families_have_second_derivatives(family: str) -> None:
    gradients, _ = Run(family, positions=()).meta()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(gradient.any() for gradient in gradients)


# -- the iteration ----------------------------------------------------------------------------------


def test_knowledge_steps_reach_the_body_and_the_task_step_the_tail() -> None:
    run = Run()
    student = run.student
    rest, ours = [*student.groups[4:], student.tail], [student.head, *student.groups[:4]]
    before = [weights_of(part) for part in rest], [weights_of(part) for part in ours]
    run.bilevel()
    assert all(same(a, weights_of(part)) for a, part in zip(before[0], rest, strict=True))
    assert not any(same(a, weights_of(part)) for a, part in zip(before[1], ours, strict=True))
    assert all(p.grad is None for p in [*student.parameters(), *run.method.parameters()])
    run.task_step()
    assert not any(same(a, weights_of(part)) for a, part in zip(before[0], rest, strict=True))


def test_gradients_of_the_loops_step_are_not_used_again() -> None:
    clean, stale = Run(), Run()
    for p in stale.student.parameters():
        p.grad = torch.full_like(p, 100.0)
    assert clean.bilevel() == stale.bilevel()
    assert same(weights_of(clean.student), weights_of(stale.student))


@pytest.mark.parametrize("steps", [1, 3])
def test_real_steps_are_adams_on_the_distance(steps: int) -> None:
    run = Run(case="3", inner_steps=steps)
    student, method = copy.deepcopy(run.student), copy.deepcopy(run.method)
    optimizer = torch.optim.Adam([*student.parameters(), *method.parameters()], 0.01, betas=BETAS)
    first = run.distance(student).item()
    for _ in range(steps):
        optimizer.zero_grad()
        method.distance(student.features(run.lr, method.student_taps), run.taught).backward()
        optimizer.step()
    terms = run.bilevel(rate=0.01)  # not the rate that the state was made with
    assert list(terms) == ["kd"] and terms["kd"].item() == pytest.approx(first)
    for a, b in zip(weights_of(run.student), weights_of(student), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(weights_of(run.method), weights_of(method), strict=True):
        torch.testing.assert_close(a, b)


def test_networks_learn_from_the_meta_part_alone_every_so_often() -> None:
    run = Run(meta_every=2)
    seen = [weights_of(run.method)]
    terms = []
    for iteration in range(4):
        terms.append(run.bilevel(iteration))
        run.task_step()
        seen.append(weights_of(run.method))
    changed = [not same(a, b) for a, b in pairwise(seen)]
    assert changed == [True, False, True, False]
    assert all(list(t) == ["kd", "meta"] for t in terms)
    # Between two meta parts the log shows the value of the last.
    assert terms[0]["meta"] == terms[1]["meta"] != terms[2]["meta"] == terms[3]["meta"]


def test_networks_move_by_the_meta_rate_however_small_the_rate_of_the_student() -> None:
    # The first step of Adam is its rate in size, unless the gradient is as small as its epsilon.
    run = Run(meta_learning_rate=0.01)
    before = weights_of(run.method)
    run.bilevel(rate=1e-6)
    for a, b in zip(before, weights_of(run.method), strict=True):
        assert (b - a).abs().median().item() == pytest.approx(0.01, rel=0.01)


def test_the_meta_part_takes_the_rate_of_the_iteration() -> None:
    # The order is: meta part, then real steps. So the log shows L_org after descent from the weights
    # before both.
    run = Run()
    for p in run.student.parameters():
        p.data += 0.01
    wanted = run.meta(alpha=0.005)[1]
    assert run.bilevel(rate=0.005)["meta"] == wanted
    assert wanted != run.meta(alpha=RATE)[1]


def test_the_meta_part_lowers_what_it_is_the_gradient_of() -> None:
    run = Run(meta_learning_rate=1e-3)
    gradients, before = run.meta(alpha=0.01)
    for phi, gradient in zip(run.method.parameters(), gradients, strict=True):
        phi.data -= 0.05 * gradient / torch.stack([g.norm() for g in gradients]).norm()
    assert run.meta(alpha=0.01)[1] < before


@pytest.mark.parametrize("case", ["1", "2", "3", "4"])
def test_the_distance_falls(case: str) -> None:
    run = Run(case=case)
    distances = []
    for iteration in range(4):
        distances.append(run.bilevel(iteration, rate=0.005)["kd"].item())
        run.task_step()
    assert distances[-1] < 0.95 * distances[0]


@pytest.mark.parametrize("bf16", [False, True])
def test_only_the_passes_of_real_steps_run_under_autocast(bf16: bool) -> None:
    run, seen = Run(), []
    run.student.groups[0].register_forward_hook(lambda *a: seen.append(a[2].dtype))
    terms = run.bilevel(bf16=bf16)
    # Two virtual steps and the pass after them; two real steps.
    real = torch.bfloat16 if bf16 else torch.float32
    assert seen == [torch.float32] * 3 + [real] * 2
    assert terms["kd"].dtype == torch.float32


def test_inner_parameters_learn_with_the_student_alone() -> None:
    run, inner = Run(), ("networks.0.match.0.weight", "networks.1.mix1.bias")
    run.plan = replace(run.plan, inner=inner)
    run.state = BilevelState.of(run.student, run.method, run.plan, RATE, BETAS)
    assert run.state.meta is not None
    run.bilevel()
    named = dict(run.method.named_parameters())
    ours = {named[name] for name in inner}
    assert set(run.state.meta.state) == set(named.values()) - ours
    assert ours < set(run.state.kd.state)
    assert set(run.state.kd.state) - ours < set(run.student.parameters())


def test_inner_parameters_move_with_the_virtual_steps() -> None:
    # The second of the two steps sees what the first made of them.
    run = Run()
    without = run.meta(alpha=0.02)[1]
    run.plan = replace(run.plan, inner=("networks.0.match.0.weight",))
    before = weights_of(run.method)
    assert run.meta(alpha=0.02)[1] != without
    assert same(before, weights_of(run.method))


def test_iterations_are_deterministic() -> None:
    one, two = Run(), Run()
    for iteration in range(2):
        assert one.bilevel(iteration) == two.bilevel(iteration)
    assert same(weights_of(one.student), weights_of(two.student))
    assert same(weights_of(one.method), weights_of(two.method))


@pytest.mark.parametrize("case", ["3", "4"])
def test_a_saved_state_goes_on_bit_for_bit(case: str) -> None:
    whole, later = Run(case=case, meta_every=2), Run(case=case, meta_every=2)
    for iteration in range(2):
        whole.bilevel(iteration)
        whole.task_step()
    parts = ("student", "method", "state", "task")
    file = io.BytesIO()
    torch.save({part: getattr(whole, part).state_dict() for part in parts}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for part in parts:
        getattr(later, part).load_state_dict(saved[part])
    for iteration in (3, 4):  # no meta part in the first of them
        assert whole.bilevel(iteration) == later.bilevel(iteration)
        whole.task_step()
        later.task_step()
    assert same(weights_of(whole.student), weights_of(later.student))
    assert same(weights_of(whole.method), weights_of(later.method))


def test_the_three_optimisers_keep_moments_of_their_own() -> None:
    run = Run()
    run.bilevel()
    assert not run.task.state
    assert run.state.meta is not None
    theta, phi = set(run.student.parameters()), set(run.method.parameters())
    assert set(run.state.meta.state) == phi
    assert set(run.state.kd.state) < theta
    without = BilevelState.of(run.student, run.method, replace(run.plan, meta=False), RATE, BETAS)
    assert without.meta is None
    assert {p for g in without.kd.param_groups for p in g["params"]} == theta | phi
