"""What the methods that compare features share: taps, widths, ranges.

Features are used as they are inside the network: EDSR and RCAN work on a 0..255 scale, SwinIR on 0..1.
Across families both sides must be brought to one scale, which `RunningRms` does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.methods.base import Method
from srkd.methods.positions import Pairs, choose_pairs, network_of

if TYPE_CHECKING:
    from srkd.types import Pass, Setting, Step


class FeatureMethod(Method):
    """A method that reads pairs of features of one student and one teacher (`config.positions`)."""

    def __init__(self, config: Any, student: nn.Module, teachers: tuple[nn.Module, ...]) -> None:
        super().__init__(config, student, teachers)
        (teacher,) = teachers
        ours, theirs = network_of(student), network_of(teacher)
        self.pairs = self.choose_pairs(student, teacher)
        self.student_channels, self.teacher_channels = ours.channels, theirs.channels
        self.cross_family = ours.family != theirs.family
        self.multiples = (ours.facts.size_multiple, theirs.facts.size_multiple)

    def choose_pairs(self, student: nn.Module, teacher: nn.Module) -> Pairs:
        return choose_pairs(student, teacher, self.config.positions)

    @property
    def student_taps(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s for s, _ in self.pairs))

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(t for _, t in self.pairs))

    def features(self, step: Step) -> list[tuple[Tensor, Tensor]]:
        """(student's, teacher's) feature of every pair; the teacher's without graph."""
        return [(step.student.taps[s], step.teacher.taps[t].detach()) for s, t in self.pairs]

    def check(self, setting: Setting) -> tuple[str, ...]:
        """Window networks pad the image, so that their maps may be larger than another network's."""
        sizes = [self.map_px(setting, m) for m in self.multiples]
        if sizes[0] != sizes[1]:
            raise SrkdError(
                f"with data.patch = {setting.patch_px} the student's features are {sizes[0]} px wide and "
                f"the teacher's {sizes[1]}, but they are compared place by place; make data.patch a "
                f"multiple of {math.lcm(*self.multiples)}."
            )
        return ()

    @staticmethod
    def map_px(setting: Setting, multiple: int) -> int:
        """Side of a feature map, the network's padding included."""
        return math.ceil(setting.patch_px / multiple) * multiple


class RunningRms(nn.Module):
    """Running root mean square of one feature: its scale, kept with the training's state."""

    square: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("square", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def forward(self, feature: Tensor) -> Tensor:
        """Take in one more feature (any shape) and return the RMS so far, a scalar."""
        self.count += 1
        share = (1 / self.count).clamp(
            min=0.01
        )  # a plain mean at first, then the last hundred or so
        self.square += share * (feature.float().square().mean() - self.square)
        return self.square.sqrt().clamp(min=1e-8)


def make_norms(choice: str, cross_family: bool, count: int) -> nn.ModuleList | None:
    """One `RunningRms` per pair, None when features are taken as they are."""
    if choice == "none" or (choice == "auto" and not cross_family):
        return None
    return nn.ModuleList(RunningRms() for _ in range(count))


def match_width(c_in: int, c_out: int) -> nn.Module:
    """1x1 convolution between widths; nothing when they are equal."""
    return nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)


def rest_of(owner: Pass, feature: Tensor, after: str, size: tuple[int, int]) -> Tensor:
    """Run the rest of `owner`'s network on a feature, with the head feature of that same network."""
    assert owner.head is not None
    return network_of(owner.network).rest(feature, after, owner.head, size)
