"""Find finished run folders, check that each is what it says, and read what a comparison needs.

A folder counts as a run when it has a recipe.toml or a model.json. It is finished when it has both. What
it measured is trusted only when weights.safetensors has the hash that model.json recorded.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from srkd.errors import SrkdError
from srkd.files import read_json, sha256
from srkd.models import FORMAT
from srkd.networks import build_family
from srkd.recipe import load_recipe
from srkd.runs import Run

if TYPE_CHECKING:
    from collections.abc import Iterable

    from srkd.recipe import Recipe

# How often something is shown or saved decides nothing; precision is recorded as it was resolved; what
# counts of the iterations is `Recipe.steps_on_hr`.
NOT_BUDGET = ("log_every", "save_every", "precision", "iterations", "distil_iterations")
HR_STEPS = "steps on HR"


@dataclass(frozen=True)
class FinishedRun:
    """One trained student.

    budget      everything but seed, student, teachers and method that decides the result
    teachers    (name, hash of the weights) each
    scores      set -> {"psnr_y": dB, "ssim_y": .}, measured by the run's last validation
    curve       step -> PSNR-Y in dB, mean over the sets
    steps_per_s median over the run's log, None without a log
    """

    folder: Path
    recipe: Recipe
    budget: dict[str, Any]
    data: str
    family: str
    arguments: dict[str, Any]
    parameters: int
    teachers: tuple[tuple[str, str], ...]
    scores: dict[str, dict[str, float]]
    curve: dict[int, float]
    steps_per_s: float | None
    weights_sha256: str
    device: str
    seconds: float
    versions: dict[str, str]

    @property
    def student(self) -> tuple[str, int]:
        return self.recipe.student.network, self.recipe.student.scale

    def to_dict(self) -> dict[str, Any]:
        """What is this run's own; the rest stands in its group."""
        own = ("scores", "steps_per_s", "weights_sha256", "device", "seconds", "versions")
        facts = {name: getattr(self, name) for name in own}
        return {"folder": str(self.folder), "seed": self.recipe.seed, **facts}


@dataclass(frozen=True)
class Finding:
    """What the given folders hold. `skipped` is unfinished, `failed` did not pass its check."""

    runs: list[FinishedRun]
    skipped: dict[str, str]
    failed: dict[str, str]


def find_runs(folders: Iterable[Path]) -> Finding:
    """Read every run in `folders`, at any depth; a folder given twice counts once."""
    found = Finding([], {}, {})
    seen: set[Path] = set()
    for given in folders:
        if not given.is_dir():
            raise SrkdError(f"{given} is no folder; give run folders, or folders that hold them.")
        for folder in _run_folders(given):
            if folder.resolve() not in seen:
                seen.add(folder.resolve())
                _read_into(found, folder)
    return found


def _run_folders(folder: Path) -> list[Path]:
    """The runs at or below `folder`. What lies inside a run is its own, a baseline included."""
    if (folder / "recipe.toml").is_file() or (folder / "model.json").is_file():
        return [folder]
    below = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [run for child in below for run in _run_folders(child)]


def _read_into(found: Finding, folder: Path) -> None:
    """Read a run, and its baseline where the run was trained with one."""
    if not (folder / "model.json").is_file():
        found.skipped[str(folder)] = "not finished: it has no model.json"
        return
    try:
        if _is_first_stage(folder):
            found.skipped[str(folder)] = "a first stage alone: it trained no student"
            return
        run = read_run(folder)
    except SrkdError as error:
        found.failed[str(folder)] = str(error)
        return
    found.runs.append(run)
    if run.recipe.with_baseline:
        if (folder / "baseline").is_dir():
            _read_into(found, folder / "baseline")
        else:
            found.skipped[str(folder / "baseline")] = "not there, though the run asked for one"


def _is_first_stage(folder: Path) -> bool:
    recipe = folder / "recipe.toml"
    return recipe.is_file() and load_recipe(recipe).stages == "first"


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run; a damaged one, or one with other weights than it describes, is refused."""
    if not (folder / "recipe.toml").is_file():
        raise SrkdError(f"{folder} has no recipe.toml, so its budget is unknown; restore the file.")
    recipe = load_recipe(folder / "recipe.toml")
    info = read_json(folder / "model.json")
    try:
        if info["format"] != FORMAT:
            raise SrkdError(
                f"{folder / 'model.json'} has format {info['format']!r}, this version reads {FORMAT}; "
                "use the srkd version that wrote it."
            )
        _check_weights(folder, info["weights_sha256"])
        with torch.device("meta"):
            build_family(
                info["family"], info["arguments"]
            )  # refuses what this version cannot build
        return _described(folder, recipe, info)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SrkdError(
            f"{folder / 'model.json'} is damaged or incomplete ({error.__class__.__name__}: {error}); "
            "restore it or train again."
        ) from error


def _check_weights(folder: Path, recorded: str) -> None:
    weights = folder / "weights.safetensors"
    if not weights.is_file() or sha256(weights) != recorded:
        raise SrkdError(
            f"{weights} is not the file that was scored (its hash differs from model.json or it is "
            "gone); restore both from one run."
        )


def _described(folder: Path, recipe: Recipe, info: dict[str, Any]) -> FinishedRun:
    training = info["training"]
    pairs = {
        "method": (training["method"], recipe.method.name),
        "seed": (training["seed"], recipe.seed),
        "iterations": (training["iterations"], recipe.train.iterations),
    }
    for key, (described, asked) in pairs.items():
        if described != asked:
            raise ValueError(f"{key} is {described!r}, but {asked!r} in recipe.toml")
    scores = {
        name: {metric: float(values[metric]) for metric in ("psnr_y", "ssim_y")}
        for name, values in info["scores"].items()
    }
    records = Run(folder, recipe).log_records()
    speeds = [v for r in records if is_number(v := r.get("steps_per_s"))]
    return FinishedRun(
        folder=folder,
        recipe=recipe,
        budget=_budget(recipe, info),
        data=f"{training['data']['name']} ({training['data']['images']} images)",
        family=info["family"],
        arguments=info["arguments"],
        parameters=int(info["parameters"]),
        teachers=tuple(_identity(t, recipe) for t in training["teachers"]),
        scores=scores,
        curve=_curve(records, scores),
        steps_per_s=median(speeds) if speeds else None,
        weights_sha256=info["weights_sha256"],
        device=training["device"],
        seconds=float(training["seconds"]),
        versions=info["versions"],
    )


def _identity(teacher: dict[str, Any], recipe: Recipe) -> tuple[str, str]:
    """Name and hash of a teacher; one that the run made itself counts by what it was made of.

    So runs of several seeds, each with its own first stage, are one row. PISR's teacher is made of no others.
    """
    if recipe.stage1 is None or recipe.stage1.run:
        return teacher["name"], teacher["weights_sha256"]
    hashes = [member["weights_sha256"] for member in teacher.get("aggregates", ())]
    return f"{teacher['name']}, own first stage", "+".join(hashes)


def _budget(recipe: Recipe, info: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for two runs to stand in one table; values as JSON holds them."""
    train = {f"train.{k}": v for k, v in asdict(recipe.train).items() if k not in NOT_BUDGET}
    budget = {
        HR_STEPS: recipe.steps_on_hr,
        **train,
        "train.precision": info["training"]["precision"],
        "data.digest": info["training"]["data"]["digest"],
        "data.patch": recipe.data.patch,
        "data.augment": recipe.data.augment,
        "student.weights": recipe.student.weights,
        "validate.sets": sorted(info["scores"]),
        "protocol": info["protocol"],
    }
    return json.loads(json.dumps(budget))


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a line of a log has a finite number there."""
    return isinstance(value, int | float) and math.isfinite(value)


def _curve(records: list[dict[str, Any]], final: dict[str, dict[str, float]]) -> dict[int, float]:
    """PSNR-Y by step, mean over the sets, where a validation measured all of them."""
    curve = {}
    for record in records:
        values = record.get("scores")
        if isinstance(values, dict) and values and values.keys() == final.keys():
            psnr = [v.get("psnr_y") if isinstance(v, dict) else None for v in values.values()]
            numbers = [p for p in psnr if is_number(p)]
            if len(numbers) == len(psnr) and isinstance(record.get("step"), int):
                curve[record["step"]] = fmean(numbers)
    return curve
