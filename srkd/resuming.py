"""The state of a training: what is saved, and the checks before a run continues from it."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from srkd.errors import SrkdError
from srkd.files import sha256
from srkd.methods import file_options
from srkd.recipe import recipe_from

if TYPE_CHECKING:
    from srkd.inputs import Inputs
    from srkd.recipe import Recipe
    from srkd.training import Training


def state_of(training: Training, inputs: Inputs) -> dict[str, Any]:
    """Everything that the next step depends on, as tensors and plain values."""
    t = training
    return {
        "step": t.done,
        "recipe": t.recipe.to_toml(),
        "student": t.student.state_dict(),
        "average": t.average.state_dict() if t.average is not None else None,
        "method": t.method.state_dict(),
        "optimizer": t.optimizer.state_dict(),
        "bilevel": t.bilevel.state_dict() if t.bilevel is not None else None,
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state(t.device) if t.device.type == "cuda" else None,
        "best": {"psnr_y": t.best_psnr, "step": t.best_step},
        "seconds": t.seconds,
        "inputs": hashes_of(t, inputs),
    }


def hashes_of(training: Training, inputs: Inputs) -> dict[str, Any]:
    """What a resumed run must find unchanged."""
    read = [sha256(Path(os.path.expandvars(file))) for file in training.method.files]
    return {
        "data": inputs.data.digest,
        "teachers": training.teacher_hashes,
        "files of the method": read,
    }


# Keys that may change between a run and its continuation: paths (their contents are hashed), where images
# lie, and how often something is shown or saved.
FREE_KEYS = (
    *(
        "data.train",
        "data.lr",
        "data.cache",
        "data.place",
        "teacher.models",
        "student.weights",
        "stage1.run",
    ),
    *("validate.", "train.log_every", "train.save_every", "with_baseline"),
    *("stage1.log_every", "stage1.save_every"),
)


def changes(saved: Recipe, now: Recipe) -> list[str]:
    """Lines for every value that decides the training and is another one now."""
    files = [f"method.{part}.{key}" for part, key in file_options(saved.method)]
    return [d for d in saved.differences(now) if not d.startswith((*FREE_KEYS, *files))]


def check_same_recipe(saved: Recipe, now: Recipe, folder: Path) -> None:
    """Refuse to go on with a run whose recipe.toml was changed."""
    if changed := changes(saved, now):
        raise SrkdError(
            f"{folder}/recipe.toml was changed since the run began, so it cannot be resumed exactly: "
            f"{'; '.join(changed)}. Change it back, or start a new run with --set student.weights={folder}."
        )


def restore(training: Training, inputs: Inputs, state: dict[str, Any], folder: Path) -> None:
    """Continue from a state; a changed recipe, changed data or teachers are refused."""
    t = training
    try:
        _check_unchanged(t, inputs, state, folder)
        t.student.load_state_dict(state["student"])
        if t.average is not None:
            t.average.load_state_dict(state["average"])
        t.method.load_state_dict(state["method"])
        t.optimizer.load_state_dict(state["optimizer"])
        if t.bilevel is not None:
            t.bilevel.load_state_dict(state["bilevel"])
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] is not None and t.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], t.device)
        t.done, t.seconds = state["step"], state["seconds"]
        t.best_psnr, t.best_step = state["best"]["psnr_y"], state["best"]["step"]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise SrkdError(
            f"the newest state of {folder} does not fit its recipe ({error.__class__.__name__}); delete it "
            "to continue from the state before it, or start a new run."
        ) from error


def _check_unchanged(
    training: Training, inputs: Inputs, state: dict[str, Any], folder: Path
) -> None:
    check_same_recipe(recipe_from(tomllib.loads(state["recipe"])), training.recipe, folder)
    now = hashes_of(training, inputs)
    for what, hashes in now.items():
        if state["inputs"].get(what, []) != hashes:
            raise SrkdError(
                f"{folder} was trained on other {what} (its hash has changed), so it cannot be resumed "
                f"exactly; restore the {what}, or start a new run with --set student.weights={folder}."
            )
