"""What an event asks for, read from values that anyone may have sent, as the service's plain requests.

The page's own widgets send sound values, but every event can be reached over HTTP with any others.
Keys are looked up by `Service.check`; here each value gets the type and range that it must have.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from demo.jobs import MOST_CHOICES, Choice, CompareRequest
from demo.uploads import Upload, upload_of
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from demo.entries import ModelEntry

Tile = int | Literal["auto"]
Format = Literal["png", "original"]
MOST_KEY = 100
TILE_PX = (16, 1024)


@dataclass(frozen=True)
class Asked:
    """The values of the comparison's widgets as they came, in the order in which events send them."""

    picture: Any
    truth: Any
    shrink: Any
    models: Any
    engine: Any
    precision: Any
    reference: Any
    tile: Any = "auto"


def compare_request(asked: Asked, models: Sequence[ModelEntry], folder: Path) -> CompareRequest:
    """A request whose files lie in `folder`; wrong types and too many networks are refused."""
    picture = upload_of(asked.picture, folder)
    shrink = asked.shrink is True
    truth = None
    if asked.truth:
        if shrink:
            raise SrkdError(
                "The picture is said to be the ground truth itself, and another ground truth was given; "
                "remove one of the two."
            )
        truth = upload_of(asked.truth, folder, "ground truth").path
    choices = choices_of(models, asked.models, asked.engine, asked.precision)
    chosen = [choice.model for choice in choices]
    reference = asked.reference or None
    return CompareRequest(
        picture=picture.path,
        name=picture.name,
        choices=choices,
        truth=truth,
        shrink=shrink,
        # The page keeps its reference when that network is no longer ticked; then the first one counts.
        reference=key_of(reference, "reference") if reference in chosen else None,
        tile=tile_of(asked.tile),
    )


def choices_of(
    known: Sequence[ModelEntry], models: Any, engine: Any, precision: Any
) -> tuple[Choice, ...]:
    """Networks by their keys, on one engine at one precision; an exported file goes on its own."""
    if not isinstance(models, list) or not models:
        raise SrkdError(f"No network is chosen; tick 1 to {MOST_CHOICES}.")
    if len(models) > MOST_CHOICES:
        raise SrkdError(f"{len(models)} networks are chosen; tick {MOST_CHOICES} or fewer.")
    keys = [key_of(model, "network") for model in models]
    on = key_of(engine, "engine"), key_of(precision, "precision")
    own = {entry.key: (entry.engine or on[0], entry.precision or on[1]) for entry in known}
    return tuple(Choice(key, *own.get(key, on)) for key in keys)


def key_of(value: Any, what: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MOST_KEY:
        raise SrkdError(f"The {what} is not a name; choose one of the list.")
    return value


def tile_of(value: Any) -> Tile:
    """Side of a tile in LR pixels, or "auto"."""
    low, high = TILE_PX
    if value is None or value == "auto":
        return "auto"
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SrkdError(
            f"The tile is {value!r:.40}; give a whole number from {low} to {high}, or 'auto'."
        )
    return value


def format_of(value: Any) -> Format:
    if value not in ("png", "original"):
        raise SrkdError("The format is unknown; choose 'png' or 'original'.")
    return value


def batch_of(files: Any, folder: Path, most: int) -> list[Upload]:
    if not isinstance(files, list) or not files:
        raise SrkdError(f"There are no files; upload 1 to {most}.")
    if len(files) > most:
        raise SrkdError(
            f"{len(files)} files are more than the {most} of one batch; send them in parts."
        )
    return [upload_of(file, folder, "file") for file in files]
