"""Numbers beside the pictures: how they are computed, and the table of them as cells, CSV and JSON.

    PSNR-Y, SSIM-Y, PSNR-RGB   against the truth, as papers print them (`srkd.metrics`)
    agreement                  PSNR-Y against another network's picture: closeness to it, not quality
    consistency                the picture is reduced by the bicubic rule that makes LR pictures, and compared with
                               the LR by PSNR-Y over the whole picture, no border cropped

All are taken on decoded 8-bit arrays, before anything is encoded for display.
"""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch

from deploy.benchmark import three_digits
from deploy.environment import describe
from deploy.speed import SAME
from srkd.cost import macs_by_size
from srkd.data.degradation import downscale_uint8
from srkd.metrics import PAPER_Y, RGB, WINDOW_PX, Protocol, psnr, ssim
from srkd.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from torch import Tensor, nn

    from demo.jobs import Numbers, Pane, Result
    from srkd.types import Facts

CONSISTENCY = Protocol(
    "consistency-y", luma=True, crop=0, about="Y of BT.601 (16-235), the whole picture"
)
BEST = "★"
NOTHING = "–"
FORMAT = 1


# --- scores -------------------------------------------------------------------------------------


def protocol_of(scale: int) -> str:
    """The words printed beside the scores against a truth."""
    return (
        f"PSNR-Y and SSIM-Y (BT.601, 16–235), PSNR-RGB; 8-bit, border {PAPER_Y.border_px(scale)} px"
    )


def scores(
    sr: np.ndarray,
    scale: int,
    truth: np.ndarray | None = None,
    reference: np.ndarray | None = None,
    lr: np.ndarray | None = None,
) -> dict[str, float]:
    """What can be scored of one picture, under the names of `Numbers`; dB and SSIM, inf where equal.

    `sr`, `truth`, `reference` (H, W, 3) uint8 of one size; `lr` (H/scale, W/scale, 3) uint8. Scores that a picture
    is too small for are left out: `too_small` says which.
    """
    inner = _inner_px(sr.shape, scale)
    found: dict[str, float] = {}
    if truth is not None and inner >= 1:
        both = _planes(sr), _planes(truth)
        found["psnr_y"] = float(psnr(*both, scale))
        if inner >= WINDOW_PX:
            found["ssim_y"] = float(ssim(*both, scale))
        found["psnr_rgb"] = float(psnr(*both, scale, RGB))
    if reference is not None and inner >= 1:
        found["agreement_db"] = float(psnr(_planes(sr), _planes(reference), scale))
    if lr is not None:
        reduced = downscale_uint8(sr, scale)
        found["consistency_db"] = float(psnr(_planes(reduced), _planes(lr), scale, CONSISTENCY))
    return found


def too_small(size: tuple[int, int], scale: int) -> list[str]:
    """A sentence about the scores that pictures of `size` (H, W) are too small for; empty when there are none."""
    inner = _inner_px(size, scale)
    if inner >= WINDOW_PX:
        return []
    border = PAPER_Y.border_px(scale)
    what, least = ("SSIM", WINDOW_PX) if inner >= 1 else ("PSNR and SSIM", 1)
    least += 2 * border
    return [
        f"{size[1]}x{size[0]} px are too small for {what}: with a border of {border} px cropped they need "
        f"{least}x{least}"
    ]


def _inner_px(size: Sequence[int], scale: int) -> int:
    """The shorter side of (H, W, ...) without the border that is cropped."""
    return min(size[:2]) - 2 * PAPER_Y.border_px(scale)


def _planes(rgb: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) uint8."""
    return torch.tensor(rgb).permute(2, 0, 1)[None]


# The network is run at three small sizes to count it, which takes seconds for a large one.
_counted: WeakKeyDictionary[nn.Module, Callable[[tuple[int, int]], int] | None] = (
    WeakKeyDictionary()
)


def cost_of(
    network: nn.Module, lr_size: tuple[int, int], facts: Facts | None = None
) -> tuple[int, float | None]:
    """Parameters, and multiply-adds in G (1e9) of one pass over a whole LR picture of `lr_size` (h, w).

    By the rule of fvcore (`srkd.cost`), without the halos of tiles. None where only a run at that very size could tell,
    which may be hundreds of times as much work as the picture in tiles. `facts` for networks that are not ours.
    """
    if network not in _counted:
        _counted[network] = macs_by_size(network, facts=facts)
    macs = _counted[network]
    parameters = sum(p.numel() for p in network.parameters())
    return parameters, None if macs is None else macs(lr_size) / 1e9


# --- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Plain text to be escaped by whoever puts it into a page.

    `marks` are the (row, column) of the best values, whose text ends in a star too; `notes` belong under the table.
    """

    headers: list[str]
    rows: list[list[str]]
    caption: str
    marks: frozenset[tuple[int, int]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """One column: its header, the text of a pane's cell, and the values among which the best is marked.

    `best` of p50 is "low": times that lie closer together than `SAME` are ties. Others tie when their text is equal.
    """

    header: str
    text: Callable[[Pane], str]
    value: Callable[[Pane], float | None] = lambda pane: None
    best: Literal["high", "low", "none"] = "none"


def table(result: Result) -> Table:
    """Every pane as a row: scores (Y first, then RGB), times, cost. Columns that nobody has a value for are left out."""
    columns = [c for c in _columns(result) if any(c.text(p) != NOTHING for p in result.panes)]
    rows = [[pane.label, *(c.text(pane) for c in columns)] for pane in result.panes]
    marks = {
        (r, c + 1)
        for c, column in enumerate(columns)
        for r in _best(column, result.panes, c + 1, rows)
    }
    for r, c in marks:
        rows[r][c] += f" {BEST}"
    notes = dict.fromkeys(
        [*result.notes, *(f"{p.label}: {note}" for p in result.panes for note in p.notes)]
    )
    headers = ["picture", *(c.header for c in columns)]
    return Table(headers, rows, _caption(result, bool(marks)), frozenset(marks), tuple(notes))


def _columns(result: Result) -> list[Column]:
    def number(name: str, show: Callable[[Any], str]) -> Callable[[Pane], str]:
        def text(pane: Pane) -> str:
            value = getattr(pane.numbers, name)
            return NOTHING if value is None else show(value)

        return text

    def scored(name: str, header: str, digits: int) -> Column:
        def value(pane: Pane) -> float | None:
            if pane.role == "truth" or (name == "agreement_db" and pane.key == result.reference):
                return None
            return getattr(pane.numbers, name)

        def text(pane: Pane) -> str:
            if name == "agreement_db" and pane.key == result.reference:
                return "reference"
            found = value(pane)
            return NOTHING if found is None else score_text(found, digits)

        return Column(header, text, value, "high")

    reference = next((p.label for p in result.panes if p.key == result.reference), "the reference")
    return [
        scored("psnr_y", "PSNR-Y (dB)", 2),
        scored("ssim_y", "SSIM-Y", 4),
        scored("psnr_rgb", "PSNR-RGB (dB)", 2),
        scored("agreement_db", f"agreement with {reference} (PSNR-Y, dB)", 2),
        scored("consistency_db", "consistency: reduced again, against the LR (PSNR-Y, dB)", 2),
        Column("one run: network (s)", _one_run),
        Column("one run: in all (s)", number("total_s", three_digits)),
        Column("p50 (ms)", number("p50_ms", three_digits), _quiet_p50, "low"),
        Column("p95 (ms)", number("p95_ms", three_digits)),
        Column("timed", lambda p: _timed(p.numbers)),
        Column("parameters", number("parameters", lambda n: f"{n:,}")),
        Column("multiply-adds (G)", number("macs_g", three_digits)),
        Column("peak memory, server process (MiB)", number("peak_mib", three_digits)),
        Column("engine", lambda p: _engine(p.numbers)),
        Column("parity", number("parity", str)),
    ]


def score_text(value: float, digits: int) -> str:
    """A score with a fixed number of decimals; "inf" is told as what it means."""
    return "equal (inf)" if math.isinf(value) else f"{value:.{digits}f}"


def _one_run(pane: Pane) -> str:
    n = pane.numbers
    if n.model_s is None:
        return NOTHING
    return three_digits(n.model_s) + {True: ", warm", False: ", cold", None: ""}[n.warm]


def _timed(n: Numbers) -> str:
    if n.runs is None or n.timed_px is None:
        return NOTHING
    busy = ", on a busy machine" if n.busy else ""
    return f"n = {n.runs}, LR {n.timed_px[1]}x{n.timed_px[0]} px{busy}"


def _quiet_p50(pane: Pane) -> float | None:
    """Nothing is the fastest by a time that other work has lengthened."""
    return None if pane.numbers.busy else pane.numbers.p50_ms


def _engine(n: Numbers) -> str:
    if n.engine is None:
        return NOTHING
    return " ".join(part for part in (n.engine, n.precision, n.device) if part)


def _best(column: Column, panes: Sequence[Pane], c: int, rows: list[list[str]]) -> list[int]:
    """Rows whose value is the best of a column; none where fewer than two have one."""
    values = {r: v for r, p in enumerate(panes) if (v := column.value(p)) is not None}
    if column.best == "none" or len(values) < 2:
        return []
    if column.best == "low":
        return [r for r, v in values.items() if v <= min(values.values()) * (1 + SAME)]
    top = max(values, key=lambda r: values[r])
    return [r for r in values if rows[r][c] == rows[top][c]]


def _caption(result: Result, marked: bool) -> str:
    h, w = result.lr_size
    numbers = [pane.numbers for pane in result.panes]
    parts = [f"{shown_name(result.name)}: LR {w}x{h} px, x{result.scale}"]
    if not result.complete:
        # While the job runs it is the same table.
        parts.append("not finished: pictures that were asked for are missing")
    if any(n.psnr_y is not None for n in numbers):
        parts.append(result.protocol)
    if any(n.agreement_db is not None for n in numbers):
        border = PAPER_Y.border_px(result.scale)
        parts.append(
            f"no ground truth, so agreement tells how close pictures are, not how good (BT.601, 16–235, border {border} px)"
        )
    if any(n.consistency_db is not None for n in numbers):
        parts.append("consistency: bicubic reduction in 8 bits, no border cropped")
    if any(n.model_s is not None for n in numbers):
        parts.append("one run is no measurement; cold: with loading or compiling")
    if any(n.p50_ms is not None for n in numbers):
        parts.append(
            f"p50, p95: the network alone, warm, taking turns, on photographs; less than {100 * SAME:.0f} % apart is a tie"
        )
    if any(n.macs_g is not None for n in numbers):
        parts.append("multiply-adds of one pass over the whole LR picture, counted as fvcore does")
    if marked:
        parts.append(f"{BEST} best of the column, ties included")
    return "; ".join(parts) + "."


# --- downloads of the table ---------------------------------------------------------------------


def shown_name(name: str) -> str:
    """The last part of what a user called a file, as one line of valid text, at most 120 characters."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    # Undecodable bytes of names arrive as lone surrogates, which no UTF-8 file can hold.
    valid = last.encode("utf-8", "replace").decode()
    return "".join(c for c in valid if c.isprintable())[:120] or "picture"


def to_csv(result: Result) -> str:
    """A line per pane, every number in full; RFC 4180 (CRLF), UTF-8. Units are in the header."""
    facts: dict[str, Any] = {
        "picture": shown_name(result.name),
        "scale": result.scale,
        "lr_h": result.lr_size[0],
        "lr_w": result.lr_size[1],
        "protocol": result.protocol,
        "reference": result.reference,
        "complete": result.complete,
    }
    lines = []
    for pane in result.panes:
        n = asdict(pane.numbers)
        timed = n.pop("timed_px") or (None, None)
        row = {"key": pane.key, "label": pane.label, "role": pane.role, "sr_h": pane.size[0]}
        row |= {"sr_w": pane.size[1], **{_UNITS.get(k, k): v for k, v in n.items()}}
        row |= {"timed_lr_h": timed[0], "timed_lr_w": timed[1]}
        lines.append({**row, **facts, "notes": "; ".join((*result.notes, *pane.notes))})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(list(lines[0]))
    writer.writerows([_cell(v) for v in line.values()] for line in lines)
    return file.getvalue()


_UNITS = {"psnr_y": "psnr_y_db", "psnr_rgb": "psnr_rgb_db", "macs_g": "multiply_adds_g"}


def _cell(value: Any) -> Any:
    # Spreadsheets run text that starts like a formula; an apostrophe in front makes it text.
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return f"'{value}"
    return value


def to_json(result: Result) -> str:
    """One document: what made it, where, when, and every pane with its numbers; "inf" for pictures that are equal."""
    document = {
        "format": FORMAT,
        **made_on(),
        "consistency": f"{CONSISTENCY.about}; reduced by bicubic interpolation, rounded to 8 bits",
        **result.to_json(),
        "name": shown_name(result.name),
    }
    return json.dumps(_spelt(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def made_on() -> dict[str, Any]:
    """Version of srkd, time (UTC), and the machine, for documents that leave it."""
    where = describe()
    return {
        "srkd": __version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {key: where[key] for key in ("machine", "cpu", "cpus", "versions")},
    }


def _spelt(value: Any) -> Any:
    """JSON has no infinity, and null would read as not measured."""
    if isinstance(value, dict):
        return {key: _spelt(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_spelt(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
