"""--dry-run: check everything a training needs, take one step of the real size, write nothing."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from srkd.data.folders import list_pairs
from srkd.data.sets import open_set
from srkd.progress import duration
from srkd.training import prepare, train_step

if TYPE_CHECKING:
    from srkd.recipe import Recipe

TIMED_STEPS = 2


def dry_run(recipe: Recipe, device: str = "auto") -> dict[str, Any]:
    """Facts and estimates for a recipe: sizes, data, seconds per step, memory, total time.

    The step runs on random images, so nothing is decoded or cached; the data are only listed.
    """
    training = prepare(recipe, device)
    batch, patch, scale = recipe.train.batch, recipe.data.patch, recipe.student.scale
    images, sets = check_data(recipe)

    random = torch.Generator().manual_seed(recipe.seed)
    lr = torch.randint(256, (batch, 3, patch, patch), generator=random, dtype=torch.uint8)
    size = (batch, 3, scale * patch, scale * patch)
    hr = torch.randint(256, size, generator=random, dtype=torch.uint8)
    cuda = training.device.type == "cuda"
    train_step(training, lr, hr)  # warm-up: kernels are chosen and buffers made
    if cuda:
        torch.cuda.synchronize(training.device)
    start = time.perf_counter()
    for _ in range(TIMED_STEPS):
        train_step(training, lr, hr)
    if cuda:
        torch.cuda.synchronize(training.device)
    seconds = (time.perf_counter() - start) / TIMED_STEPS
    if cuda:
        memory = torch.cuda.max_memory_allocated(training.device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    runs = 2 if recipe.with_baseline else 1
    return {
        "student": f"{recipe.student.network} x{scale}, {_count(training.student):,} parameters",
        "teachers": ", ".join(f"{t.name} ({_count(t.network):,})" for t in training.teachers)
        or "none",
        "method": f"{recipe.method.name}, {_count(training.method):,} extra parameters in training",
        "data": f"{images} training images",
        "validation": ", ".join(sets) or "none",
        "device": f"{training.device}, {training.precision}",
        "step": f"{seconds * 1000:.0f} ms at batch {batch}, LR patch {patch}",
        "memory": f"{memory / 2**20:.0f} MiB peak of {'the GPU' if cuda else 'this process'}",
        "time": f"{duration(seconds * recipe.train.iterations)} for {recipe.train.iterations:,} "
        f"iterations{' (the baseline comes on top)' if runs == 2 else ''}, validation not counted",
    }


def _count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def check_data(recipe: Recipe) -> tuple[int, list[str]]:
    """Number of training images and a line per validation set; missing or odd folders are refused."""
    d, scale = recipe.data, recipe.student.scale
    if d.train == "builtin":
        from srkd.data.builtin import training_images

        images = len(training_images())
    else:
        lr = Path(os.path.expandvars(d.lr)) if d.lr else None
        images = len(list_pairs(Path(os.path.expandvars(d.train)), lr, scale))
    opened = [open_set(os.path.expandvars(spec), scale) for spec in recipe.validate.sets]
    return images, [f"{s.name} ({len(s)} images)" for s in opened]
