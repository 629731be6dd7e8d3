"""A matrix of runs: methods x students x scales x seeds from one recipe, all with the same budget.

    base = "tiny_x4.toml"              # a recipe, relative to this file
    students = ["rcan_a", "rcan_b"]
    scales = [4]
    seeds = [0, 1]

    [rows.scratch]                     # a row's name is that of its run folders
    method = "scratch"

    [rows.mkd]
    method = "mkd"
    teachers = ["rcan_c"]
    students = ["rcan_a"]              # this row for these students alone; `scales` and `seeds` likewise
    set.train.distil_iterations = 6000 # any other key of the recipe

A run lies in OUT/runs/xSCALE/STUDENT/ROW-SEED. Which runs there are, and their order, depends on this file
alone, so that machines can share them; finished folders of one can be copied into another's OUT.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from srkd.errors import SrkdError, nearest
from srkd.files import read_json
from srkd.finished import HR_STEPS, NOT_BUDGET
from srkd.first_stage import FOLDER as FIRST_STAGE
from srkd.first_stage import trains_first_stage
from srkd.methods import same_type
from srkd.models import load_model, weights_hash
from srkd.recipe import Recipe, load_recipe
from srkd.resuming import changes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NAME = re.compile(r"[A-Za-z0-9][\w.+]*")
TAIL_BYTES = 8192


@dataclass(frozen=True)
class Row:
    """A method with its teachers and settings; empty `students`, `scales`, `seeds`: those of the matrix."""

    method: str = ""
    teachers: tuple[str, ...] = ()
    students: tuple[str, ...] = ()
    scales: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class PlannedRun:
    """One run: `words` are what scripts/distill.py is called with, but for --out."""

    row: str
    folder: Path
    recipe: Recipe
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """x4/rcan_a/fitnet-0"""
        return "/".join(self.folder.parts[-3:])

    @property
    def kind(self) -> tuple[str, str, int]:
        """What takes the same time: row, student, scale."""
        return self.row, self.recipe.student.network, self.recipe.student.scale


def load_matrix(path: Path, out: Path) -> list[PlannedRun]:
    """Every run of a matrix file, in order: by seed, scale, student and row. All are checked."""
    tree = _read(path)
    known = ["base", "students", "scales", "seeds", "rows"]
    _refuse_unknown(tree, known, str(path))
    rows = tree.get("rows")
    if not isinstance(rows, dict) or not rows:
        raise SrkdError(f'{path} has no rows; write [rows.NAME] and method = "..." for each.')
    base = path.parent / same_type("base", tree.get("base", ""), "")
    every = _row(path, "", {k: v for k, v in tree.items() if k not in ("base", "rows")})
    missing = [key for key in ("students", "scales", "seeds") if not getattr(every, key)]
    if missing:
        raise SrkdError(f"{path} names no {missing[0]}; write {missing[0]} = [...].")
    parsed = {name: _named_row(path, name, values) for name, values in rows.items()}
    runs = [
        _planned(base, out, name, row, settings, student, scale, seed)
        for seed, scale, student, (name, (row, settings)) in product(
            *(_all(parsed, every, key) for key in ("seeds", "scales", "students")), parsed.items()
        )
        if seed in (row.seeds or every.seeds)
        and scale in (row.scales or every.scales)
        and student in (row.students or every.students)
    ]
    check_budgets(runs)
    return runs


def _all(parsed: dict[str, tuple[Row, Any]], every: Row, key: str) -> list[Any]:
    """The values of the matrix, then those that a row alone has."""
    own = [v for row, _ in parsed.values() for v in getattr(row, key)]
    return list(dict.fromkeys([*getattr(every, key), *own]))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SrkdError(
            f"cannot read matrix {path}: {error.strerror}. Give a TOML file."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SrkdError(f"matrix {path} is not valid TOML: {error}.") from error


def _refuse_unknown(tree: dict[str, Any], known: list[str], where: str) -> None:
    for key in tree:
        if key not in known:
            raise SrkdError(f"{where} has an unknown key '{key}'; {nearest(key, known)}")


def _named_row(path: Path, name: str, values: Any) -> tuple[Row, dict[str, Any]]:
    """A row and its settings, `key.path` -> value."""
    where = f"[rows.{name}] of {path}"
    if not NAME.fullmatch(name):
        raise SrkdError(f"{where}: a row's name becomes a folder's; use letters, digits, _ . +")
    if not isinstance(values, dict) or not values.get("method"):
        raise SrkdError(f'{where} has no method; write method = "..." (--list-methods).')
    _refuse_unknown(values, [*(f.name for f in fields(Row)), "set"], where)
    settings = dict(_leaves(values.get("set", {})))
    fixed = ("method.name", "student.network", "student.scale", "teacher.models", "seed")
    for key in settings:
        if key in fixed:
            raise SrkdError(f"{where} sets {key}, which the matrix decides; leave it out of `set`.")
    return _row(path, where, {k: v for k, v in values.items() if k != "set"}), settings


def _row(path: Path, where: str, values: dict[str, Any]) -> Row:
    likes = {"method": "", "teachers": ("",), "students": ("",), "scales": (1,), "seeds": (1,)}
    checked = {
        key: same_type(f"{where or path}: {key}", value, likes[key])
        for key, value in values.items()
    }
    return Row(**checked)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _planned(
    base: Path,
    out: Path,
    name: str,
    row: Row,
    settings: dict[str, Any],
    student: str,
    scale: int,
    seed: int,
) -> PlannedRun:
    keys = {
        **settings,
        "student.network": student,
        "student.scale": scale,
        "method.name": row.method,
        "teacher.models": list(row.teachers),
        "seed": seed,
    }
    words = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]
    try:
        recipe = load_recipe(base, words)
    except SrkdError as error:
        raise SrkdError(f"row '{name}' for {student} x{scale}: {error}") from error
    folder = out / "runs" / f"x{scale}" / student / f"{name}-{seed}"
    spelled = [part for word in words for part in ("--set", word)]
    return PlannedRun(name, folder, recipe, (str(base), *spelled))


# -- budgets ------------------------------------------------------------------------------------


def planned_budget(recipe: Recipe) -> dict[str, Any]:
    """What all rows must have in common; what only a trained run knows (digests) is compared afterwards."""
    train = {f"train.{k}": v for k, v in asdict(recipe.train).items() if k not in NOT_BUDGET}
    data = {key: getattr(recipe.data, key) for key in ("train", "lr", "patch", "augment")}
    return {
        HR_STEPS: recipe.steps_on_hr,
        **train,
        "train.precision": recipe.train.precision,
        **{f"data.{key}": value for key, value in data.items()},
        "student.weights": recipe.student.weights,
        "validate.sets": recipe.validate.sets,
    }


def check_budgets(runs: Sequence[PlannedRun]) -> None:
    """Refuse rows whose difference would not be the method's."""
    first: dict[int, tuple[str, dict[str, Any]]] = {}
    for run in runs:
        budget = planned_budget(run.recipe)
        name, wanted = first.setdefault(run.recipe.student.scale, (run.row, budget))
        if different := [
            f"{k} = {budget[k]}, not {wanted[k]}" for k in budget if budget[k] != wanted[k]
        ]:
            raise SrkdError(
                f"row '{run.row}' has another budget than '{name}': {'; '.join(different)}. A gain between them would "
                "not be the method's; make them equal (for stage-wise rows train.iterations counts both stages)."
            )


# -- shares -------------------------------------------------------------------------------------


def share_of(runs: Sequence[PlannedRun], text: str) -> list[PlannedRun]:
    """`2/3`: the second, fifth, eighth, ... run, whatever is finished already."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = (int(v) for v in match.groups()) if match else (0, 0)
    if not 1 <= part <= parts:
        raise SrkdError(f"--share {text} is no share; give I/N with I from 1 to N, e.g. 2/3.")
    return list(runs[part - 1 :: parts])


def only(runs: Sequence[PlannedRun], names: Sequence[str]) -> list[PlannedRun]:
    """Runs whose row, or whole name (x4/rcan_a/fitnet-0), is one of `names`."""
    known = list(dict.fromkeys([run.row for run in runs] + [run.name for run in runs]))
    for name in names:
        if name not in known:
            rows = list(dict.fromkeys(run.row for run in runs))
            raise SrkdError(f"--only {name} is no row of this matrix; {nearest(name, rows)}")
    return [run for run in runs if run.row in names or run.name in names]


# -- how far a run is -----------------------------------------------------------------------------


def stages(recipe: Recipe) -> dict[str, int]:
    """Folder below the run's -> steps of the stage that is logged there, in order."""
    first = {FIRST_STAGE: recipe.stage1.iterations} if recipe.stage1 is not None else {}
    own = first if trains_first_stage(recipe) else {}
    return {**own, "": recipe.train.iterations}


def last_records(folder: Path) -> list[dict[str, Any]]:
    """The last lines of a run's log that have a step, without reading the whole of a long one."""
    path, records = folder / "log.jsonl", []
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # cut at either end
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def progress_of(run: PlannedRun) -> dict[str, int]:
    """Steps done of every stage, by the log."""
    records = {stage: last_records(run.folder / stage) for stage in stages(run.recipe)}
    return {stage: found[-1]["step"] if found else 0 for stage, found in records.items()}


# -- what is there already ----------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """How far a run is. `steps` of `of` are done, those of a first stage included."""

    state: Literal["done", "unfinished", "new"]
    steps: int
    of: int


def standing(run: PlannedRun) -> Standing:
    """What its folder holds; another run there is refused with the difference."""
    total = sum(stages(run.recipe).values())
    saved = run.folder / "recipe.toml"
    if not saved.is_file():
        return Standing("new", 0, total)
    check_same(run, load_recipe(saved))
    if (run.folder / "model.json").is_file():
        check_same_teachers(run)
        if (run.folder / "report.md").is_file():
            return Standing("done", total, total)
    return Standing("unfinished", sum(progress_of(run).values()), total)


def check_same(run: PlannedRun, saved: Recipe) -> None:
    """A folder is this run's when everything that decides the result is equal."""
    planned = run.recipe
    # What `auto` became was decided by the machine that began the run.
    if planned.train.precision == "auto":
        train = replace(planned.train, precision=saved.train.precision)
        planned = replace(planned, train=train)
    if (
        planned.stage1 is not None
        and saved.stage1 is not None
        and planned.stage1.precision == "auto"
    ):
        planned = replace(planned, stage1=replace(planned.stage1, precision=saved.stage1.precision))
    if different := changes(saved, planned):
        raise SrkdError(
            f"{run.folder} holds another run than the matrix plans: {'; '.join(different)}. Move that folder away, "
            "give another --out, or change the matrix."
        )


def check_same_teachers(run: PlannedRun) -> None:
    """A finished run was taught by the very weights that the matrix names."""
    recipe = run.recipe
    if not recipe.teacher.models:
        return
    taught = read_json(run.folder / "model.json").get("training", {}).get("teachers", [])
    members = [m for t in taught for m in t.get("aggregates", [t])]
    found = [member.get("weights_sha256") for member in members]
    wanted = list(teacher_hashes(recipe.teacher.models, recipe.student.scale))
    if found != wanted:
        raise SrkdError(
            f"{run.folder} was taught by other weights than {', '.join(recipe.teacher.models)} (the hashes differ); "
            "restore these, move that folder away, or give another --out."
        )


@cache
def teacher_hashes(specs: tuple[str, ...], scale: int) -> tuple[str, ...]:
    """Hashes of the weights of these MODELs, which are loaded to be sure that they can be."""
    return tuple(weights_hash(load_model(os.path.expandvars(spec), scale)) for spec in specs)
