"""Response distillation: the student also copies the teacher's output.

Paper: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531; for
super-resolution the output is the image, compared by L1 (MiPKD and DUKD call it Logits-KD).

    L = w_pixel * |S(x) - y|_1 + w_logits * |S(x) - T(x)|_1     (1)

    S(x), T(x)  step.student.sr, step.teacher.sr   (N, 3, H, W); no gradient reaches T
    weights     1 and 1 (DUKD, MiPKD); FAKD mixes 0.5 and 0.5
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from srkd.methods.base import Method, response_terms

if TYPE_CHECKING:
    from torch import Tensor

    from srkd.types import Step


@dataclass(frozen=True)
class LogitsConfig:
    pixel_weight: float = 1.0
    logits_weight: float = 1.0


class Logits(Method):
    Config = LogitsConfig

    @property
    def needs_teacher_pass(self) -> bool:
        return self.config.logits_weight != 0

    def loss(self, step: Step) -> dict[str, Tensor]:  # Eq. (1)
        return response_terms(self.config, step)
