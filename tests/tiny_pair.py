"""Tiny networks, and a training around a pair of them: what the tests of methods share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from srkd.loaded import LoadedModel
from srkd.methods import make, plan
from srkd.networks import build_family
from srkd.recipe import Recipe, TrainConfig
from srkd.step import loss_terms
from srkd.training import Training
from srkd.types import Batch, Facts, Step

if TYPE_CHECKING:
    from srkd.methods.base import Method
    from srkd.networks.base import Network

TINY: dict[str, dict[str, Any]] = {
    "edsr": {"channels": 4, "blocks": 4},
    "rcan": {"channels": 4, "blocks": 1, "group_count": 4, "reduction": 1},
    "rdn": {"channels": 4, "blocks": 4, "layers": 2, "growth": 3},
    "san": {"channels": 8, "blocks": 1, "group_count": 4, "reduction": 2},
    "han": {"channels": 4, "blocks": 1, "group_count": 4, "reduction": 1},
    "swinir": {"channels": 4, "depths": (1,) * 4, "heads": 2, "window": 4, "drop_path": 0.0},
}


class Nearest(nn.Module):
    """A foreign network without weights: every pixel becomes a square of `scale` pixels."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, lr: Tensor) -> Tensor:
        return lr.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


def student_of(family: str, seed: int = 0, scale: int = 2, **sizes: Any) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_family(family, {**TINY[family], "scale": scale, **sizes})


def teacher_of(family: str, seed: int = 1, scale: int = 2, **sizes: Any) -> Network:
    return student_of(family, seed, scale, **sizes).eval().requires_grad_(False)


def images(
    count: int = 2, px: int = 8, scale: int = 2, seed: int = 0, levels: int = 255
) -> tuple[Tensor, Tensor]:
    """LR and HR images that have nothing to do with each other; with 256 levels `1 - v` is exact."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(count, 3, px, px), (count, 3, scale * px, scale * px)]
    lr, hr = (torch.randint(levels + 1, s, generator=random) / levels for s in shapes)
    return lr, hr


def training_of(
    name: str, student: nn.Module, teacher: nn.Module, precision: str = "fp32", **options: Any
) -> Training:
    """What the loop holds for this pair; ten steps, nothing written."""
    scale = cast("int", student.scale)
    chosen = plan(name, options, getattr(student, "family", ""), scale)
    facts = Facts(scale=scale, receptive_field_px=None, exact_tiling=False)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        method = make(chosen, student, (teacher,))
    return Training(
        recipe=Recipe(chosen, train=TrainConfig(iterations=10)),
        device=torch.device("cpu"),
        precision=precision,
        student=cast("Network", student),
        average=None,
        teachers=[LoadedModel(teacher, "teacher", Path("teacher"), facts)],
        teacher_hashes=[],
        method=method,
        notes=(),
        optimizer=cast("torch.optim.Adam", None),  # nothing is stepped
    )


def part_of(training: Training, name: str) -> Method:
    """One method of a training's composition."""
    return dict(training.method.parts.items())[name]  # type: ignore[union-attr, operator]


def step_of(training: Training, lr: Tensor, hr: Tensor, part: int = 0) -> Step:
    """The step that the loop hands to the method."""
    seen: list[Step] = []
    training.method.loss = lambda step: seen.append(step) or {}  # type: ignore[method-assign]
    try:
        loss_terms(training, lr, hr, part)
    finally:
        del training.method.loss
    return seen[0]


def step_at(method: Method, student: Network, teacher: Network, iteration: int = 0) -> Step:
    """A step of a method without views, on two images."""
    lr, hr = images()
    with torch.no_grad():
        taught = teacher.run(lr, method.teacher_taps)
    batch = Batch(lr, hr, iteration=iteration, total=10)
    return Step(batch, student.run(lr, method.student_taps), (taught,))


def count_runs(network: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of all inputs that a network sees from now on, one for each forward pass."""
    shapes: list[tuple[int, ...]] = []
    whole = hasattr(network, "run")
    original = network.run if whole else network.forward

    def counted(lr: Tensor, *taps: Any) -> Any:
        shapes.append(tuple(lr.shape))
        return cast("Any", original)(lr, *taps)

    setattr(network, "run" if whole else "forward", counted)
    return shapes
