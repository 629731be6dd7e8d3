"""What all feature methods share: running scale, sizes of maps, and every method on pairs of families."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_pair import images, student_of, teacher_of
from torch import nn

from srkd.errors import SrkdError
from srkd.methods.at import AtConfig, AttentionTransfer
from srkd.methods.crosskd import CrossKd, CrossKdConfig
from srkd.methods.fakd import Fakd, FakdConfig
from srkd.methods.features import FeatureMethod, RunningRms, make_norms, match_width
from srkd.methods.fitnet import Fitnet, FitnetConfig
from srkd.methods.rkd import Rkd, RkdConfig
from srkd.types import Batch, Setting, Step

if TYPE_CHECKING:
    from srkd.networks.base import Network


def setting(patch_px: int) -> Setting:
    return Setting(patch_px=patch_px, batch=4, iterations=10, memory=2**30)


# -- the running scale ------------------------------------------------------------------------------


def test_running_rms_is_a_mean_of_squares_first() -> None:
    rms = RunningRms()
    # Mean squares (9 + 16 + 0 + 25) / 4 = 12.5 and 0 and 100: means 12.5, 6.25, 37.5.
    assert rms(torch.tensor([[3.0, 4.0], [0.0, -5.0]])).item() == pytest.approx(12.5**0.5)
    assert rms(torch.zeros(3)).item() == pytest.approx(2.5)
    assert rms(torch.full((2, 2), 10.0)).item() == pytest.approx(37.5**0.5)


def test_running_rms_forgets_after_a_hundred() -> None:
    rms = RunningRms()
    for _ in range(100):
        rms(torch.ones(1))
    # From the hundredth on the newest counts 1/100: 0.99 * 1 + 0.01 * 101 = 2, then 0.99 * 2 + 0.01 * 2.
    assert rms(torch.full((1,), 101**0.5)).square().item() == pytest.approx(2)
    assert rms(torch.full((1,), 2**0.5)).square().item() == pytest.approx(2)
    mean_squares = [rms(torch.zeros(1)).square().item() for _ in range(99)]
    assert mean_squares[-1] == pytest.approx(2 * 0.99**99, rel=1e-4)


def test_running_rms_has_no_gradient_and_is_never_zero() -> None:
    rms = RunningRms()
    scale = rms(torch.zeros(4, requires_grad=True))
    assert not scale.requires_grad
    assert scale.item() == pytest.approx(1e-8)
    assert not list(rms.parameters())


def test_running_rms_of_half_precision_is_in_float32() -> None:
    # 1 + 256^2 would be 256^2 in bfloat16.
    scale = RunningRms()(torch.tensor([1.0, 256.0]).bfloat16())
    assert scale.dtype == torch.float32 and scale.item() == pytest.approx(
        (65537 / 2) ** 0.5, rel=1e-6
    )


@pytest.mark.parametrize(
    ("choice", "cross_family", "count"),
    [
        ("none", False, 0),
        ("none", True, 0),
        ("auto", False, 0),
        ("auto", True, 3),
        ("rms", False, 3),
        ("rms", True, 3),
    ],
)
def test_when_features_are_brought_to_one_scale(
    choice: str, cross_family: bool, count: int
) -> None:
    norms = make_norms(choice, cross_family, 3)
    assert (0 if norms is None else len(norms)) == count


def test_families_are_told_apart() -> None:
    config = FitnetConfig(feature_norm="auto")
    same = Fitnet(config, student_of("edsr"), (teacher_of("edsr", channels=6),))
    cross = Fitnet(config, student_of("edsr"), (teacher_of("swinir"),))
    assert same.norms is None
    assert cross.norms is not None and len(cross.norms) == len(cross.pairs) == 3


def test_match_width() -> None:
    assert isinstance(match_width(3, 3), nn.Identity)
    conv = match_width(3, 5)
    assert isinstance(conv, nn.Conv2d) and conv.weight.shape == (5, 3, 1, 1)


# -- sizes of maps ----------------------------------------------------------------------------------


def test_map_sizes_are_compared_beforehand() -> None:
    windows = teacher_of("swinir", window=8, depths=(1,))
    method = AttentionTransfer(AtConfig(), student_of("edsr"), (windows,))
    assert method.check(setting(24)) == ()
    message = r"data.patch = 20 the student's features are 20 px wide and the teacher's 24.*multiple of 8\."
    with pytest.raises(SrkdError, match=message):
        method.check(setting(20))


def test_equal_windows_take_any_patch() -> None:
    student, teacher = student_of("swinir"), teacher_of("swinir")
    method = AttentionTransfer(AtConfig(), student, (teacher,))
    assert method.check(setting(6)) == ()
    lr, hr = images(px=6)  # padded to 8, two windows of 4
    step = Step(
        Batch(lr, hr),
        student.run(lr, method.student_taps),
        (teacher.run(lr, method.teacher_taps),),
    )
    assert step.student.taps["body"].shape[-2:] == (8, 8)
    assert method.loss(step)["attention"] > 0


def test_different_windows_need_a_multiple_of_both() -> None:
    student, teacher = student_of("swinir", window=6), teacher_of("swinir", window=8)
    method = AttentionTransfer(AtConfig(), student, (teacher,))
    # 16 px fit windows of 8, and are padded to 18 by windows of 6.
    with pytest.raises(SrkdError, match=r"18 px wide and the teacher's 16.*multiple of 24\."):
        method.check(setting(16))
    assert method.check(setting(48)) == ()


# -- every method, within and across families --------------------------------------------------------

CONFIGS: dict[type[FeatureMethod], Any] = {
    Fitnet: FitnetConfig(),
    AttentionTransfer: AtConfig(),
    Rkd: RkdConfig(calibrate_from=0, calibrate_to=1),
    Fakd: FakdConfig(),
    CrossKd: CrossKdConfig(),
}
OWN_TERMS = {
    Fitnet: ["hint"],
    AttentionTransfer: ["attention"],
    Rkd: ["relations"],
    Fakd: ["affinity"],
    CrossKd: ["student_half_pixel", "student_half", "teacher_half"],
}
PAIRS = [
    ("edsr", "edsr"),
    ("swinir", "swinir"),
    ("edsr", "rcan"),
    ("rcan", "swinir"),
    ("swinir", "edsr"),
]


@cache
def wide_teacher(family: str) -> Network:
    return teacher_of(family, channels=6)


def terms_of(
    kind: type[FeatureMethod], student: Network, teacher: Network, precision: str
) -> tuple[FeatureMethod, dict[str, torch.Tensor]]:
    """The terms of the second step: the first is RKD's whole calibration."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        method = kind(CONFIGS[kind], student, (teacher,))
    lr, hr = images(count=3)
    terms: dict[str, torch.Tensor] = {}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with torch.no_grad():
            taught = teacher.run(lr, method.teacher_taps)
        step = Step(Batch(lr, hr, total=10), student.run(lr, method.student_taps), (taught,))
        for iteration in range(2):
            terms = method.loss(replace(step, batch=replace(step.batch, iteration=iteration)))
    return method, terms


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("student_family", "teacher_family"), PAIRS)
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_gradients_on_pairs_of_families(
    kind: type[FeatureMethod], student_family: str, teacher_family: str, precision: str
) -> None:
    student, teacher = student_of(student_family), wide_teacher(teacher_family)
    before = copy.deepcopy(teacher.state_dict())
    method, terms = terms_of(kind, student, teacher, precision)
    for name, value in terms.items():
        assert value.dtype == torch.float32 and value.ndim == 0, name
        assert value.isfinite() and value > 0, name

    # The method's own terms alone: everything up to the last feature it reads learns from them.
    torch.stack([terms[name] for name in OWN_TERMS[kind]]).sum().backward()
    parts = {"head": student.head, **{f"groups.{i}": g for i, g in enumerate(student.groups)}}
    for name, part in parts.items():
        reached = [p.grad.abs().sum() for p in part.parameters() if p.grad is not None]
        assert reached and torch.stack(reached).sum() > 0, name
    for name, p in method.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    for p in (*student.parameters(), *method.parameters()):
        assert p.grad is None or p.grad.isfinite().all()

    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_no_network_becomes_part_of_a_method(kind: type[FeatureMethod]) -> None:
    student, teacher = student_of("edsr"), wide_teacher("edsr")
    method, _ = terms_of(kind, student, teacher, "fp32")
    held = {id(m) for m in method.modules()}
    assert not held & {id(m) for m in (*student.modules(), *teacher.modules())}
