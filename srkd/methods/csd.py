"""CSD: the student is a slice of its own teacher; both are trained, and the student is drawn to the
teacher's images and away from bicubic ones.

Paper: Wang, Lin, Qu, Wu, Zhang, Xie, Yao, "Towards Compact Single Image Super-Resolution via Contrastive
Self-distillation", IJCAI 2021, arXiv 2105.11683.      Checked against: Booooooooooo/CSD.

    S    = the first C_S channels of every convolution of T, weights shared            (1)
    L    = |S(x) - y|_1 + w_c L_cl + w_t |T(x) - y|_1                                  (2)
    L_cl = sum_{i=1..5} w_i d(phi_i(T(x)), phi_i(S(x)))
                        / ( sum_n d(phi_i(n), phi_i(S(x))) + 1e-7 )                    (3)

    phi_i  VGG19 relu1_1, 2_1, 3_1, 4_1, 5_1     srkd/vgg.py; w_i = 1/32, 1/16, 1/8, 1/4, 1
    d      mean absolute difference over all elements; T(x) detached
    n      negatives: 10 LR patches of the batch, bicubically enlarged; every one against every S(x)
    w_t    1
    w_c    200/255: the public code has 200 with images in 0..255, where |.|_1 is 255 times ours

How the weights are shared: the student's parameters ARE the slice. The method owns the wide network and runs
it with the student's parameters in place of its own slice, so that both losses reach them. The slice that
the wide network itself holds is never read: its gradient is zero, so that Adam leaves it as it is. Adam
treats every weight alone, so the training is that of one shared tensor.

Departs from the public code: VGG19 gets images normalised as it was trained on (there: 0..255 as they
are), and the negatives are MATLAB's bicubic (there: torch's).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from srkd.data.degradation import upscale
from srkd.errors import SrkdError
from srkd.methods.base import Method, file_option, l1
from srkd.methods.positions import network_of
from srkd.networks import build_family
from srkd.vgg import GRAPH_VALUES, MAP_VALUES, MINIMUM_PX, load_vgg

if TYPE_CHECKING:
    from srkd.networks.base import Network
    from srkd.types import Setting, Step

# Networks of convolutions whose channels may be cut anywhere.
SLICED = ("edsr", "rcan")
MAP_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
EPSILON = 1e-7


@dataclass(frozen=True)
class CsdConfig:
    pixel_weight: float = 1.0
    contrast_weight: float = 200 / 255  # 0: shared weights alone, no VGG19
    teacher_weight: float = 1.0
    channels: int = 256  # of the wide network, where no teacher is given
    negatives: int = 10  # at most: no more than the batch has
    vgg_weights: str = file_option()  # file of an ImageNet VGG19 in torchvision's layout


# -- Eq. (1): shared weights ------------------------------------------------------------------------


def corner(narrow: Tensor) -> tuple[slice, ...]:
    """Where a narrow tensor lies in its wide one: the first entries of every dimension.

    It holds for the convolution before a pixel shuffle too: output channel c is made of channels
    c*r*r .. c*r*r + r*r - 1, so the first r*r*C_S make the first C_S.
    """
    return tuple(slice(n) for n in narrow.shape)


def shared(wide: nn.Module, student: nn.Module) -> dict[str, Tensor]:
    """The wide network's parameters with the student's in their corner; gradients reach both."""
    narrow = dict(student.named_parameters())
    whole = {}
    for name, parameter in wide.named_parameters():
        whole[name] = parameter.clone()
        whole[name][corner(narrow[name])] = narrow[name]
    return whole


def wide_network(student: Network, teacher: nn.Module | None, channels: int) -> Network:
    """The teacher's copy, or a fresh network of `channels`, of which the student can be a slice."""
    if student.family not in SLICED:
        raise SrkdError(
            f"csd trains a student that is a slice of channels of a wider network, and {student.family} is "
            f"none (its layers mix channels in other ways); choose a student of {' or '.join(SLICED)}."
        )
    if teacher is None:
        if channels <= student.channels:
            raise SrkdError(
                f"method.csd.channels = {channels}, but the student has {student.channels} and is a slice of "
                "a wider network; raise method.csd.channels or choose a narrower student."
            )
        return build_family(student.family, {**student.arguments, "channels": channels})
    given = network_of(teacher)
    if given.family != student.family:
        differing = [f"family {given.family} (student {student.family})"]
    else:
        ours, theirs = student.arguments, given.arguments
        keys = [k for k in ours if k != "channels" and ours[k] != theirs[k]]
        differing = [f"{k} {theirs[k]} (student {ours[k]})" for k in keys]
    if given.channels <= student.channels:
        differing.append(f"channels {given.channels}, not above the student's {student.channels}")
    if differing:
        raise SrkdError(
            f"csd's student is a slice of its teacher, so that they may differ in width alone, but this "
            f"teacher has {', '.join(differing)}; choose another pair, or leave --teacher out."
        )
    wide = build_family(given.family, given.arguments)
    wide.load_state_dict(given.state_dict())
    return wide


# -- Eq. (3): contrast ------------------------------------------------------------------------------


class _DistanceToAll(torch.autograd.Function):
    """sum_n mean |f - n|, one negative at a time; a single map of signs is kept for the gradient.

    Plain autograd would keep one map per negative.
    """

    @staticmethod
    def forward(ctx: Any, feature: Tensor, negatives: Tensor) -> Tensor:
        total = feature.new_zeros(())
        signs = torch.zeros_like(feature, dtype=torch.int16)
        for negative in negatives:
            gap = feature - negative
            total += gap.abs().mean()
            signs += gap.sign_().to(torch.int16)
        ctx.save_for_backward(signs)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (signs,) = ctx.saved_tensors
        return upstream[0] / signs.numel() * signs, None


def distance_to_all(feature: Tensor, negatives: Tensor) -> Tensor:
    """sum_n d(n, f) for float32 features (N, C, h, w) and (negatives, C, h, w): a scalar."""
    distance = _DistanceToAll.apply(feature, negatives)
    assert isinstance(distance, Tensor)
    return distance


def contrast(
    student: list[Tensor], teacher: list[Tensor], negatives: list[Tensor]
) -> Tensor:  # Eq. (3)
    """L_cl of the five maps of each: (N, C_i, h_i, w_i), the same, (negatives, C_i, h_i, w_i)."""
    ratios = [
        weight * l1(s, t) / (distance_to_all(s, n) + EPSILON)
        for weight, s, t, n in zip(MAP_WEIGHTS, student, teacher, negatives, strict=True)
    ]
    return torch.stack(ratios).sum()


class Csd(Method):
    Config = CsdConfig

    def __init__(
        self, config: CsdConfig, student: nn.Module, teachers: tuple[nn.Module, ...]
    ) -> None:
        super().__init__(config, student, teachers)
        if config.negatives < 1:
            raise SrkdError(
                f"method.csd.negatives = {config.negatives}, but the contrast needs one or more; to train "
                "without it set method.csd.contrast_weight=0."
            )
        narrow = network_of(student)
        self.scale = narrow.scale
        self.wide = wide_network(narrow, teachers[0] if teachers else None, config.channels)
        self.vgg = None
        if config.contrast_weight:
            if not config.vgg_weights:
                raise SrkdError(
                    "csd compares images in VGG19, and its weights are not part of srkd; give a state dict of "
                    "an ImageNet VGG19 in torchvision's layout (.pth or .safetensors) with "
                    "--set method.csd.vgg_weights=FILE."
                )
            self.vgg = load_vgg(Path(os.path.expandvars(config.vgg_weights)))

    @property
    def needs_teacher_pass(self) -> bool:
        return False  # the teacher was copied, and its copy is trained

    @property
    def files(self) -> tuple[str, ...]:
        return (self.config.vgg_weights,) if self.vgg is not None else ()

    def check(self, setting: Setting) -> tuple[str, ...]:
        c, side = self.config, setting.patch_px * self.scale
        notes = []
        if self.wide.channels != c.channels:
            notes.append(
                f"the wide network has the teacher's {self.wide.channels} channels; "
                f"method.csd.channels = {c.channels} is for training without a teacher"
            )
        if self.vgg is None:
            return tuple(notes)
        if side < MINIMUM_PX:
            raise SrkdError(
                f"data.patch = {setting.patch_px} makes images of {side} px at x{self.scale}, but VGG19 needs "
                f"{MINIMUM_PX}; raise data.patch."
            )
        negatives = min(c.negatives, setting.batch)
        if negatives < c.negatives:
            notes.append(
                f"{negatives} negatives a step instead of {c.negatives}: the batch has no more"
            )
        values = setting.batch * (GRAPH_VALUES + MAP_VALUES) + negatives * MAP_VALUES
        need = 4 * side**2 * values
        if need > setting.memory:
            raise SrkdError(
                f"csd needs {need / 2**20:.0f} MiB for the VGG19 maps of {setting.batch} images of {side} px, "
                f"but {setting.memory / 2**20:.0f} MiB are free; lower train.batch or data.patch, or raise "
                "train.accumulate."
            )
        size = sum(p.numel() for p in self.wide.parameters())
        notes.append(
            f"VGG19 maps take about {need / 2**20:.0f} MiB; the wide network ({size:,} parameters) is trained "
            "with the student"
        )
        return tuple(notes)

    @torch.no_grad()
    def start(self, student: nn.Module, teachers: tuple[nn.Module, ...]) -> None:
        """The slice of the wide network, fresh or the teacher's, as if the tensors were one."""
        wide = dict(self.wide.named_parameters())
        for name, parameter in student.named_parameters():
            parameter.copy_(wide[name][corner(parameter)])

    def loss(self, step: Step) -> dict[str, Tensor]:  # Eq. (2)
        c, sr = self.config, step.student.sr
        wide_sr = functional_call(self.wide, shared(self.wide, step.student.network), (step.lr,))
        terms = {
            "pixel": c.pixel_weight * l1(sr, step.hr),
            "teacher_pixel": c.teacher_weight * l1(wide_sr, step.hr),
        }
        if self.vgg is not None:
            with torch.no_grad():
                fixed = [self.vgg(wide_sr), self.vgg(self._negatives(step))]
            terms["contrast"] = c.contrast_weight * contrast(self.vgg(sr), *fixed)
        return terms

    def _negatives(self, step: Step) -> Tensor:
        """(negatives, 3, H, W): LR patches of the batch, drawn anew in every step and enlarged."""
        random = step.batch.generator("negatives")
        order = torch.randperm(len(step.lr), generator=random)[: self.config.negatives]
        return upscale(step.lr[order.to(step.lr.device, non_blocking=True)], self.scale)
