"""--dry-run: check everything a training needs, take one step of the real size, write nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from srkd.cost import cost
from srkd.errors import SrkdError
from srkd.first_stage import first_stage_of, kind_of, trains_first_stage
from srkd.inputs import open_validation
from srkd.networks import build
from srkd.probe import (
    data_sizes,
    disk_needs,
    middle_steps,
    peak_memory,
    state_bytes,
    step_seconds,
    whole_time,
)
from srkd.training import prepare

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from srkd.recipe import Recipe
    from srkd.training import Training


def dry_run(recipe: Recipe, device: str = "auto") -> dict[str, Any]:
    """Facts and estimates for a recipe: sizes, data, seconds per step, memory, total time.

    The step runs on random images, so nothing is decoded or cached; the data are only listed.
    """
    training = prepare(recipe, device)
    sizes, cached = data_sizes(recipe)
    sets = check_data(recipe, sizes, training.upscaler.facts.minimum_px)
    states = state_bytes(training)
    first: dict[str, str] = {}
    if trains_first_stage(recipe):
        stage1 = prepare(first_stage_of(training.recipe), device)
        states += state_bytes(stage1)
        seconds = step_seconds(stage1, stage1.recipe.train.iterations // 2)
        count = _count(stage1.student)
        first["first stage"] = (
            f"{kind_of(recipe).summary(recipe)}, {count:,} parameters; {_step(stage1, seconds)}"
        )
        first["time of the first stage"] = whole_time(
            stage1.recipe, seconds * stage1.recipe.train.iterations
        )
        del stage1
    *features, (middle, rest) = middle_steps(training)
    whole = 0.0
    for step, distil in features:
        seconds = step_seconds(training, step)
        whole += seconds * distil
        first["step on features"] = _step(training, seconds)
    seconds = step_seconds(training, middle)
    whole += seconds * rest

    scale = recipe.student.scale
    counted = cost(build(recipe.student.network, scale))
    return {
        "student": f"{recipe.student.network} x{scale}, {counted.parameters:,} parameters, "
        f"{counted.macs_g:.2f} G multiply-adds at {counted.size[0]}x{counted.size[1]}",
        "teachers": ", ".join(f"{t.name} ({_count(t.network):,})" for t in training.teachers)
        or "none",
        "method": f"{recipe.method.name}, {_count(training.method):,} extra parameters in training",
        **({"notes": "; ".join(training.notes)} if training.notes else {}),
        **first,
        "data": f"{len(sizes)} training images",
        "validation": ", ".join(sets) or "none",
        "device": f"{training.device}, {training.precision}",
        "step": _step(training, seconds),
        "memory": peak_memory(training.device),
        "disk": disk_needs(recipe, states, sizes, cached),
        "time": whole_time(recipe, whole)
        + (" (the baseline comes on top)" if recipe.with_baseline else ""),
    }


def _step(training: Training, seconds: float) -> str:
    r = training.recipe
    cached = ", teachers from the cache" if r.teacher.cache else ""
    return f"{seconds * 1000:.0f} ms at batch {r.train.batch}, LR patch {r.data.patch}{cached}"


def _count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def check_data(recipe: Recipe, sizes: Mapping[str, tuple[int, int]], minimum_px: int) -> list[str]:
    """A line per validation set; training images of these sizes that are too small are refused."""
    d, scale = recipe.data, recipe.student.scale
    for name, (height, width) in sizes.items():
        if min(height, width) // scale < d.patch:
            raise SrkdError(
                f"training image {name} is {width}x{height} px, smaller than a crop of "
                f"{d.patch * scale}; leave it out or lower data.patch."
            )
    opened = open_validation(recipe, minimum_px)
    return [f"{s.name} ({len(s)} images)" for s in opened]
