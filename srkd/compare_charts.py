"""The charts of a comparison: gains, quality against what a network and its training cost, learning curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srkd import plots

if TYPE_CHECKING:
    from collections.abc import Callable

    from srkd.compare import Comparison, Table
    from srkd.compare_rows import Row
    from srkd.plots import Figure


BEGINNING = 0.2  # of a training
# What a network costs: in the title, on the axis, and of a row.
SIZES: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
    ("parameters", "thousand parameters", lambda row: row.parameters / 1000),
    ("multiply-adds", "G multiply-adds at 256x256 LR pixels", lambda row: row.macs_g),
    ("time", "ms for 256x256 LR pixels", lambda row: row.latency_ms),
)


def charts(comparison: Comparison, *, curves: bool) -> list[list[Figure]]:
    """Per table: gains, quality against cost of training and of the network, and learning curves."""
    # One order for all, so that a method looks the same everywhere.
    order = list(dict.fromkeys(r.series for t in comparison.tables for r in t.rows))
    return [
        [
            *_gain_chart(table, order),
            *_training_cost_charts(table, order, comparison.baseline),
            *_size_charts(table, order),
            *(_curve_charts(table, order) if curves else []),
        ]
        for table in comparison.tables
    ]


def _by(rows: list[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _who(row: Row) -> str:
    return f"{row.student} x{row.scale}"


def _quality_label(table: Table) -> str:
    return plots.clipped(f"PSNR-Y in dB, mean over {', '.join(table.sets)}", 90)


def _gain_chart(table: Table, order: list[str]) -> list[Figure]:
    groups: dict[str, list[plots.Dot]] = {}
    for row in table.rows:
        if row.gain is not None:
            total, seeds = row.gain.over(), [*row.gain.differences]
            single = [sum(d.values()) / len(d) for d in row.gain.differences.values()]
            solid = row.gain.within_spread is False
            dot = plots.Dot(
                row.series, total.mean, total.sd, single if len(seeds) > 1 else [], solid
            )
            groups.setdefault(_who(row), []).append(dot)
    if not groups:
        return []
    label = f"gain in PSNR-Y, dB, mean over {', '.join(table.sets)}"
    return [plots.dot_rows("Gain over scratch", groups, plots.clipped(label, 90), order)]


def _training_cost_charts(table: Table, order: list[str], baseline: str) -> list[Figure]:
    figures = []
    for who, rows in _by([r for r in table.rows if r.cost and r.sets], _who).items():
        points = [
            plots.Point(r.series, r.cost, r.quality().mean, r.quality().sd)
            for r in rows
            if r.cost is not None
        ]
        if len(points) > 1:
            title = f"Quality against training cost: {who}"
            x = f"time of a training step ({baseline} = 1)"
            figures.append(plots.plane(title, points, x, _quality_label(table), order))
    return figures


def _size_charts(table: Table, order: list[str]) -> list[Figure]:
    """Against parameters, multiply-adds and time, where there is more than one student at a scale."""
    figures = []
    for scale, rows in _by([r for r in table.rows if r.sets], lambda r: f"x{r.scale}").items():
        students = plots.clipped(", ".join(dict.fromkeys(r.student for r in rows)), 60)
        for what, label, value in SIZES:
            known = [(row, x) for row in rows if (x := value(row)) is not None]
            xs = {row.student: x for row, x in known}
            if len(xs) < 2:
                continue
            points = [
                plots.Point(row.series, x, row.quality().mean, row.quality().sd) for row, x in known
            ]
            title = f"Quality against {what}: {students}, {scale}"
            wide = max(xs.values()) >= 10 * min(xs.values())
            label = f"{label}; methods of one student side by side"
            figures.append(
                plots.plane(title, points, label, _quality_label(table), order, log_x=wide)
            )
    return figures


def _curve_charts(table: Table, order: list[str]) -> list[Figure]:
    """Where runs were validated at more than one step; the steep beginning, which hides the rest, is left out."""
    figures = []
    for who, rows in _by(table.rows, _who).items():
        last = max((step for row in rows for step, _ in row.curve()), default=0)
        late = {r.series: [p for p in r.curve() if p[0] >= BEGINNING * last] for r in rows}
        if curves := {series: points for series, points in late.items() if len(points) > 1}:
            title = f"Learning curves: {who}, mean over seeds, after the first {BEGINNING:.0%}"
            label = _quality_label(table)
            figures.append(plots.lines(title, curves, "iterations", label, order))
    return figures
