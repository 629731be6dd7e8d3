"""What the demo's parts hand to each other: what was asked for, what happens, what came out. Plain data.

Nothing here is a path that a user wrote: models, engines and panes are named by keys of our own tables.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Role = Literal["truth", "nearest", "bicubic", "model"]
# Keys of the panes that are no models; a model's key never equals one of them.
TRUTH, NEAREST, BICUBIC = "truth", "nearest", "bicubic"
MOST_CHOICES = 6


@dataclass(frozen=True)
class Choice:
    """One network as one engine runs it: keys of `Service.models` and `Service.engines`."""

    model: str
    engine: str = "torch"
    precision: str = "fp32"


@dataclass(frozen=True)
class CompareRequest:
    """One picture through 1 to `MOST_CHOICES` choices of one scale.

    picture   the upload, a file of the server's own
    name      what the user called it; shown and used for names of downloads after cleaning
    choices   which networks; all of one scale
    truth     the HR picture, scale times the LR after the usual crop at the right and bottom, or None
    shrink    `picture` is the HR picture itself: it becomes the truth, its bicubic reduction the LR
    reference the model key that agreement is counted against where there is no truth; None: the first choice
    tile      side of a tile in LR pixels, or "auto"
    """

    picture: Path
    name: str
    choices: tuple[Choice, ...]
    truth: Path | None = None
    shrink: bool = False
    reference: str | None = None
    tile: int | Literal["auto"] = "auto"


@dataclass(frozen=True)
class Progress:
    """`done` in [0, 1] over the whole job, never falling; `text` is "model 2/4 · tile 7/20 · ~12 s"."""

    done: float
    text: str
    left_s: float | None = None


@dataclass(frozen=True)
class Numbers:
    """One row of the table. None = not measured, or it does not apply.

    psnr_y, ssim_y, psnr_rgb     against the truth, protocol `Result.protocol`
    agreement_db                 PSNR-Y against the reference model's picture, named as that
    consistency_db               PSNR-Y of the picture, reduced again, against the LR
    model_s, total_s             of this one run: inside the network; with decoding, tiles and encoding
    warm                         the engine had run before, so no loading or compiling is in `model_s`
    p50_ms, p95_ms, runs, timed_px   of "Measure the speed": model only, warm, at `timed_px` (h, w)
    busy                         other work took part of the processors while that was measured
    parameters, macs_g           multiply-adds for this picture
    peak_mib                     of the process while it ran
    parity                       verdict of the engine's parity record, "REFERENCE" for torch fp32
    """

    psnr_y: float | None = None
    ssim_y: float | None = None
    psnr_rgb: float | None = None
    agreement_db: float | None = None
    consistency_db: float | None = None
    model_s: float | None = None
    total_s: float | None = None
    warm: bool | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    runs: int | None = None
    timed_px: tuple[int, int] | None = None
    busy: bool | None = None
    parameters: int | None = None
    macs_g: float | None = None
    peak_mib: float | None = None
    engine: str | None = None
    precision: str | None = None
    device: str | None = None
    parity: str | None = None


@dataclass(frozen=True)
class Pane:
    """One finished picture. `file` is a lossless PNG of the server's own, `size` (H, W) in its pixels."""

    key: str
    label: str
    role: Role
    file: Path
    size: tuple[int, int]
    numbers: Numbers = field(default_factory=Numbers)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """All panes, in the order of the viewer: truth (if any), nearest, bicubic, then the choices as asked.

    `lr_size` (h, w); `protocol` is printed beside the metrics; `reference` is the pane key that agreement
    counts against, None with a truth. `complete` is False while the job runs, and for good where it was stopped.
    """

    panes: tuple[Pane, ...]
    name: str
    scale: int
    lr_size: tuple[int, int]
    protocol: str
    reference: str | None = None
    complete: bool = True
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As downloaded: no path of the server."""
        record = asdict(self)
        for pane, row in zip(self.panes, record["panes"], strict=True):
            row["file"] = pane.file.name
        return record


@dataclass(frozen=True)
class BatchFile:
    """One file of a batch: `entry` is its name in the zip, or `error` the sentence why there is none.

    `name` as the user called it, `lr_size` (h, w) and `sr_size` (H, W).
    """

    name: str
    entry: str | None = None
    lr_size: tuple[int, int] | None = None
    sr_size: tuple[int, int] | None = None
    seconds: float | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class BatchResult:
    """A finished batch: the zip, complete, and its files in the order they were given."""

    zip: Path
    files: tuple[BatchFile, ...]


# A job yields Progress and, after every finished pane and at the end, the Result so far.
Event = Progress | Result
