"""The first stage of a method that has one: frozen teachers become one aggregated teacher.

    runs/x/stage1/     a run folder of its own: recipe, state, log, report, and the aggregation network
    runs/x/            the student, taught by the aggregated teacher

A first stage is a training like any other whose student is the aggregation network. `stage1.run` names a
run whose first stage is used again: runs/x, or a run of the first stage alone.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from srkd.aggregate import Aggregate
from srkd.errors import SrkdError
from srkd.loaded import LoadedModel
from srkd.methods.mtkd import network_config
from srkd.models import load_aggregate
from srkd.networks.dctswin import DctSwin
from srkd.recipe import load_recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from srkd.networks.dctswin import DctSwinConfig
    from srkd.recipe import Recipe

FOLDER = "stage1"


def first_stage_of(recipe: Recipe) -> Recipe:
    """The first stage of a recipe as a recipe of its own."""
    assert recipe.stage1 is not None
    return replace(
        recipe,
        stages="first",
        train=recipe.stage1.train(),
        data=replace(recipe.data, patch=recipe.stage1.patch),
        with_baseline=False,
    )


def trains_first_stage(recipe: Recipe) -> bool:
    """Whether a run of this recipe begins with a first stage of its own."""
    return recipe.stage1 is not None and recipe.stages == "all" and not recipe.stage1.run


def wanted_network(recipe: Recipe, teachers: int) -> DctSwinConfig:
    """The aggregation network that the recipe describes."""
    config = recipe.method.configs[recipe.method.first_stage]
    return network_config(config, teachers, recipe.student.scale)


def aggregation_network(recipe: Recipe, teachers: int) -> DctSwin:
    """The aggregation network with fresh weights."""
    return DctSwin(wanted_network(recipe, teachers))


def first_stage_folder(recipe: Recipe, trained: Path | None) -> Path | None:
    """Where the aggregated teacher is: what `stage1.run` names, else `trained`."""
    given = recipe.stage1.run if recipe.stage1 is not None else ""
    return find_first_stage(Path(os.path.expandvars(given))) if given else trained


def find_first_stage(run: Path) -> Path:
    """The folder of the first stage that `run` means: runs/x, or the first stage alone."""
    for folder in (run / FOLDER, run):
        if (folder / "recipe.toml").is_file() and (folder / "model.json").is_file():
            recipe = load_recipe(folder / "recipe.toml")
            if recipe.stages == "first":
                return folder
            if recipe.stage1 is None:
                raise SrkdError(
                    f"--stage1 {run}: its method '{recipe.method.name}' has no first stage; give a run of a method "
                    "that has one."
                )
            if recipe.stage1.run:
                raise SrkdError(
                    f"--stage1 {run}: that run used the first stage of {recipe.stage1.run}; give --stage1 "
                    f"{recipe.stage1.run}."
                )
    found = "its first stage is not finished" if (run / FOLDER).is_dir() else "no finished run"
    raise SrkdError(
        f"--stage1 {run}: {found} (there is no model.json); give a run of a method with a first stage that is "
        "finished at least that far."
    )


def aggregated_teacher(recipe: Recipe, folder: Path) -> LoadedModel:
    """The teacher that a first stage made; other teachers than it had, or in another order, are refused."""
    models = [os.path.expandvars(spec) for spec in recipe.teacher.models]
    model = load_aggregate(folder, models or None, recipe.student.scale)
    assert isinstance(model.network, Aggregate)
    _check_network(recipe, model.network.network.config, folder)
    return replace(model, name=f"aggregate of {', '.join(model.network.names)}")


def with_network_of(recipe: Recipe, aggregate: nn.Module) -> Recipe:
    """The recipe, which names the aggregation network that is there: it may be another run's."""
    assert isinstance(aggregate, Aggregate)
    method, found = recipe.method.first_stage, aggregate.network.config
    known = {f.name: getattr(found, f.name) for f in fields(found)}
    known |= {"blocks": len(found.depths), "layers": found.depths[0]}
    config = recipe.method.configs[method]
    own = {f.name: known[f.name] for f in fields(config) if f.name in known}
    configs = {**recipe.method.configs, method: replace(config, **own)}
    return replace(recipe, method=replace(recipe.method, configs=configs))


def untrained_teacher(recipe: Recipe, teachers: Sequence[LoadedModel]) -> LoadedModel:
    """The aggregated teacher before its first stage: enough to check everything beforehand."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        network = Aggregate(teachers, aggregation_network(recipe, len(teachers)))
    return LoadedModel(network, "aggregated teacher", Path(), network.facts)


def _check_network(recipe: Recipe, found: DctSwinConfig, folder: Path) -> None:
    """The network is the one that was trained; asking for another one is refused, not ignored."""
    method = recipe.method.first_stage
    wanted = wanted_network(recipe, found.teachers)
    usual = network_config(type(recipe.method.configs[method])(), found.teachers, found.scale)
    for field in fields(found):
        asked, is_ = getattr(wanted, field.name), getattr(found, field.name)
        if asked not in (is_, getattr(usual, field.name)):
            raise SrkdError(
                f"the aggregation network in {folder} has {field.name} = {is_}, but method.{method} asks for "
                f"{asked}; leave the network's options away with --stage1, or train a first stage."
            )
