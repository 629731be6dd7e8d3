"""Runs of tiny networks that were never trained, and pictures: what the tests of the demo's service share."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from demo.jobs import Choice, CompareRequest, Progress, Result
from srkd.files import sha256
from srkd.images import write_png
from srkd.models import save_model
from srkd.networks import build, build_family

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from demo.jobs import Event
    from demo.lane import Lane, Turn

TEACHER = {"channels": 20, "blocks": 4}
CHOICES = (Choice("tiny_scratch"), Choice("tiny_distilled"))


def write_run(folder: Path, seed: int, training: dict[str, Any], **sizes: int) -> Path:
    """A run folder of edsr_tiny at x2, or of an EDSR of other sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_family("edsr", {**sizes, "scale": 2}) if sizes else build("edsr_tiny", 2)
    save_model(folder, network, {"training": training} if training else {})
    return folder


def write_runs(root: Path) -> list[str]:
    """A teacher, a student from scratch and a distilled one, all x2."""
    teacher = write_run(root / "tiny_teacher", 1, {"method": "scratch", "teachers": []}, **TEACHER)
    own = sha256(teacher / "weights.safetensors")
    taught = {"method": "fitnet", "teachers": [{"name": "tiny_teacher", "weights_sha256": own}]}
    scratch = write_run(root / "tiny_scratch", 2, {"method": "scratch", "teachers": []})
    return [str(p) for p in (teacher, scratch, write_run(root / "tiny_distilled", 3, taught))]


def pixels(h: int, w: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """(h, w, channels) uint8: blocks of 3 px, so that it is not mere noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-h // 3), -(-w // 3), channels))
    fine = np.kron(coarse, np.ones((3, 3, 1)))
    return fine[:h, :w].astype(np.uint8)


def picture(path: Path, h: int = 24, w: int = 36, seed: int = 0) -> Path:
    write_png(path, pixels(h, w, seed))
    return path


def request(path: Path, *choices: Choice, **settings: Any) -> CompareRequest:
    return CompareRequest(path, settings.pop("name", "photo.png"), choices or CHOICES, **settings)


@contextmanager
def held(lane: Lane) -> Iterator[None]:
    """A job runs in `lane` for as long as the block lasts."""
    go, begun = threading.Event(), threading.Event()

    def hold(turn: Turn[str]) -> None:
        begun.set()
        go.wait(10)

    reader = threading.Thread(target=lambda: list(lane.run(hold)))
    reader.start()
    assert begun.wait(10)
    try:
        yield
    finally:
        go.set()
        reader.join(10)


def last(events: Iterable[Event]) -> Result:
    """The result of a job that is read to its end."""
    results = [event for event in events if not isinstance(event, Progress)]
    assert results[-1].complete and not any(result.complete for result in results[:-1])
    return results[-1]
