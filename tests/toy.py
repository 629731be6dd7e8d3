"""A new method touches three places: its file (this one), its test, one line in the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from srkd.methods.base import Method, l1

if TYPE_CHECKING:
    from srkd.types import Step


@dataclass(frozen=True)
class EdgeConfig:
    pixel_weight: float = 3.0
    weight: float = 0.5


class Edge(Method):
    """Copies the teacher's body feature through a trained 1x1 convolution."""

    Config = EdgeConfig

    def __init__(self, config: EdgeConfig, student: nn.Module, teachers: tuple[nn.Module, ...]):
        super().__init__(config, student, teachers)
        self.match = nn.Conv2d(student.channels, teachers[0].channels, 1)

    @property
    def student_taps(self) -> tuple[str, ...]:
        return ("body",)

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        return ("block1", "body")

    def loss(self, step: Step) -> dict[str, torch.Tensor]:
        c = self.config
        gap = l1(self.match(step.student.taps["body"]), step.teacher.taps["body"])
        return {"pixel": c.pixel_weight * l1(step.student.sr, step.hr), "feature": c.weight * gap}
