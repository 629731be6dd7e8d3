"""Whole runs on a folder of tiny pictures: what the tests of the training loop share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file

from srkd.images import write_png
from srkd.recipe import Recipe, load_recipe
from srkd.runs import Run

if TYPE_CHECKING:
    from pathlib import Path


def write_photos(folder: Path) -> Path:
    """Four smooth pictures of odd sizes."""
    numbers = np.random.default_rng(0)
    for i in range(4):
        coarse = numbers.integers(0, 256, (6 + i, 7, 3)).astype(np.uint8)
        write_png(folder / f"p{i}.png", np.kron(coarse, np.ones((9, 9, 1), np.uint8)))
    return folder


def recipe_for(photos: Path, *changes: str) -> Recipe:
    small = [
        "student.network=edsr_tiny",
        "student.scale=2",
        f"data.train={photos}",
        f"validate.sets=['{photos}']",
        "data.patch=12",
        "train.batch=4",
        "train.iterations=12",
        "train.learning_rate=1e-3",
        "train.precision=fp32",
        "train.log_every=1",
        "train.save_every=3",
        "validate.every=6",
    ]
    return load_recipe(None, [*small, *changes])


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights.safetensors")


def same_result(a: Path, b: Path) -> bool:
    """Weights, optimiser and average bit for bit."""
    one, two = tensors_of(a), tensors_of(b)
    if not all(torch.equal(one[k], two[k]) for k in one):
        return False
    states = [Run(run, recipe_for(run)).load_state() for run in (a, b)]
    assert states[0] is not None and states[1] is not None
    return _equal(states[0]["optimizer"], states[1]["optimizer"]) and _equal(
        states[0]["student"], states[1]["student"]
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b
