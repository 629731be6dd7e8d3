"""What the page's choices are and which are set at first: names of networks, engines, and a link's query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from demo.jobs import MOST_CHOICES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from demo.entries import EngineEntry, ModelEntry

# One of each first: the page is about a student with and without its teacher.
FIRST_KINDS = ("teacher", "scratch", "distilled")


@dataclass(frozen=True)
class Settings:
    """Values of the widgets that a link carries; every one is a key of the service's tables."""

    scale: int
    models: tuple[str, ...]
    engine: str
    precision: str
    reference: str


def scales(models: Sequence[ModelEntry]) -> list[int]:
    return sorted({entry.scale for entry in models})


def of_scale(models: Sequence[ModelEntry], scale: int) -> list[ModelEntry]:
    return [entry for entry in models if entry.scale == scale]


def first_models(models: Sequence[ModelEntry], scale: int) -> tuple[str, ...]:
    """One teacher, one student from scratch, one distilled student; where none is of these kinds, all."""
    here = of_scale(models, scale)
    keys = [next((entry.key for entry in here if entry.kind == kind), None) for kind in FIRST_KINDS]
    found = tuple(key for key in keys if key is not None)
    return found or tuple(entry.key for entry in here)[:MOST_CHOICES]


def first_reference(models: Sequence[ModelEntry], chosen: Sequence[str]) -> str:
    """The teacher among the chosen networks, else the first of them."""
    kinds = {entry.key: entry.kind for entry in models}
    teachers = [key for key in chosen if kinds[key] == "teacher"]
    return (teachers or list(chosen))[0]


def usable(engines: Sequence[EngineEntry]) -> list[EngineEntry]:
    return [entry for entry in engines if entry.reason is None]


def precisions_of(engines: Sequence[EngineEntry], key: str) -> tuple[str, ...]:
    return next(entry.precisions for entry in engines if entry.key == key)


def from_query(
    query: Mapping[str, str], models: Sequence[ModelEntry], engines: Sequence[EngineEntry]
) -> Settings:
    """A link's settings; what it does not say, or what does not exist here, is as on a fresh page."""
    known = [str(scale) for scale in scales(models)]
    scale = int(query["scale"]) if query.get("scale") in known else first_scale(models)
    here = [entry.key for entry in of_scale(models, scale)]
    asked = [key for key in query.get("models", "").split(",") if key in here]
    chosen = tuple(dict.fromkeys(asked))[:MOST_CHOICES] or first_models(models, scale)
    runs_here = [entry.key for entry in usable(engines)]
    engine = query["engine"] if query.get("engine") in runs_here else runs_here[0]
    precisions = precisions_of(engines, engine)
    precision = query["precision"] if query.get("precision") in precisions else precisions[0]
    named = query.get("reference")
    reference = named if named in chosen else first_reference(models, chosen)
    return Settings(scale, chosen, engine, precision, reference)


def first_scale(models: Sequence[ModelEntry]) -> int:
    """The scale with most networks, the smaller one of two alike."""
    return max(scales(models), key=lambda scale: (len(of_scale(models, scale)), -scale))


def model_label(entry: ModelEntry) -> str:
    """The label with the number of parameters, in millions."""
    return f"{entry.label} · {entry.parameters / 1e6:.2f}\u00a0M"
