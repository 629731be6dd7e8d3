"""A comparison as text on a terminal, GitHub Markdown, SVG charts and one HTML page."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from srkd import plots
from srkd.files import write_json, write_text
from srkd.papers import ABOUT, ARXIV

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from srkd.compare import Comparison, PaperRow, Table
    from srkd.compare_rows import Row, Spread
    from srkd.papers import PaperGain
    from srkd.plots import Figure

LEGEND = (
    "PSNR-Y in dB ± sample standard deviation over seeds / SSIM-Y (± -: one seed, no spread), on the "
    "validation sets of the runs. Gain: PSNR-Y in dB over the same student from scratch with the same "
    "budget, paired by seed, mean over the sets; 'within spread': not larger than its own spread, so the "
    "seed alone could have made it. G multiply-adds: fvcore rule, 256x256 LR."
)
PAPER_TEXT = 5  # all columns of the papers' table
TEXT_COLUMNS = 3  # method, student and teacher are text, the rest are numbers


def spread_text(value: Spread, form: str) -> str:
    mean = round(value.mean, 3) + 0.0  # never -0.000
    return f"{mean:{form}} ± " + ("-" if value.sd is None else f"{value.sd:.3f}")


def signed(value: float, decimals: int) -> str:
    """+0.00 and never -0.00."""
    return f"{round(value, decimals) + 0.0:+.{decimals}f}"


def gain_text(row: Row) -> str:
    if row.gain is None:
        return "baseline" if row.method == "scratch" else "-"
    total = row.gain.over()
    pairs = f" ({total.n} of {len(row.seeds)} seeds)" if total.n != len(row.seeds) else ""
    mark = " within spread" if row.gain.within_spread else ""
    return spread_text(total, "+.3f") + pairs + mark


def cells(table: Table, baseline: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one budget's table."""
    header = [
        *("method", "student", "teacher", "parameters", "G multiply-adds", "seeds"),
        *table.sets,
        *("gain", "steps/s", f"cost ({baseline} = 1)"),
    ]
    rows = [
        [
            row.label,
            f"{row.student} x{row.scale}",
            row.teacher or "-",
            f"{row.parameters:,}",
            f"{row.macs_g:,.2f}",
            str(len(row.seeds)),
            *(
                f"{spread_text(row.score(s, 'psnr_y'), '.3f')} / {row.score(s, 'ssim_y').mean:.4f}"
                for s in table.sets
            ),
            gain_text(row),
            "-" if row.steps_per_s is None else f"{row.steps_per_s:.2f}",
            "-" if row.cost is None else f"{row.cost:.2f}",
        ]
        for row in table.rows
    ]
    return header, rows


def paper_cells(rows: list[PaperRow]) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, rows and numbered notes of the table against the papers."""
    notes: list[str] = []

    def entry(gain: PaperGain) -> str:
        notes.extend(note for note in gain.notes if note not in notes)
        marks = ", ".join(str(i) for i in sorted(notes.index(note) + 1 for note in gain.notes))
        number = f"{gain.paper} {gain.student} {signed(gain.gain_db, 2)}"
        return f"{number} [{marks}]" if marks else number

    def over(row: PaperRow) -> str:
        ours, theirs = ", ".join(row.sets), ", ".join(row.paper_sets)
        return ours if ours == theirs else f"{ours} here, {theirs} there"

    header = ["method", "scale", "gain here", "gains in the papers", "over"]
    lines = [
        [
            p.method,
            f"x{p.scale}",
            "; ".join(f"{name} {spread_text(gain, '+.3f')}" for name, gain in p.ours.items()),
            "; ".join(entry(g) for g in p.papers),
            over(p),
        ]
        for p in rows
    ]
    return header, lines, [f"[{i}] {note}" for i, note in enumerate(notes, 1)]


def table_titles(comparison: Comparison) -> list[str]:
    many = len(comparison.tables) > 1
    return [
        f"Budget {i}: {t.title}" if many else f"Budget: {t.title}"
        for i, t in enumerate(comparison.tables, 1)
    ]


def differs(table: Table) -> str:
    return f"Not to be compared with budget 1. From there to here: {'; '.join(table.differences)}."


# -- terminal -----------------------------------------------------------------------------------


def print_comparison(comparison: Comparison) -> None:
    """Tables and notes on stdout."""
    for title, table in zip(table_titles(comparison), comparison.tables, strict=True):
        _print(title)
        if table.differences:
            _print(differs(table))
        _print_table(*cells(table, comparison.baseline))
        for note in table.notes:
            _print(f"- {note}")
        _print("")
    _print(LEGEND)
    _print(comparison.cost_note)
    if comparison.papers:
        header, rows, notes = paper_cells(comparison.papers)
        _print("\nAgainst the papers: gain over scratch, PSNR-Y in dB")
        _print_table(header, rows, text=PAPER_TEXT)
        _print("\n".join([*notes, ABOUT]))


def _print(text: str) -> None:
    print(text)  # noqa: T201


def _print_table(header: list[str], rows: list[list[str]], text: int = TEXT_COLUMNS) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as Shown
    from rich.text import Text

    shown = Shown(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        # A list may wrap; figures never do.
        wide = text == PAPER_TEXT
        justify = "left" if i < text else "right"
        shown.add_column(
            Text(name), justify=justify, no_wrap=not wide, max_width=72 if wide else None
        )
    for row in rows:
        shown.add_row(*map(Text, row))
    # Its natural width, whatever the terminal: rich would cut numbers off.
    Console(width=2000, highlight=False).print(shown)


# -- charts -------------------------------------------------------------------------------------


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
    """Where there is more than one student at a scale."""
    figures = []
    for scale, rows in _by([r for r in table.rows if r.sets], lambda r: f"x{r.scale}").items():
        students = {r.student: r.macs_g for r in rows}
        if len(students) > 1:
            title = f"Quality against the network's cost: {', '.join(students)}, {scale}"
            points = [
                plots.Point(r.series, r.macs_g, r.quality().mean, r.quality().sd) for r in rows
            ]
            x = "G multiply-adds at 256x256 LR pixels; methods of one student side by side"
            wide = max(students.values()) >= 10 * min(students.values())
            label, title = _quality_label(table), plots.clipped(title, 100)
            figures.append(plots.plane(title, points, x, label, order, log_x=wide))
    return figures


def _curve_charts(table: Table, order: list[str]) -> list[Figure]:
    """Where runs were validated at more than one step."""
    figures = []
    for who, rows in _by(table.rows, _who).items():
        curves = {r.series: r.curve() for r in rows if len(r.curve()) > 1}
        if curves:
            title = f"Learning curves: {who}, mean over seeds"
            label = _quality_label(table)
            figures.append(plots.lines(title, curves, "iterations", label, order))
    return figures


# -- files --------------------------------------------------------------------------------------


def write_folder(folder: Path, comparison: Comparison) -> list[Path]:
    """compare.json, compare.md and, where there is something to draw, compare.svg."""
    drawn: list[Figure] = []
    titles = table_titles(comparison)
    for title, figures in zip(titles, charts(comparison, curves=False), strict=True):
        if figures:
            drawn += [plots.heading(title), *figures]
    written = [folder / "compare.json", folder / "compare.md"]
    write_json(written[0], comparison.to_dict())
    if drawn:
        written.append(folder / "compare.svg")
        write_text(written[-1], plots.svg(drawn, "Comparison of runs"))
    write_text(written[1], markdown(comparison, picture=bool(drawn)))
    return written


def markdown(comparison: Comparison, *, picture: bool) -> str:
    lines = ["# Comparison of runs", ""]
    for title, table in zip(table_titles(comparison), comparison.tables, strict=True):
        lines += [f"## {_md(title)}", ""]
        if table.differences:
            lines += [_md(differs(table)), ""]
        lines += _markdown_table(*cells(table, comparison.baseline))
        lines += [f"- {_md(note)}" for note in table.notes]
        lines += [""] if table.notes else []
    if picture:
        lines += ["![Gain over scratch, and quality against cost](compare.svg)", ""]
    lines += [_md(LEGEND), "", _md(comparison.cost_note), ""]
    if comparison.papers:
        header, rows, notes = paper_cells(comparison.papers)
        lines += ["## Against the papers", "", "Gain over scratch, PSNR-Y in dB.", ""]
        lines += _markdown_table(header, rows, text=PAPER_TEXT)
        lines += [ABOUT, "", *(f"- {_md(note)}" for note in [*notes, _sources()]), ""]
    if left_out := _left_out(comparison):
        lines += ["## Left out", "", *(f"- {_md(line)}" for line in left_out), ""]
    return "\n".join(lines)


def _sources() -> str:
    return "Papers: " + ", ".join(f"{name} arXiv {number}" for name, number in ARXIV.items())


def _left_out(comparison: Comparison) -> list[str]:
    finding = comparison.finding
    failed = [f"{folder}: failed: {why}" for folder, why in finding.failed.items()]
    return [*failed, *(f"{folder}: {why}" for folder, why in finding.skipped.items())]


def _md(text: str) -> str:
    """Text that GitHub shows as it is."""
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, "\\" + sign)
    return text


def _markdown_table(
    header: list[str], rows: list[list[str]], text: int = TEXT_COLUMNS
) -> list[str]:
    rule = ["---" if i < text else "---:" for i in range(len(header))]
    lines = [list(map(_md, header)), rule, *(list(map(_md, row)) for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


PAGE_STYLE = """
:root{color-scheme:light dark;--fg:#24292f;--bg:#fff;--soft:#57606a;--rule:#d9dee3;--head:#f4f6f8}
@media(prefers-color-scheme:dark){
:root{--fg:#e6edf3;--bg:#0f1419;--soft:#9aa5b1;--rule:#303a45;--head:#1a2129}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);margin:2rem auto;
max-width:104rem;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2.2rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.87rem}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top}
th{background:var(--head)}.n{text-align:right;font-variant-numeric:tabular-nums}
.whole td,.whole th{white-space:nowrap}
p,li{max-width:70rem}.soft,li{color:var(--soft);font-size:.9rem}.bad{color:var(--fg);font-weight:600}
svg{display:block;max-width:100%;height:auto;margin:1.2rem 0}
"""


def html(comparison: Comparison) -> str:
    """One page without any other file: tables, charts, learning curves."""
    parts = ["<h1>Comparison of runs</h1>"]
    drawn = charts(comparison, curves=True)
    titles = table_titles(comparison)
    for title, table, figures in zip(titles, comparison.tables, drawn, strict=True):
        parts.append(f"<h2>{escape(title)}</h2>")
        if table.differences:
            parts.append(f'<p class="bad">{escape(differs(table))}</p>')
        parts.append(_html_table(*cells(table, comparison.baseline)))
        parts.append(_html_list(table.notes))
        parts += [plots.svg([figure], title) for figure in figures]
    parts.append(f'<p class="soft">{escape(LEGEND)}</p>')
    parts.append(f'<p class="soft">{escape(comparison.cost_note)}</p>')
    if comparison.papers:
        header, rows, notes = paper_cells(comparison.papers)
        parts.append("<h2>Against the papers: gain over scratch, PSNR-Y in dB</h2>")
        parts.append(_html_table(header, rows, text=PAPER_TEXT))
        parts.append(f'<p class="soft">{escape(ABOUT)}</p>')
        parts.append(_html_list([*notes, _sources()]))
    if left_out := _left_out(comparison):
        parts += ["<h2>Left out</h2>", _html_list(left_out)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Comparison of runs</title><style>{PAGE_STYLE}</style></head>\n<body>\n"
        + "\n".join(p for p in parts if p)
        + "\n</body></html>\n"
    )


def _html_table(header: list[str], rows: list[list[str]], text: int = TEXT_COLUMNS) -> str:
    def line(values: list[str], tag: str) -> str:
        kinds = ["" if i < text else ' class="n"' for i in range(len(values))]
        shown = zip(kinds, values, strict=True)
        return "<tr>" + "".join(f"<{tag}{k}>{escape(v)}</{tag}>" for k, v in shown) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    kind = "" if text == PAPER_TEXT else ' class="whole"'  # lists may wrap, figures do not
    head = f"<thead>{line(header, 'th')}</thead>"
    return f'<div class="wide"><table{kind}>{head}<tbody>{body}</tbody></table></div>'


def _html_list(items: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>" if items else ""
