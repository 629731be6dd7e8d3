"""What a training takes, measured before it starts: time of a step, memory, disk."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import srkd.ranks as ranks
from srkd.data.cache import BUILTIN, gigabytes, is_cached
from srkd.data.folders import list_pairs
from srkd.devices import wait_for
from srkd.images import picture_size
from srkd.progress import duration
from srkd.runs import KEEP_STATES
from srkd.step import train_step
from srkd.training import memory_advice

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from srkd.recipe import Recipe
    from srkd.training import Training

TIMED_STEPS = 2


def random_crops(training: Training) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """A batch of this process's share as the data path gives it, of random pixels."""
    recipe = training.recipe
    batch, patch = recipe.train.batch // ranks.world(), recipe.data.patch
    side = recipe.student.scale * patch
    random = torch.Generator().manual_seed(recipe.seed)
    lr = torch.randint(256, (batch, 3, patch, patch), generator=random, dtype=torch.uint8)
    hr = torch.randint(256, (batch, 3, side, side), generator=random, dtype=torch.uint8)
    cached = (hr.to(torch.float16) / 255,) * (len(training.teachers) if recipe.teacher.cache else 0)
    return lr, hr, cached


def middle_steps(training: Training) -> list[tuple[int, int]]:
    """Of every stage of stage-wise training its middle step and its length: methods begin otherwise than they go on."""
    train = training.recipe.train
    distil, rest = train.distil_iterations, train.iterations - train.distil_iterations
    stages = [(distil // 2, distil)] if distil else []
    return [*stages, (distil + rest // 2, rest)]


def step_seconds(training: Training, step: int, count: int = TIMED_STEPS) -> float:
    """Mean time of `count` or more steps at `step` on random crops. The networks are trained by them."""
    crops = random_crops(training)
    training.done = step
    found = training.method.bilevel_part
    # As many as one meta part serves.
    count = max(count, found[1].bilevel.meta_every if found else 0)
    with memory_advice(training.recipe):
        train_step(training, *crops)  # warm-up: kernels are chosen and buffers made
        wait_for(training.device)
        start = time.perf_counter()
        for _ in range(count):
            train_step(training, *crops)
        wait_for(training.device)
    return (time.perf_counter() - start) / count


def peak_memory(device: torch.device) -> str:
    """Most memory that was in use so far, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB peak of the GPU"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"{peak / 2**20:.0f} MiB peak of this process"


def state_bytes(training: Training) -> int:
    """Size of the states and weights that a run keeps: the last ones, the best one, and the result."""
    t = training
    parts = (t.student, t.average, t.method)
    tensors = [v for part in parts if part is not None for v in part.state_dict().values()]
    bilevel = [t.bilevel.kd, t.bilevel.meta] if t.bilevel is not None else []
    optimizers = [o for o in (t.optimizer, *bilevel) if o is not None]
    moments = [p for o in optimizers for g in o.param_groups for p in g["params"]] * 2
    state = sum(v.numel() * v.element_size() for v in (*tensors, *moments))
    result = sum(v.numel() * v.element_size() for v in t.result.state_dict().values())
    return (KEEP_STATES + 1) * state + result


def data_sizes(recipe: Recipe) -> tuple[dict[str, tuple[int, int]], bool]:
    """(H, W) of every HR image by name, read from the headers, and whether they lie decoded in the cache."""
    d, scale = recipe.data, recipe.student.scale
    train = os.path.expandvars(d.train)
    lr, cache = (Path(os.path.expandvars(p)) if p else None for p in (d.lr, d.cache))
    cached = is_cached(train, scale, lr, cache)
    if train == BUILTIN:
        from srkd.data.builtin import training_images

        return {name: image.shape[:2] for name, image in training_images()}, cached
    return {p.name: picture_size(p.hr) for p in list_pairs(Path(train), lr, scale)}, cached


def disk_needs(
    recipe: Recipe, states: int, sizes: Mapping[str, tuple[int, int]], cached: bool
) -> str:
    """What a run writes, in words; `states` are the bytes of `state_bytes`, the others as `data_sizes` gives them."""
    images = 3 * sum(height * width for height, width in sizes.values())
    decoded = images + images // recipe.student.scale**2
    parts = [
        f"{_amount(states)} in the run folder",
        f"{_amount(decoded)} of decoded images{' (there already)' if cached else ''}",
    ]
    if recipe.teacher.cache:
        teachers = len(recipe.teacher.models)
        parts.append(f"{_amount(2 * images * teachers)} of cached outputs, where they are missing")
    return ", ".join(parts)


def _amount(count: int) -> str:
    return gigabytes(count) if count >= 1e9 else f"{count / 1e6:.1f} MB"


def whole_time(recipe: Recipe, seconds: float) -> str:
    """`seconds` of all steps, in words."""
    count = recipe.train.iterations
    return f"{duration(seconds)} for {count:,} iterations, validation not counted"
