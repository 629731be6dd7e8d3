"""--dry-run: check everything a training needs, take one step of the real size, write nothing."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from srkd.cost import cost
from srkd.data.folders import list_pairs
from srkd.devices import wait_for
from srkd.errors import SrkdError
from srkd.first_stage import first_stage_of, kind_of, trains_first_stage
from srkd.images import picture_size
from srkd.inputs import open_validation
from srkd.networks import build
from srkd.progress import duration
from srkd.step import train_step
from srkd.training import memory_advice, prepare

if TYPE_CHECKING:
    from srkd.recipe import Recipe
    from srkd.training import Training

TIMED_STEPS = 2


def dry_run(recipe: Recipe, device: str = "auto") -> dict[str, Any]:
    """Facts and estimates for a recipe: sizes, data, seconds per step, memory, total time.

    The step runs on random images, so nothing is decoded or cached; the data are only listed.
    """
    training = prepare(recipe, device)
    images, sets = check_data(recipe, training.upscaler.facts.minimum_px)
    first: dict[str, str] = {}
    if trains_first_stage(recipe):
        stage1 = prepare(first_stage_of(training.recipe), device)
        seconds = step_seconds(stage1, stage1.recipe.train.iterations // 2)
        count = _count(stage1.student)
        first["first stage"] = (
            f"{kind_of(recipe).summary(recipe)}, {count:,} parameters; {_step(stage1, seconds)}"
        )
        first["time of the first stage"] = _whole_time(
            stage1, seconds * stage1.recipe.train.iterations
        )
        del stage1
    distil, whole = recipe.train.distil_iterations, 0.0
    if distil:
        seconds = step_seconds(training, distil // 2)
        whole = seconds * distil
        first["step on features"] = _step(training, seconds)
    rest = recipe.train.iterations - distil
    seconds = step_seconds(training, distil + rest // 2)
    whole += seconds * rest
    if training.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(training.device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

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
        "data": f"{images} training images",
        "validation": ", ".join(sets) or "none",
        "device": f"{training.device}, {training.precision}",
        "step": _step(training, seconds),
        "memory": f"{memory / 2**20:.0f} MiB peak of {'this process' if training.device.type == 'cpu' else 'the GPU'}",
        "time": _whole_time(training, whole)
        + (" (the baseline comes on top)" if recipe.with_baseline else ""),
    }


def step_seconds(training: Training, step: int) -> float:
    """Time of a step at `step`, in the middle of a stage: some methods begin otherwise than they go on."""
    recipe = training.recipe
    batch, patch, scale = recipe.train.batch, recipe.data.patch, recipe.student.scale
    random = torch.Generator().manual_seed(recipe.seed)
    lr = torch.randint(256, (batch, 3, patch, patch), generator=random, dtype=torch.uint8)
    size = (batch, 3, scale * patch, scale * patch)
    hr = torch.randint(256, size, generator=random, dtype=torch.uint8)
    cached = (hr.to(torch.float16) / 255,) * (len(training.teachers) if recipe.teacher.cache else 0)
    training.done = step
    found = training.method.bilevel_part
    # As many as one meta part serves.
    count = max(TIMED_STEPS, found[1].bilevel.meta_every if found else 0)
    with memory_advice(recipe):
        train_step(training, lr, hr, cached)  # warm-up: kernels are chosen and buffers made
    wait_for(training.device)
    start = time.perf_counter()
    for _ in range(count):
        train_step(training, lr, hr, cached)
    wait_for(training.device)
    return (time.perf_counter() - start) / count


def _step(training: Training, seconds: float) -> str:
    r = training.recipe
    cached = ", teachers from the cache" if r.teacher.cache else ""
    return f"{seconds * 1000:.0f} ms at batch {r.train.batch}, LR patch {r.data.patch}{cached}"


def _whole_time(training: Training, seconds: float) -> str:
    count = training.recipe.train.iterations
    return f"{duration(seconds)} for {count:,} iterations, validation not counted"


def _count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def check_data(recipe: Recipe, minimum_px: int) -> tuple[int, list[str]]:
    """Number of training images and a line per validation set; missing or odd folders are refused."""
    d, scale = recipe.data, recipe.student.scale
    if d.train == "builtin":
        from srkd.data.builtin import training_images

        sizes = {name: image.shape[:2] for name, image in training_images()}
    else:
        lr = Path(os.path.expandvars(d.lr)) if d.lr else None
        pairs = list_pairs(Path(os.path.expandvars(d.train)), lr, scale)
        sizes = {pair.name: picture_size(pair.hr) for pair in pairs}
    for name, (height, width) in sizes.items():
        if min(height, width) // scale < d.patch:
            raise SrkdError(
                f"training image {name} is {width}x{height} px, smaller than a crop of "
                f"{d.patch * scale}; leave it out or lower data.patch."
            )
    opened = open_validation(recipe, minimum_px)
    return len(sizes), [f"{s.name} ({len(s)} images)" for s in opened]
