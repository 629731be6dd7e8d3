"""srkd: distil, evaluate, export, verify, measure and compare super-resolution networks.

    import srkd
    model = srkd.load_model("rcan_c")                       # a run folder, a checkpoint, a shipped name
    cards = srkd.list_models()                              # what weights/ holds, with scores and licences
    picture = srkd.upscale("photo.png", model)              # (H, W, 3) uint8
    result = srkd.distill("recipes/rcan_a_x4.toml", out="runs/a")

Importing this loads no torch; the functions do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from srkd.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from srkd.attribution import Row
    from srkd.cards import Card
    from srkd.models import LoadedModel
    from srkd.recipe import Recipe
    from srkd.train import Result

__all__ = ["__version__", "attribute", "distill", "list_models", "load_model", "upscale"]


def load_model(spec: str | Path, scale: int | None = None) -> LoadedModel:
    """Load a run folder, weights file, official checkpoint or shipped model; see `srkd.models`."""
    from srkd.models import load_model

    return load_model(spec, scale)


def list_models() -> list[Card]:
    """The shipped networks by name: size, method, teachers, scores, licence; see `srkd.cards`."""
    from srkd.cards import list_models

    return list_models()


def upscale(image: Any, model: LoadedModel | str | Path, **options: Any) -> np.ndarray:
    """Upscale a picture (path, array (H, W, 3), PIL image or tensor); see `srkd.infer.upscale`."""
    from srkd.infer import upscale

    return upscale(image, model, **options)


def distill(recipe: Recipe | str | Path, out: str | Path, **options: Any) -> Result:
    """Train a recipe (object or TOML file) into the run folder `out`; see `srkd.train.distill`."""
    from pathlib import Path

    from srkd.recipe import Recipe, load_recipe
    from srkd.train import distill

    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    return distill(loaded, out, **options)


def attribute(
    model: LoadedModel | str | Path, image: Any, window: tuple[int, int, int], **options: Any
) -> Row:
    """Which input pixels decide a window (x, y, size) of the output; see `srkd.attribution.attribute`.

    An aggregated teacher has a map for each of its teachers: `srkd.attribution.attribute_all`.
    """
    from srkd.attribution import attribute

    return attribute(model, image, window, **options)
