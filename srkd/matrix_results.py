"""What a matrix of runs gives: its plan as a table, and the comparison of what is finished.

OUT/results.json  report.md  report.svg  report.html
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from srkd.compare import Comparison, Speed, compare
from srkd.compare_pages import drawings, html, markdown
from srkd.errors import SrkdError
from srkd.files import read_json, write_json, write_text
from srkd.finished import find_runs
from srkd.matrix_run import matrix_seconds, seconds_left
from srkd.progress import duration

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from srkd.matrix import PlannedRun, Standing
    from srkd.matrix_run import Pace

RESULTS = "results.json"


# -- the plan -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanLine:
    """A planned run, how far it is, and the seconds that are left (None: not known)."""

    run: PlannedRun
    standing: Standing
    left_s: float | None

    def to_dict(self) -> dict[str, Any]:
        command = ["python", "scripts/distill.py", *self.run.words, "--out", str(self.run.folder)]
        return {
            "run": str(self.run.folder),
            "row": self.run.row,
            "state": self.standing.state,
            "steps": self.standing.steps,
            "of": self.standing.of,
            "seconds_left": self.left_s,
            "command": shlex.join(command),
        }


def plan_lines(
    runs: Sequence[PlannedRun], standings: Sequence[Standing], pace: Pace
) -> list[PlanLine]:
    return [
        PlanLine(run, s, 0.0 if s.state == "done" else seconds_left(run, pace))
        for run, s in zip(runs, standings, strict=True)
    ]


def plan_table(lines: Sequence[PlanLine], jobs: int) -> str:
    """Aligned text: a line per run, and the whole."""
    rows = [
        (
            str(line.run.folder),
            line.standing.state,
            f"{line.standing.steps:,}/{line.standing.of:,}",
            "unknown" if line.left_s is None else duration(line.left_s),
        )
        for line in lines
    ]
    header = ("run", "state", "steps", "left")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    text = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                row[1].ljust(widths[1]),
                *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)),
            ]
        )
        for row in [header, *rows]
    ]
    todo = [line.left_s for line in lines if line.standing.state != "done"]
    whole = matrix_seconds(todo, jobs)
    time = "unknown" if whole is None else duration(whole)
    at_once = f"{jobs} at a time" if jobs > 1 else "one after the other"
    ready = len(lines) - len(todo)
    return "\n".join([*text, "", f"{ready} of {len(lines)} done; the rest takes {time}, {at_once}"])


# -- the results --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """`unequal` are lines about runs that do not share the budget of the others at their scale."""

    comparison: Comparison
    unequal: list[str]
    written: list[Path]


def known_speed(out: Path, pairs: Sequence[tuple[str, int]]) -> Speed | None:
    """Times that an earlier report has, if it has those of all networks."""
    if not (out / RESULTS).is_file():
        return None
    found = read_json(out / RESULTS).get("speed") or {}
    ms = {tuple(pair): value for *pair, value in found.get("ms", [])}
    return Speed(ms, found["note"]) if {*pairs} <= ms.keys() else None


def write_results(
    out: Path, matrix: Path, runs: Sequence[PlannedRun], failed: dict[str, str], speed: Speed | None
) -> Results:
    """Compare the runs of the matrix that are finished, and write the pages."""
    begun = [run.folder for run in runs if run.folder.is_dir()]
    finding = find_runs(begun)
    comparison = compare(finding, speed=speed)
    unequal = unequal_budgets(comparison)
    command = f"python scripts/matrix.py {shlex.quote(str(matrix))} --out {shlex.quote(str(out))}"
    about = (
        f"{len(finding.runs)} of {len(runs)} runs are finished. Again, or on with them: {command}",
        *(f"Failed: {name}: {said}" for name, said in failed.items()),
        *(
            unequal
            or [
                "All runs of a scale had the same budget: steps on HR, batch, patch, schedule, training images "
                "(by digest) and validation."
            ]
        ),
    )
    comparison = replace(comparison, title=f"Results of {matrix.name}", about=about)
    document = {
        "matrix": str(matrix),
        "command": command,
        "planned": [str(run.folder) for run in runs],
        "failed_runs": failed,
        "equal_budget": not unequal,
        "speed": speed and {"note": speed.note, "ms": [[*pair, v] for pair, v in speed.ms.items()]},
        **comparison.to_dict(),
    }
    written = [out / name for name in (RESULTS, "report.md", "report.html")]
    write_json(written[0], document)
    drawing = drawings(comparison)
    if drawing:
        written.append(out / "report.svg")
        write_text(written[-1], drawing)
    write_text(written[1], markdown(comparison, picture="report.svg" if drawing else ""))
    write_text(written[2], html(comparison))
    return Results(comparison, unequal, written)


def unequal_budgets(comparison: Comparison) -> list[str]:
    """Where the runs of one scale do not stand in one table, with what differs."""
    first: dict[int, dict[str, Any]] = {}
    lines = []
    for table in comparison.tables:
        scales = {row.scale for row in table.rows}
        for scale in sorted(scales):
            known = first.setdefault(scale, table.budget)
            different = [
                f"{key}: {known[key]} -> {value}"
                for key, value in table.budget.items()
                if value != known[key]
            ]
            if different:
                who = ", ".join(str(run.folder) for r in table.rows for run in r.runs)
                lines.append(f"UNEQUAL BUDGET at x{scale}: {'; '.join(different)} in {who}")
    return lines


def check_any(runs: Sequence[PlannedRun], failed: dict[str, str]) -> None:
    """Without a finished run there is nothing to report."""
    if not any((run.folder / "model.json").is_file() for run in runs):
        why = (
            f" ({'; '.join(f'{name}: {said}' for name, said in failed.items())})" if failed else ""
        )
        raise SrkdError(f"no run of the matrix is finished{why}; nothing to report yet.")
