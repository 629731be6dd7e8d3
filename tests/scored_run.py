"""Finished run folders with scores as one likes: what the tests of comparing and publishing share."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from srkd.files import write_text
from srkd.models import save_model
from srkd.networks import build
from srkd.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from srkd.networks.base import Network

NETWORKS: dict[tuple[str, int], Network] = {}
Scores = dict[str, float]  # set -> PSNR-Y; SSIM-Y is a hundredth of it


def network(name: str, scale: int = 4) -> Network:
    key = (name, scale)
    if key not in NETWORKS:
        NETWORKS[key] = build(name, scale)
    return NETWORKS[key]


def make_run(
    folder: Path,
    method: str,
    seed: int,
    psnr: Scores,
    *changes: str,
    student: str = "edsr_tiny",
    teacher: tuple[str, str] = ("rcan_c_x4", "t" * 64),
    **details: Any,
) -> Path:
    """A finished run as training leaves it, with the given scores."""
    named = [f"teacher.models=['{teacher[0]}']"] if method != "scratch" else []
    first = [f"method.name={method}", f"seed={seed}", f"student.network={student}", *named]
    taught = [{"name": teacher[0], "weights_sha256": teacher[1]}] if named else []
    recipe = load_recipe(None, [*first, *changes])
    return write_run(folder, recipe, psnr, **{"teachers": taught, **details})


def write_run(
    folder: Path,
    recipe: Recipe,
    psnr: Scores,
    *,
    speeds: tuple[float, ...] = (),
    curve: dict[int, Scores] | None = None,
    **facts: Any,
) -> Path:
    """What training a recipe leaves: `speeds` are steps per second, `curve` validations by step."""
    write_text(folder / "recipe.toml", recipe.to_toml())
    records: list[dict[str, Any]] = [
        {"step": i + 1, "steps_per_s": s, "terms": {}} for i, s in enumerate(speeds)
    ]
    records += [{"step": k, "scores": scored(v)} for k, v in (curve or {}).items()]
    write_text(folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    training = {
        "method": recipe.method.name,
        "teachers": [],
        "data": {"name": "photos", "images": 4, "digest": facts.pop("digest", "d" * 64)},
        "iterations": recipe.train.iterations,
        "batch": recipe.train.batch,
        "patch": recipe.data.patch,
        "seed": recipe.seed,
        "precision": "fp32",
        "device": "cpu",
        "seconds": 9.0,
        **facts,
    }
    versions = {"srkd": "0.1.0", "torch": "2.13", "python": "3.11"}
    info = {"scores": scored(psnr), "protocol": "paper-y", "training": training}
    save_model(
        folder,
        network(recipe.student.network, recipe.student.scale),
        {**info, "versions": versions},
    )
    return folder


def scored(psnr: Scores) -> dict[str, dict[str, float]]:
    return {name: {"psnr_y": value, "ssim_y": value / 100} for name, value in psnr.items()}
