"""The images of a run: decoded training set, crops, validation sets; checked before anything is trained."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import srkd.ranks as ranks
from srkd.data.cache import open_training_set
from srkd.data.sampling import PatchSampler
from srkd.errors import SrkdError
from srkd.evaluate import open_sets
from srkd.metrics import WINDOW_PX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from srkd.data.cache import TrainingSet
    from srkd.data.sets import EvaluationSet
    from srkd.recipe import Recipe
    from srkd.teacher_cache import TaughtImages


@dataclass(frozen=True)
class Inputs:
    """Decoded training set, the sampler that draws crops from it, and the validation sets."""

    data: TrainingSet
    sampler: PatchSampler
    sets: list[EvaluationSet]

    def crops_for(self, recipe: Recipe, taught: Sequence[TaughtImages] = ()) -> Inputs:
        """The same images with the crops of another recipe, and of cached outputs of its teachers."""
        return replace(self, sampler=_sampler(self.data, recipe, taught))


def open_inputs(
    recipe: Recipe, minimum_px: int = 1, progress: Callable[[int, int], None] | None = None
) -> Inputs:
    """Open all images of a recipe; what would fail later (small or broken images) fails here.

    `minimum_px` is the smallest LR side that the student takes.
    """
    d = recipe.data
    sets = open_validation(recipe, minimum_px)
    data = ranks.in_turn(
        lambda: open_training_set(
            os.path.expandvars(d.train),
            recipe.student.scale,
            lr=os.path.expandvars(d.lr) or None,
            cache=Path(os.path.expandvars(d.cache)) if d.cache else None,
            progress=progress,
        )
    )
    return Inputs(data, _sampler(data, recipe), sets)


def _sampler(
    data: TrainingSet, recipe: Recipe, taught: Sequence[TaughtImages] = ()
) -> PatchSampler:
    d, batch = recipe.data, recipe.train.batch
    return PatchSampler(
        data, d.patch, batch, recipe.seed, d.augment, ranks.rank(), ranks.world(), taught
    )


def open_validation(recipe: Recipe, minimum_px: int) -> list[EvaluationSet]:
    """The validation sets, every image read once and large enough for network and metric."""
    scale = recipe.student.scale
    sets = open_sets([os.path.expandvars(spec) for spec in recipe.validate.sets], scale)
    least = max(minimum_px, -(-(WINDOW_PX + 2 * scale) // scale))
    for evaluation_set in sets:
        for image in evaluation_set:
            h, w = image.lr.shape[:2]
            if min(h, w) < least:
                raise SrkdError(
                    f"validation image {evaluation_set.name}/{image.name} is {w}x{h} px in LR, but network "
                    f"and metric need {least} px on each side; leave it out of the set."
                )
    return sets
