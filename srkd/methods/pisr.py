"""PISR: the teacher is the student's own architecture, and sees through an encoder the HR image that it shall make.

Paper: Lee, Lee, Kim, Ham, "Learning with Privileged Information for Efficient Image Super-Resolution", ECCV 2020,
arXiv 2007.07524.      Checked against: cvlab-yonsei/PISR @ 809e3a5.

Stage 1 (`PrivilegedTraining`) trains the teacher (srkd/networks/privileged.py), encoder and decoder:

    L_T   = |T(y) - y|_1 + w_T |enc(y) - x|_1                                  pixel, imitation      (1)

Stage 2 (`Pisr`) trains the student, which starts with the decoder's weights; T is frozen:

    b     = 0.1 softplus(v(F_S)) + 1e-8                                                             (2)
    L_vid = mean( |m(F_S) - F_T| / b + log(2 b) )                                                   (3)
    L_S   = |S(x) - y|_1 + w_S L_vid                                           pixel, information    (4)

    x, y      step.lr, step.hr                    (N, 3, h, w), (N, 3, s*h, s*w)
    T(y)      decoder(enc(y)), enc(y) the imitated LR image (N, 3, h, w)
    F_S, F_T  step.student.taps["body"] of x, step.teacher.taps["body"] of enc(y)   (N, C, h, w)
    m, v      conv1x1(C -> C), PReLU, conv1x1(C -> C) each; trained and dropped. b is one number for every channel
              and place: what LR cannot tell gets a large one, and little weight
    w_T 1e-4, w_S 1e-6   config.imitation_weight, config.weight; the public code has images in [0, 1] too

(3) is the negative logarithm of a Laplace density, below 0 where b is small and the guess is good. The public code
adds a constant to it, which has no gradient.

Departs from the paper: it distils FSRCNN, whose features are near 1. Features of EDSR and RCAN are on a 0..255
scale, where v would drive b to 1e-8 at some places, so both features are divided by the teacher's running
RMS before (2) and (3) (`feature_norm = "none"`: as they are). Where FSRCNN expands its features before the upsampler,
networks with a long skip have it; the feature is taken before the skip, at the body convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.methods.base import Method, choice, l1
from srkd.methods.features import RunningRms
from srkd.methods.positions import network_of
from srkd.networks.privileged import IMITATED_LR, PrivilegedTeacher

if TYPE_CHECKING:
    from srkd.types import Batch, Pass, Step

SPREAD_SCALE = 0.1
LEAST_SPREAD = 1e-8


@dataclass(frozen=True)
class PisrConfig:
    pixel_weight: float = 1.0
    weight: float = 1e-6  # w_S
    imitation_weight: float = 1e-4  # w_T, of stage 1
    feature_norm: str = choice("rms", "none")


def teacher_terms(
    sr: Tensor, hr: Tensor, imitated: Tensor, lr: Tensor, weight: float
) -> dict[str, Tensor]:  # Eq. (1)
    """The two terms of stage 1; `sr` and `hr` are (N, 3, s*h, s*w), `imitated` and `lr` (N, 3, h, w)."""
    return {"pixel": l1(sr, hr), "imitation": weight * l1(imitated, lr)}


def spread(v: Tensor) -> Tensor:  # Eq. (2)
    """Any value -> b above 0, in float32."""
    return SPREAD_SCALE * F.softplus(v.float()) + LEAST_SPREAD


def surprise(mean: Tensor, target: Tensor, b: Tensor) -> Tensor:  # Eq. (3)
    """What the target costs under a Laplace density of this mean and spread; all (N, C, h, w), any sign."""
    return ((mean.float() - target.float()).abs() / b + (2 * b).log()).mean()


def adaptation(channels: int) -> nn.Sequential:
    """m or v: (N, C, h, w) -> (N, C, h, w)."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 1), nn.PReLU(), nn.Conv2d(channels, channels, 1)
    )


class PrivilegedTraining(Method):
    """Stage 1: the trained network is T, and its input the HR image."""

    Config = PisrConfig

    @property
    def student_taps(self) -> tuple[str, ...]:
        return (IMITATED_LR,)

    @property
    def needs_teacher_pass(self) -> bool:
        return False

    def student_input(self, batch: Batch, teachers: tuple[Pass, ...]) -> Tensor:
        return batch.hr

    def loss(self, step: Step) -> dict[str, Tensor]:  # Eq. (1)
        seen = step.student
        imitated = seen.taps[IMITATED_LR]
        return teacher_terms(seen.sr, step.hr, imitated, step.lr, self.config.imitation_weight)


class Pisr(Method):
    """Stage 2: the student learns to tell T's features from LR alone."""

    Config = PisrConfig

    def __init__(
        self, config: PisrConfig, student: nn.Module, teachers: tuple[nn.Module, ...]
    ) -> None:
        super().__init__(config, student, teachers)
        channels = network_of(student).channels
        self.mean, self.spread = adaptation(channels), adaptation(channels)
        self.norm = RunningRms() if config.feature_norm == "rms" else None

    @property
    def student_taps(self) -> tuple[str, ...]:
        return ("body",)

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        return ("body",)

    def teacher_input(self, batch: Batch) -> Tensor:
        return batch.hr

    @torch.no_grad()
    def start(self, student: nn.Module, teachers: tuple[nn.Module, ...]) -> None:
        """The decoder's weights: the student goes on from the teacher, on another input."""
        (teacher,) = teachers
        assert isinstance(teacher, PrivilegedTeacher)
        student.load_state_dict(teacher.decoder.state_dict())

    def loss(self, step: Step) -> dict[str, Tensor]:  # Eq. (4)
        c = self.config
        f_s, f_t = step.student.taps["body"], step.teacher.taps["body"].detach()
        if self.norm is not None:
            rms = self.norm(f_t)
            f_s, f_t = f_s / rms, f_t / rms
        cost = surprise(self.mean(f_s), f_t, spread(self.spread(f_s)))
        return {
            "pixel": c.pixel_weight * l1(step.student.sr, step.hr),
            "information": c.weight * cost,
        }
