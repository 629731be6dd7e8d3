"""Every method of the table: values by hand, where gradients go, composition, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import srkd.methods
from srkd.errors import SrkdError
from srkd.methods import METHODS, MethodEntry, check_teachers, make, plan
from srkd.methods.base import Method, l1
from srkd.networks import build_family
from srkd.types import Batch, Pass, Step

SIZES = {"channels": 8, "blocks": 2, "scale": 2}


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_family("edsr", SIZES)


def step_of(student: nn.Module, teacher: nn.Module | None, method: Method) -> Step:
    random = torch.Generator().manual_seed(0)
    lr, hr = torch.rand(2, 3, 8, 8, generator=random), torch.rand(2, 3, 16, 16, generator=random)
    teachers: tuple[Pass, ...] = ()
    if teacher is not None:
        with torch.no_grad():
            teachers = (teacher.run(lr, method.teacher_taps),)
    return Step(Batch(lr, hr, total=10), student.run(lr, method.student_taps), teachers)


def constant(value: float) -> Pass:
    return Pass(network=nn.Identity(), sr=torch.full((1, 3, 2, 2), value))


def test_scratch_by_hand() -> None:
    # Eq. (1): |0.5 - 0.25| = 0.25 everywhere, times the weight 2.
    method = make(plan("scratch", {"pixel_weight": 2.0}), nn.Identity(), ())
    step = Step(Batch(torch.zeros(1), torch.full((1, 3, 2, 2), 0.25)), constant(0.5))
    assert {k: v.item() for k, v in method.loss(step).items()} == {"pixel": 0.5}


def test_logits_by_hand() -> None:
    # |0.5 - 0.25| = 0.25 and |0.5 - 0.375| = 0.125, each times its weight.
    method = make(plan("logits", {"logits_weight": 4}), nn.Identity(), (nn.Identity(),))
    step = Step(
        Batch(torch.zeros(1), torch.full((1, 3, 2, 2), 0.25)), constant(0.5), (constant(0.375),)
    )
    assert {k: v.item() for k, v in method.loss(step).items()} == {"pixel": 0.25, "logits": 0.5}


def test_l1_is_a_mean_in_float32() -> None:
    a = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert l1(a, torch.zeros(2)).dtype == torch.float32
    assert l1(a, torch.zeros(2)).item() == 1.5


# csd trains its teacher and needs a file, pisr's teacher is given HR; they have their own tests.
@pytest.mark.parametrize("name", [m for m in METHODS if m not in ("csd", "pisr")])
def test_gradients_reach_the_student_and_never_the_teacher(name: str) -> None:
    student, teacher = small(0), small(1).eval().requires_grad_(False)
    alone = METHODS[name].teachers == (0, 0)
    method = make(plan(name, {}), student, () if alone else (teacher,))
    before = copy.deepcopy(teacher.state_dict())
    step = step_of(student, None if alone else teacher, method)
    torch.stack(list(method.loss(step).values())).sum().backward()
    # The layers of a bilevel method learn in steps of its own: tests/test_bilevel.py.
    layers = [] if METHODS[name].bilevel else [*method.named_parameters()]
    for label, p in [*student.named_parameters(), *layers]:
        assert p.grad is not None and p.grad.abs().sum() > 0, label
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_logits_of_equal_networks_is_zero() -> None:
    student = small(0)
    method = make(plan("logits", {}), student, (student,))
    terms = method.loss(step_of(student, copy.deepcopy(student), method))
    assert terms["logits"].item() == 0
    assert terms["pixel"].item() > 0


def test_weight_zero_asks_for_no_teacher_pass() -> None:
    method = make(plan("logits", {"logits_weight": 0.0}), nn.Identity(), (nn.Identity(),))
    assert not method.needs_teacher_pass
    step = Step(Batch(torch.zeros(1), torch.full((1, 3, 2, 2), 0.25)), constant(0.5))
    assert set(method.loss(step)) == {"pixel"}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = MethodEntry("toy:Edge", "a toy", needs_groups=True)
    monkeypatch.setitem(METHODS, "edge", entry)


def test_composition_is_the_sum_of_the_distinct_terms(toy: None) -> None:
    student, teacher = small(0), small(1).requires_grad_(False)
    both = make(plan("logits+edge", {}), student, (teacher,))
    step = step_of(student, teacher, both)
    terms = both.loss(step)
    assert set(terms) == {"pixel", "logits", "edge.feature"}
    # The shared term counts once, at the first method's weight (1, not the toy's 3).
    assert terms["pixel"].item() == pytest.approx(l1(step.student.sr, step.hr).item())
    edge = both.parts["edge"].loss(step)
    logits = both.parts["logits"].loss(step)
    expected = logits["pixel"] + logits["logits"] + edge["feature"]
    assert sum(terms.values()).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("name", "options", "weight"),
    [
        ("logits+edge", {}, 1.0),
        ("edge+logits", {}, 3.0),
        ("logits+edge", {"edge": {"pixel_weight": 7.0}}, 7.0),
        ("logits+edge", {"pixel_weight": 9}, 9.0),
    ],
)
def test_shared_weight_is_the_first_or_the_one_set_by_hand(
    toy: None, name: str, options: dict[str, object], weight: float
) -> None:
    configs = plan(name, options).configs
    assert {c.pixel_weight for c in configs.values()} == {weight}


def test_two_values_for_one_shared_weight_are_refused(toy: None) -> None:
    options = {"edge": {"pixel_weight": 7.0}, "logits": {"pixel_weight": 2.0}}
    with pytest.raises(SrkdError, match="counts once"):
        plan("logits+edge", options)


def test_composition_asks_for_the_taps_of_all_parts_once(toy: None) -> None:
    method = make(plan("edge+logits", {}), small(0), (small(1),))
    assert method.student_taps == ("body",)
    assert method.teacher_taps == ("block1", "body")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("logts", {}, "did you mean 'logits'"),
        ("logits+logits", {}, "names one part twice"),
        ("logits", {"logit_weight": 1.0}, "did you mean 'logits_weight'"),
        ("logits", {"pixel_weight": "much"}, "float is needed"),
        ("logits", {"mtkd": {}}, "belongs to no part"),
    ],
)
def test_refusals(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(SrkdError, match=message):
        plan(name, options)


def test_number_and_kind_of_teachers(toy: None) -> None:
    with pytest.raises(SrkdError, match="needs a teacher, got 0"):
        check_teachers(plan("logits", {}), [])
    with pytest.raises(SrkdError, match="takes 1 teacher, got 2"):
        check_teachers(plan("logits", {}), [True, True])
    with pytest.raises(SrkdError, match="uses no teacher"):
        check_teachers(plan("scratch", {}), [True])
    with pytest.raises(SrkdError, match=r"outputs only.*work: .*logits"):
        check_teachers(plan("edge", {}), [False])


def test_every_entry_resolves() -> None:
    for name in METHODS:
        chosen = plan(name, {})
        assert chosen.parts == (name,)
        assert srkd.methods._load(METHODS[name].path).Config() == chosen.configs[name]
