"""Make a finished run a shipped network: its files without this machine's paths, its card, its row.

Only a run that was scored on Set5, Set14 and BSD100 is taken. float16 halves the file; networks are computed
with in float32 anyway, so the cast costs what rounding the weights once costs, and that is measured: a set
whose PSNR-Y moves by more than HALF_TOLERANCE_DB refuses it.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import srkd.models as models
from srkd.cards import (
    BENCHMARKS,
    HEADING,
    Card,
    card_page,
    check_name,
    index_page,
    list_models,
    read_card,
)
from srkd.errors import CheckFailedError, SrkdError
from srkd.evaluate import evaluate, open_sets
from srkd.files import read_json, replacing, sha256, write_json, write_text
from srkd.finished import read_run
from srkd.loaded import read_safetensors
from srkd.metrics import PAPER_Y
from srkd.recipe import load_recipe, recipe_from

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from srkd.finished import FinishedRun
    from srkd.recipe import Recipe

HALF_TOLERANCE_DB = 0.005  # half of the last digit that tables print
KNOWN_TERMS = {
    "BSDS400": "The train and test splits of BSDS500 (Arbelaez et al., TPAMI 2011) without the photograph behind "
    "Set5/woman; offered for research and education.",
    "builtin": "Photographs that ship inside scikit-image (public domain, CC0 or no known restrictions) and drawn pictures.",
}


@dataclass(frozen=True)
class Options:
    """What to publish with; `terms` are those of the training images."""

    licence: str = "Apache-2.0"
    terms: str = ""
    half: bool = False
    overwrite: bool = False
    device: str = "cpu"


def publish(
    source: Path,
    target: Path,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Card:
    """Write `target` from the run `source`, then README.md of the folder around it."""
    options = options or Options()
    run, info = _checked(source)
    student = run.recipe.student
    check_name(target.name, student.network, student.scale)
    _check_place(target, options.overwrite)
    terms = options.terms or KNOWN_TERMS.get(info["training"]["data"]["name"], "")
    if not terms:
        name = info["training"]["data"]["name"]
        raise SrkdError(
            f"nothing is known of the terms of the training images '{name}'; say where they come from and what may "
            "be done with them, with --terms."
        )
    recipe = portable(run.recipe, info)
    tensors = read_safetensors(source / "weights.safetensors")
    dtype, scores = "float32", info["scores"]
    if options.half:
        dtype = "float16"
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        scores = _scores_of(source, tensors, options.device, progress)
        check_cast(info["scores"], scores)
    info |= {
        "scores": scores,
        "published": {
            "licence": options.licence,
            "data_terms": terms,
            "teachers": [
                {"model": spec, "terms": _terms_of(spec, student.scale)}
                for spec in recipe.teacher.models
            ],
            "dtype": dtype,
            # Published again, the file is not the one that training left.
            "trained_sha256": info.get("published", {}).get("trained_sha256", run.weights_sha256),
        },
    }
    return _write(target, info, recipe, tensors)


def _checked(source: Path) -> tuple[FinishedRun, dict[str, Any]]:
    """A finished run with the scores that a card needs, and its model.json."""
    if not (source / "model.json").is_file():
        raise SrkdError(
            f"{source} is no finished run (it has no model.json); give a folder that scripts/distill.py has finished."
        )
    staged = source / "recipe.toml"
    if staged.is_file() and load_recipe(staged).stages == "first":
        raise SrkdError(
            f"{source} is a first stage alone and upscales nothing by itself; publish the student."
        )
    run, info = read_run(source), read_json(source / "model.json")
    if missing := [name for name in BENCHMARKS if name not in run.scores]:
        raise SrkdError(
            f"{source} was not scored on {', '.join(missing)}, and a card gives {', '.join(BENCHMARKS)}; train with "
            f"validate.sets={[*BENCHMARKS]}."
        )
    if info["protocol"] != PAPER_Y.name:
        raise SrkdError(
            f"{source} was scored by protocol '{info['protocol']}', and a card gives {PAPER_Y.name}; train it again."
        )
    return run, info


def _check_place(target: Path, overwrite: bool) -> None:
    """Refuse to replace what is not ours, or what is not to be replaced."""
    if target.exists() and not overwrite:
        raise SrkdError(f"{target} exists; replace it with --overwrite, or choose another name.")
    if target.is_dir() and any(target.iterdir()) and not (target / "model.json").is_file():
        raise SrkdError(f"{target} holds something else than a network; choose another name.")
    index = target.parent / "README.md"
    if index.is_file() and not index.read_text(encoding="utf-8").startswith(HEADING):
        raise SrkdError(
            f"{index} is a page of somebody's own, and the list of the networks would replace it; publish into a "
            "folder of its own, e.g. weights/NAME."
        )


# -- the recipe ---------------------------------------------------------------------------------


def portable(recipe: Recipe, info: dict[str, Any]) -> Recipe:
    """The recipe with paths that mean something elsewhere; one that cannot is refused.

    Below $SRKD_DATA a path is written with the variable; a teacher that is shipped gets its name. The
    decoded cache is this machine's own business.
    """
    tree = tomllib.loads(recipe.to_toml())
    tree["data"]["cache"] = ""
    names = [(models.WEIGHTS_FOLDER / name, name) for name in models.shipped_models()]
    shipped = {read_json(f / "model.json").get("weights_sha256"): name for f, name in names}
    taught, specs = info["training"]["teachers"], tree["teacher"]["models"]
    if len(specs) == len(taught):  # one aggregated teacher is made of several
        tree["teacher"]["models"] = [
            shipped.get(teacher["weights_sha256"], spec) if is_absolute(spec) else spec
            for spec, teacher in zip(specs, taught, strict=True)
        ]
    return recipe_from(_elsewhere(tree, ""))


def _elsewhere(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {k: _elsewhere(v, f"{key}.{k}" if key else k) for k, v in value.items()}
    if isinstance(value, list):
        return [_elsewhere(v, key) for v in value]
    if not (isinstance(value, str) and is_absolute(value)):
        return value
    root = os.environ.get("SRKD_DATA")
    inside = root and Path(value).resolve().is_relative_to(Path(root).resolve())
    if not (root and inside):
        raise SrkdError(
            f"the recipe says {key} = {value}, which no other machine has; put it below $SRKD_DATA, or publish it "
            "first where it is a network of yours, so that the recipe can name it."
        )
    return f"$SRKD_DATA/{Path(value).resolve().relative_to(Path(root).resolve()).as_posix()}"


def is_absolute(text: str) -> bool:
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()


def _terms_of(spec: str, scale: int) -> str:
    """What a teacher's model.json or sidecar says of its licence and origin."""
    place = models.find_model(os.path.expandvars(spec), scale)
    if place.is_dir():
        licence = read_json(place / "model.json").get("published", {}).get("licence")
        return f"{licence}, a network of this project" if licence else "licence not recorded"
    sidecar = place.with_suffix(".json")
    facts = read_json(sidecar) if sidecar.is_file() else {}
    source = facts.get("source", {}).get("repository", "origin not recorded")
    return f"{facts.get('licence', 'licence not recorded')}, {source}"


# -- the weights --------------------------------------------------------------------------------


def _scores_of(
    source: Path,
    tensors: dict[str, Tensor],
    device: str,
    progress: Callable[[int, int], None] | None,
) -> dict[str, dict[str, float]]:
    """Scores of the run's network with other weights."""
    model = models.load_model(source)
    own = model.network.state_dict()
    model.network.load_state_dict({k: v.to(own[k].dtype) for k, v in tensors.items()})
    sets = open_sets(BENCHMARKS, model.scale)
    total, done = sum(map(len, sets)), 0

    def advance(*_: object) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    found = evaluate(model, sets, device=device, progress=advance)
    return {s.name: {"psnr_y": s.psnr, "ssim_y": s.ssim} for s in found}


def check_cast(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> None:
    """Refuse a cast that a table would show."""
    moved = {name: after[name]["psnr_y"] - before[name]["psnr_y"] for name in BENCHMARKS}
    # Written so that NaN, which compares with nothing, is refused too.
    if not all(abs(change) <= HALF_TOLERANCE_DB for change in moved.values()):
        told = ", ".join(f"{name} by {change:+.4f} dB" for name, change in moved.items())
        raise CheckFailedError(
            f"float16 weights move PSNR-Y of {told}, more than {HALF_TOLERANCE_DB} dB; publish it without --half."
        )


def _write(target: Path, info: dict[str, Any], recipe: Recipe, tensors: dict[str, Tensor]) -> Card:
    from safetensors.torch import save

    weights = target / "weights.safetensors"
    with replacing(weights) as temporary:
        temporary.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}))
    info["weights_sha256"] = sha256(weights)
    write_text(target / "recipe.toml", recipe.to_toml())
    write_json(target / "model.json", info)
    card = read_card(target)
    write_text(target / "README.md", card_page(card, info))
    write_text(target.parent / "README.md", index_page(list_models(target.parent)))
    return card
