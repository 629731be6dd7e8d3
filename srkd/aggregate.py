"""The aggregated teacher: frozen teachers and the network that makes one SR image of theirs.

    T_1(lr), ..., T_N(lr)  --stack-->  (B, 3N, s*h, s*w)  --network-->  (B, 3, s*h, s*w)

It upscales like any network. The order of the teachers is part of it: the network was trained on it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.networks.dctswin import DctSwin, mean_image
from srkd.types import Facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from srkd.loaded import LoadedModel

MEAN = "mean of the teachers"
AGGREGATED = "aggregated teacher"


class Aggregate(nn.Module):
    """Frozen teachers, always in eval mode, and an aggregation network: (B, 3, h, w) -> (B, 3, s*h, s*w)."""

    def __init__(self, teachers: Sequence[LoadedModel], network: DctSwin) -> None:
        super().__init__()
        _check(teachers, network)
        self.members = tuple(teachers)
        self.names = tuple(teacher.name for teacher in teachers)
        self.scale = network.scale
        self.teacher_networks = nn.ModuleList(teacher.network for teacher in teachers)
        self.teacher_networks.requires_grad_(False).eval()
        self.network = network
        # Tiles are sized by the widest part, for the parts run one after another.
        parts = [*self.teacher_networks, network]
        widths = [
            part.channels for part in parts if isinstance(getattr(part, "channels", None), int)
        ]
        self.channels = max(widths) if len(widths) == len(parts) else None
        self.facts = _joined([teacher.facts for teacher in teachers], network.facts)

    def train(self, mode: bool = True) -> Aggregate:
        """Trains the aggregation network alone; the teachers stay in eval mode."""
        super().train(mode)
        self.teacher_networks.eval()
        return self

    def stack(self, lr: Tensor) -> Tensor:
        """The teachers' images on the channels, in order: (B, 3N, s*h, s*w), not clamped."""
        return torch.cat([teacher(lr) for teacher in self.teacher_networks], dim=1)

    def forward(self, lr: Tensor) -> Tensor:
        return self.network(self.stack(lr))

    def parts(self, lr: Tensor) -> dict[str, Tensor]:
        """The image of every teacher, their plain mean (what the network has to beat) and the aggregated one.

        Every teacher runs once.
        """
        stack = self.stack(lr)
        images = [*stack.split(3, dim=1), mean_image(stack), self.network(stack)]
        return dict(zip(self.part_parameters(), images, strict=True))

    def part_parameters(self) -> dict[str, int]:
        """Parameters behind each of `parts`, by the same names."""
        counts = [_parameters(teacher) for teacher in self.teacher_networks]
        rows = dict(zip(_teacher_rows(self.names), counts, strict=True))
        return {**rows, MEAN: sum(counts), AGGREGATED: sum(counts) + _parameters(self.network)}


def _check(teachers: Sequence[LoadedModel], network: DctSwin) -> None:
    wanted = network.config.teachers
    if len(teachers) != wanted:
        names = ", ".join(teacher.name for teacher in teachers) or "none"
        raise SrkdError(
            f"got {len(teachers)} teachers ({names}), but the aggregation network takes {wanted}; give "
            f"{wanted} of them, or an aggregation network for {len(teachers)}."
        )
    for teacher in teachers:
        if teacher.scale != network.scale:
            raise SrkdError(
                f"teacher {teacher.name} is x{teacher.scale}, but the aggregation network is "
                f"x{network.scale}; choose a x{network.scale} teacher."
            )


def _joined(teachers: list[Facts], network: Facts) -> Facts:
    """Facts of the teachers side by side, with the aggregation network after them."""
    chain = [*teachers, network]
    reaches = [facts.receptive_field_px for facts in teachers]
    furthest = None if None in reaches else max(reach for reach in reaches if reach is not None)
    own = network.receptive_field_px
    return Facts(
        scale=network.scale,
        receptive_field_px=None if furthest is None or own is None else furthest + own,
        exact_tiling=all(facts.exact_tiling for facts in chain),
        size_multiple=math.lcm(*(facts.size_multiple for facts in chain)),
        minimum_px=max(facts.minimum_px for facts in chain),
    )


def _teacher_rows(names: tuple[str, ...]) -> list[str]:
    """A row name per teacher; teachers of one name (runs/a/x4, runs/b/x4) are told apart by their place."""
    return [
        f"teacher {name}" if names.count(name) == 1 else f"teacher {i + 1} {name}"
        for i, name in enumerate(names)
    ]


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
