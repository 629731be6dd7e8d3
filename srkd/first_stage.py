"""The first stage of a method that has one: it makes the teacher of the second.

    runs/x/stage1/     a run folder of its own: recipe, state, log, report, and the network that was trained
    runs/x/            the student, taught by what the first stage made

A first stage is a training like any other, whose student is another network: for `mtkd` the aggregation network,
which makes one teacher of several, for `pisr` a teacher that sees the HR image. `stage1.run` names a run whose first
stage is used again: runs/x, or a run of the first stage alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from srkd.aggregate import Aggregate
from srkd.errors import SrkdError
from srkd.loaded import LoadedModel
from srkd.methods import check_teachers
from srkd.methods.mtkd import network_config
from srkd.models import load_aggregate, load_privileged
from srkd.networks import build, zoo_name
from srkd.networks.dctswin import DctSwin
from srkd.networks.privileged import PrivilegedTeacher
from srkd.recipe import load_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from srkd.networks.dctswin import DctSwinConfig
    from srkd.recipe import Recipe

FOLDER = "stage1"


@dataclass(frozen=True)
class Kind:
    """A kind of first stage.

    trains      what it trains, in a word
    summary     what it does, in a line
    network     the network that it trains, with fresh weights, for a recipe and its number of teachers
    untrained   the teacher of the second stage before the first: enough to check everything beforehand
    trained     the teacher in the folder that the first stage left; one that does not fit the recipe is refused
    """

    trains: str
    summary: Callable[[Recipe], str]
    network: Callable[[Recipe, int], DctSwin | PrivilegedTeacher]
    untrained: Callable[[Recipe, Sequence[LoadedModel]], LoadedModel]
    trained: Callable[[Recipe, Path], LoadedModel]


def kind_of(recipe: Recipe) -> Kind:
    """The kind of first stage of a recipe whose method has one."""
    return KINDS[recipe.method.first_stage]


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


def first_stage_folder(recipe: Recipe, trained: Path | None) -> Path | None:
    """Where the trained teacher is: what `stage1.run` names, else `trained`."""
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


def with_network_of(recipe: Recipe, teacher: nn.Module) -> Recipe:
    """The recipe, which names the aggregation network that is there: it may be another run's."""
    if not isinstance(teacher, Aggregate):
        return recipe
    method, found = recipe.method.first_stage, teacher.network.config
    known = {f.name: getattr(found, f.name) for f in fields(found)}
    known |= {"blocks": len(found.depths), "layers": found.depths[0]}
    config = recipe.method.configs[method]
    own = {f.name: known[f.name] for f in fields(config) if f.name in known}
    configs = {**recipe.method.configs, method: replace(config, **own)}
    return replace(recipe, method=replace(recipe.method, configs=configs))


# -- mtkd: an aggregated teacher -----------------------------------------------------------------


def wanted_network(recipe: Recipe, teachers: int) -> DctSwinConfig:
    """The aggregation network that the recipe describes."""
    config = recipe.method.configs[recipe.method.first_stage]
    return network_config(config, teachers, recipe.student.scale)


def aggregation_network(recipe: Recipe, teachers: int) -> DctSwin:
    """The aggregation network with fresh weights."""
    return DctSwin(wanted_network(recipe, teachers))


def aggregated_teacher(recipe: Recipe, folder: Path) -> LoadedModel:
    """The teacher that a first stage made; other teachers than it had, or in another order, are refused."""
    models = [os.path.expandvars(spec) for spec in recipe.teacher.models]
    model = load_aggregate(folder, models or None, recipe.student.scale)
    assert isinstance(model.network, Aggregate)
    _check_network(recipe, model.network.network.config, folder)
    return replace(model, name=f"aggregate of {', '.join(model.network.names)}")


def untrained_aggregate(recipe: Recipe, teachers: Sequence[LoadedModel]) -> LoadedModel:
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


# -- pisr: a teacher that sees the HR image ------------------------------------------------------


def privileged_network(recipe: Recipe, _: int) -> PrivilegedTeacher:
    """Encoder and decoder with fresh weights; the decoder is the student's architecture."""
    return PrivilegedTeacher(build(recipe.student.network, recipe.student.scale))


def untrained_privileged(recipe: Recipe, _: Sequence[LoadedModel]) -> LoadedModel:
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        network = privileged_network(recipe, 0)
    return LoadedModel(network, PRIVILEGED, Path(), network.facts)


def privileged_teacher(recipe: Recipe, folder: Path) -> LoadedModel:
    """The teacher of `pisr` that a first stage made; one for another student is refused."""
    check_teachers(recipe.method, [True] * len(recipe.teacher.models))
    model = load_privileged(folder, recipe.student.scale)
    assert isinstance(model.network, PrivilegedTeacher)
    found, wanted = model.network, privileged_network(recipe, 0)
    if found.arguments != wanted.arguments:
        decoder = found.decoder
        name = zoo_name(decoder.family, decoder.arguments) or decoder.family
        raise SrkdError(
            f"the first stage in {folder} is for a student {name}, which starts with the weights of its teacher, but "
            f"the student is {recipe.student.network}; give a first stage of this student, or train one."
        )
    return replace(model, name=PRIVILEGED)


PRIVILEGED = "privileged teacher"
KINDS = {
    "mtkd": Kind(
        trains="aggregation network",
        summary=lambda recipe: f"aggregation of {len(recipe.teacher.models)} teachers",
        network=aggregation_network,
        untrained=untrained_aggregate,
        trained=aggregated_teacher,
    ),
    "pisr": Kind(
        trains=PRIVILEGED,
        summary=lambda recipe: f"a teacher of {recipe.student.network} that sees the HR image",
        network=privileged_network,
        untrained=untrained_privileged,
        trained=privileged_teacher,
    ),
}
