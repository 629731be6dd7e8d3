"""What the four papers report: the gain of a method over the same student trained without a teacher.

`paper_results.csv` holds PSNR-Y of the students in the main tables, without ablations:

    MTKD   Tables 2-4   arXiv 2404.09571        DUKD  Table 2       arXiv 2309.14162
    MiPKD  Tables 2-4   arXiv 2404.02573        MKD   Tables 4, 5   arXiv 2207.08356

Names of students and methods are the papers'. A cell that cannot be right as printed is left empty, and
its note says what is printed: no gain is computed from it.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

ABOUT = (
    "Gains of the papers are over their own scratch rows. Their training budget, data, teachers and "
    "students differ from those of the runs here, so they say what a method can give, not what it "
    "should give here."
)
ARXIV = {"MTKD": "2404.09571", "DUKD": "2309.14162", "MiPKD": "2404.02573", "MKD": "2207.08356"}
BUDGETS = {
    "MTKD": "250,000 iterations, batch 16, LR patch 64, DIV2K (800 images); teachers SwinIR, RCAN and EDSR as published",
    "DUKD": "250,000 iterations, batch 16, LR patch 48, DIV2K (800 images); teacher: the large network of the student's family",
    "MiPKD": "250,000 iterations, batch 16, LR patch 48, DIV2K (800 images); teacher: the large network of the student's family",
    "MKD": "as many epochs as each student needs (numbers not printed) in two stages, batch 16, LR patch 48, DIV2K (800 "
    "images); teachers as published",
}
# Sets of the papers' tables; Urban100 joins only where a run was validated on it.
USUAL_SETS = ("Set5", "Set14", "BSD100")
SETS = (*USUAL_SETS, "Urban100")
OUR_NAME = {
    "Scratch": "scratch",
    "Scratch (compact)": "scratch",  # MTKD
    "Vanilla": "scratch",  # MKD
    "KD": "logits",
    "FitNet": "fitnet",
    "AT": "at",
    "RKD": "rkd",
    "FAKD": "fakd",
    "VID": "vid",
    "ICKD": "ickd",
    "L2T-ww": "l2tww",
    "CrossKD": "crosskd",
    "CSD": "csd",
    "PISR": "pisr",
    "DUKD": "dukd",
    "MTKD": "mtkd",
    "MiPKD": "mipkd",
    "MKD": "mkd",
}


@dataclass(frozen=True)
class PaperGain:
    """Mean PSNR-Y gain over `sets` in dB, of one student in one table."""

    paper: str
    table: str
    student: str
    gain_db: float
    sets: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Cell:
    psnr_y: float
    note: str


Key = tuple[str, str, int, str, str]  # paper, table, scale, student, method (our name)


@cache
def _cells() -> dict[Key, dict[str, _Cell]]:
    """The file by row of a paper's table: set -> cell; empty cells are left out."""
    rows: dict[Key, dict[str, _Cell]] = {}
    text = resources.files("srkd").joinpath("paper_results.csv").read_text(encoding="utf-8")
    for line in csv.DictReader(text.splitlines()):
        scale, method = int(line["scale"]), OUR_NAME[line["method"]]
        key = (line["paper"], line["table"], scale, line["student"], method)
        row = rows.setdefault(key, {})
        if line["psnr_y"]:
            row[line["dataset"]] = _Cell(float(line["psnr_y"]), line["note"])
    return rows


def sets_for(measured: Iterable[str]) -> tuple[str, ...]:
    """The papers' sets among the measured ones; the usual three where none is."""
    measured = set(measured)
    return tuple(s for s in SETS if s in measured) or USUAL_SETS


def paper_gains(method: str, scale: int, sets: Iterable[str]) -> list[PaperGain]:
    """Every gain of `method` at `scale` that the papers report on at least one of `sets`."""
    wanted = tuple(sets)
    rows = _cells()
    found = []
    for (paper, table, row_scale, student, name), cells in rows.items():
        if (name, row_scale) != (method, scale) or name == "scratch":
            continue
        scratch = rows.get((paper, table, scale, student, "scratch"), {})
        both = tuple(s for s in wanted if s in cells and s in scratch)
        if not both:
            continue
        gains = [cells[s].psnr_y - scratch[s].psnr_y for s in both]
        notes = [c.note for s in both for c in (cells[s], scratch[s]) if c.note]
        if missing := [s for s in wanted if s not in both]:
            notes.append(f"without {', '.join(missing)}: a cell is in doubt or not given")
        mean = sum(gains) / len(gains)
        found.append(PaperGain(paper, table, student, mean, both, tuple(dict.fromkeys(notes))))
    return found
