"""The crops of a training with cached outputs of its teachers beside them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from srkd.aggregate import Aggregate
from srkd.devices import wait_for
from srkd.passes import forward
from srkd.progress import StatusLine, counter, duration
from srkd.step import to_image
from srkd.teacher_cache import TaughtImages, open_teacher_cache, plan_teacher_cache

if TYPE_CHECKING:
    from srkd.inputs import Inputs
    from srkd.loaded import LoadedModel
    from srkd.training import Training


def with_cached_teachers(training: Training, inputs: Inputs, *, quiet: bool = False) -> Inputs:
    """`inputs`, whose crops bring the teachers' outputs along if the recipe asks for a teacher cache.

    What is not cached yet is computed here; its time, its disk and the time that it saves are said before.
    """
    recipe = training.recipe
    if not recipe.teacher.cache or training.done >= recipe.train.iterations:
        return inputs
    cache = Path(os.path.expandvars(recipe.data.cache)) if recipe.data.cache else None
    say = StatusLine(quiet=quiet).say
    taught = []
    for model, weights in zip(training.teachers, training.teacher_hashes, strict=True):
        plan = plan_teacher_cache(weights, inputs.data, cache)
        if isinstance(model.network, Aggregate):
            # Made of its teachers' cached outputs wherever these were there, also after they are gone.
            stacked = plan_teacher_cache(weights, inputs.data, cache, stacked=True)
            if stacked.ready:
                taught.append(TaughtImages(stacked.folder))
                continue
        if not plan.ready:
            spent = online_seconds(training, model, inputs)
            say(
                f"teacher cache: saves the passes of {model.name}, {duration(spent)} of this training"
            )
        taught.append(
            open_teacher_cache(
                model,
                weights,
                inputs.data,
                cache,
                training.device,
                progress=counter(f"caching {model.name}", quiet=quiet),
                say=say,
                stacked=_of_members(model, inputs, cache),
            )
        )
    return inputs.crops_for(recipe, taught)


def _of_members(model: LoadedModel, inputs: Inputs, cache: Path | None) -> list[TaughtImages]:
    """Cached outputs of the teachers of an aggregated one, when a first stage left those of all."""
    if not isinstance(model.network, Aggregate):
        return []
    hashes = [member["weights_sha256"] for member in model.info["aggregates"]]
    plans = [plan_teacher_cache(weights, inputs.data, cache) for weights in hashes]
    return [TaughtImages(p.folder) for p in plans] if all(p.ready for p in plans) else []


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
