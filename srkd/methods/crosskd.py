"""CrossKD: student and teacher are cut in two, and each half also works with the other's.

Papers: Fang, Hu, Hu, "Cross Knowledge Distillation for Image Super-Resolution", ICVIP 2022, pp. 162-168;
"Dual Cross Knowledge Distillation for Image Super-Resolution", JVCIR 95:103858, 2023. A RECONSTRUCTION: no
public code was found and the papers leave the weights open. Not the detection method of the same name.

    S = S2(S1),  T = T2(T1);   a: C_S -> C_T and b: C_T -> C_S are 1x1 convolutions where widths differ
    L = |S - y|_1 + |T2(a(S1)) - y|_1 + |T2(a(S1)) - T|_1 + |S2(b(T1)) - T|_1        (1)

    S1, T1   features in the middle of the body   (N, C, h, w)
    T2(.)    rest of the teacher, whose weights are frozen; the gradient goes through it to S1. The long
             skip of a rest takes the head feature of the network that owns it
    weights  1 each
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from srkd.methods.base import l1
from srkd.methods.features import FeatureMethod, match_width, rest_of
from srkd.methods.positions import middle, network_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from srkd.methods.positions import Pairs
    from srkd.types import Step


@dataclass(frozen=True)
class CrossKdConfig:
    pixel_weight: float = 1.0
    student_half_pixel_weight: float = 1.0
    student_half_weight: float = 1.0
    teacher_half_weight: float = 1.0


class CrossKd(FeatureMethod):
    Config = CrossKdConfig

    def __init__(
        self, config: CrossKdConfig, student: nn.Module, teachers: tuple[nn.Module, ...]
    ) -> None:
        super().__init__(config, student, teachers)
        self.to_teacher = match_width(self.student_channels, self.teacher_channels)
        self.to_student = match_width(self.teacher_channels, self.student_channels)

    def choose_pairs(self, student: nn.Module, teacher: nn.Module) -> Pairs:
        return ((middle(network_of(student)), middle(network_of(teacher))),)

    def loss(self, step: Step) -> dict[str, Tensor]:  # Eq. (1)
        c = self.config
        ((s1, t1),) = self.features(step)
        ((cut_s, cut_t),) = self.pairs
        sr_t = step.teacher.sr.detach()
        student_half = rest_of(step.teacher, self.to_teacher(s1), cut_t, step.size)
        teacher_half = rest_of(step.student, self.to_student(t1), cut_s, step.size)
        return {
            "pixel": c.pixel_weight * l1(step.student.sr, step.hr),
            "student_half_pixel": c.student_half_pixel_weight * l1(student_half, step.hr),
            "student_half": c.student_half_weight * l1(student_half, sr_t),
            "teacher_half": c.teacher_half_weight * l1(teacher_half, sr_t),
        }
