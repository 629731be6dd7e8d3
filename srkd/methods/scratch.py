"""No distillation: the baseline that every gain is measured against.

L = w * |S(x) - y|_1                                  (1)

S(x)  step.student.sr   (N, 3, H, W)
y     step.hr           (N, 3, H, W)
w     pixel_weight
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from srkd.methods.base import Method, l1

if TYPE_CHECKING:
    from torch import Tensor

    from srkd.types import Step


@dataclass(frozen=True)
class ScratchConfig:
    pixel_weight: float = 1.0


class Scratch(Method):
    Config = ScratchConfig

    @property
    def needs_teacher_pass(self) -> bool:
        return False

    def loss(self, step: Step) -> dict[str, Tensor]:  # Eq. (1)
        return {"pixel": self.config.pixel_weight * l1(step.student.sr, step.hr)}
