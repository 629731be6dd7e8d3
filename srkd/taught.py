"""The crops of a training with cached outputs of its teachers beside them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from srkd.aggregate import Aggregate
from srkd.data.cache import check_space
from srkd.devices import wait_for
from srkd.passes import forward
from srkd.progress import StatusLine, counter, duration
from srkd.step import to_image
from srkd.teacher_cache import TEACHER_CACHE, open_teacher_cache, plan_teacher_cache

if TYPE_CHECKING:
    from collections.abc import Callable

    from srkd.inputs import Inputs
    from srkd.loaded import LoadedModel
    from srkd.teacher_cache import CachePlan, TaughtImages
    from srkd.training import Training


class StoppedError(Exception):
    """The user asked for a stop while outputs were computed; nothing half-written is left."""


def with_cached_teachers(
    training: Training, inputs: Inputs, stop: Callable[[], bool], *, quiet: bool = False
) -> Inputs:
    """`inputs`, whose crops bring the teachers' outputs along if the recipe asks for a teacher cache.

    What is not cached yet is computed here; its time, its disk and the time that it saves are said before.
    An aggregated teacher is computed from the cached outputs of its teachers, so what it is does not depend
    on what lies in the cache. `StoppedError` when `stop()` says so between two images.
    """
    recipe = training.recipe
    if not recipe.teacher.cache or training.done >= recipe.train.iterations:
        return inputs
    opener = _Opener(training, inputs, stop, quiet)
    models = list(zip(training.teachers, training.teacher_hashes, strict=True))
    opener.check_disk(models)
    return inputs.crops_for(recipe, [opener.open(model, weights) for model, weights in models])


@dataclass
class _Opener:
    training: Training
    inputs: Inputs
    stop: Callable[[], bool]
    quiet: bool

    @property
    def cache(self) -> Path | None:
        given = self.training.recipe.data.cache
        return Path(os.path.expandvars(given)) if given else None

    def plan(self, model: LoadedModel, weights: str) -> CachePlan:
        stacked = isinstance(model.network, Aggregate)
        return plan_teacher_cache(weights, self.inputs.data, self.cache, stacked=stacked)

    def missing(self, model: LoadedModel, weights: str) -> list[CachePlan]:
        """What has to be computed for a teacher, that of its own teachers included."""
        plan = self.plan(model, weights)
        if plan.ready:
            return []
        return [plan, *(p for m, w in members(model) for p in self.missing(m, w))]

    def check_disk(self, models: list[tuple[LoadedModel, str]]) -> None:
        """Everything must fit before the first image is computed."""
        plans = {p.folder: p for m, w in models for p in self.missing(m, w)}
        if plans:
            folder = next(iter(plans)).parent
            folder.mkdir(parents=True, exist_ok=True)
            needed = sum(plan.bytes for plan in plans.values())
            check_space(folder, f"the outputs of {len(plans)} teachers", needed)

    def open(self, model: LoadedModel, weights: str) -> TaughtImages:
        say = StatusLine(quiet=self.quiet).say
        stacked = []
        if not self.plan(model, weights).ready:
            spent = online_seconds(self.training, model, self.inputs)
            say(
                f"{TEACHER_CACHE}: saves the passes of {model.name}, {duration(spent)} of this training"
            )
            stacked = [self.open(m, w) for m, w in members(model)]
        show = counter(f"caching {model.name}", quiet=self.quiet)

        def progress(done: int, total: int) -> None:
            if self.stop():
                raise StoppedError
            show(done, total)

        return open_teacher_cache(
            model,
            weights,
            self.inputs.data,
            self.cache,
            self.training.device,
            progress=progress,
            say=say,
            stacked=stacked,
        )


def members(model: LoadedModel) -> list[tuple[LoadedModel, str]]:
    """The teachers of an aggregated one with their hashes; none of any other."""
    if not isinstance(model.network, Aggregate):
        return []
    hashes = [member["weights_sha256"] for member in model.info["aggregates"]]
    return list(zip(model.network.members, hashes, strict=True))


@torch.no_grad()
def online_seconds(training: Training, model: LoadedModel, inputs: Inputs) -> float:
    """Time that a teacher's passes over the crops of the remaining steps would take, from one batch."""
    t, parts = training, training.recipe.train.accumulate
    lr = to_image(inputs.sampler.batch(0).lr.chunk(parts)[0], t)
    with torch.autocast(t.device.type, torch.bfloat16, enabled=t.precision == "bf16"):
        forward(model.network, lr)  # kernels are chosen
        wait_for(t.device)
        start = time.perf_counter()
        forward(model.network, lr)
        wait_for(t.device)
    return (time.perf_counter() - start) * parts * (t.recipe.train.iterations - t.done)
