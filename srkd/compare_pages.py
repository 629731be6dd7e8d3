"""A comparison as text on a terminal, GitHub Markdown, SVG charts and one HTML page."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from srkd import plots
from srkd.compare_charts import charts
from srkd.compare_rows import command_of
from srkd.files import write_json, write_text
from srkd.papers import ABOUT, ARXIV, BUDGETS
from srkd.progress import duration

if TYPE_CHECKING:
    from pathlib import Path

    from srkd.compare import Comparison, PaperRow, Table
    from srkd.compare_rows import Row, Spread
    from srkd.papers import PaperGain
    from srkd.plots import Figure

LEGEND = (
    "PSNR-Y in dB ± sample standard deviation over seeds / SSIM-Y (± -: one seed, no spread), on the "
    "validation sets of the runs. Gain: PSNR-Y in dB over the same student from scratch with the same "
    "budget, paired by seed, mean over the sets; 'not significant': not larger than its own spread, so the "
    "seed alone could have made it. G multiply-adds: fvcore rule, 256x256 LR."
)
NOT_SIGNIFICANT = " not significant"
PAPER_TEXT = 5  # all columns of the papers' table
RUN_TEXT = 6  # and of the runs'
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
    return spread_text(total, "+.3f") + pairs + (NOT_SIGNIFICANT if total.covers_zero else "")


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def cells(table: Table, baseline: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one budget's table."""
    timed = any(row.latency_ms is not None for row in table.rows)
    header = [
        *("method", "student", "teacher", "gain", *table.sets, "seeds"),
        *("parameters", "G multiply-adds", *(["ms, 256x256 LR"] if timed else [])),
        *("steps/s", f"cost ({baseline} = 1)"),
    ]
    rows = [
        [
            row.label,
            f"{row.student} x{row.scale}",
            row.teacher or "-",
            gain_text(row),
            *(
                f"{spread_text(row.score(s, 'psnr_y'), '.3f')} / {row.score(s, 'ssim_y').mean:.4f}"
                for s in table.sets
            ),
            str(len(row.seeds)),
            f"{row.parameters:,}",
            f"{row.macs_g:,.2f}",
            *([_known(row.latency_ms, ",.1f")] if timed else []),
            _known(row.steps_per_s, ".2f"),
            _known(row.cost, ".2f"),
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
            "; ".join(
                f"{name} {spread_text(gain, '+.3f')}{NOT_SIGNIFICANT if gain.covers_zero else ''}"
                for name, gain in p.ours.items()
            ),
            "; ".join(entry(g) for g in p.papers),
            over(p),
        ]
        for p in rows
    ]
    return header, lines, [f"[{i}] {note}" for i, note in enumerate(notes, 1)]


def budget_lines(comparison: Comparison) -> list[str]:
    """What the papers' gains were trained with, beside what ours were."""
    ours = [f"here: {title}" for title in table_titles(comparison)]
    named = dict.fromkeys(gain.paper for row in comparison.papers for gain in row.papers)
    return [*ours, *(f"{paper}, arXiv {ARXIV[paper]}: {BUDGETS[paper]}" for paper in named)]


def run_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of runs: where every number comes from, and how to make it again."""
    header = ["run", "seed", "weights (sha256)", "trained", "on", "made again by"]
    rows = [
        [
            str(run.folder),
            str(run.recipe.seed),
            run.weights_sha256[:16],
            duration(run.seconds),
            run.device,
            command_of(run),
        ]
        for table in comparison.tables
        for row in table.rows
        for run in row.runs
    ]
    return header, rows


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
    for note in _notes(comparison):
        _print(note)
    if comparison.papers:
        header, rows, notes = paper_cells(comparison.papers)
        _print("\nAgainst the papers: gain over scratch, PSNR-Y in dB")
        _print_table(header, rows, text=PAPER_TEXT)
        _print("\n".join([*notes, ABOUT, *budget_lines(comparison)]))


def _notes(comparison: Comparison) -> list[str]:
    return [note for note in (comparison.cost_note, comparison.speed_note) if note]


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


# -- files --------------------------------------------------------------------------------------


def write_folder(folder: Path, comparison: Comparison, name: str = "compare") -> list[Path]:
    """NAME.json, NAME.md and, where there is something to draw, NAME.svg."""
    written = [folder / f"{name}.json", folder / f"{name}.md"]
    write_json(written[0], comparison.to_dict())
    picture = ""
    if drawing := drawings(comparison):
        picture = f"{name}.svg"
        written.append(folder / picture)
        write_text(written[-1], drawing)
    write_text(written[1], markdown(comparison, picture=picture))
    return written


def drawings(comparison: Comparison) -> str:
    """All charts as one SVG document, empty where there is nothing to draw."""
    drawn: list[Figure] = []
    titles = table_titles(comparison)
    for title, figures in zip(titles, charts(comparison, curves=False), strict=True):
        if figures:
            drawn += [plots.heading(title), *figures]
    return plots.svg(drawn, comparison.title) if drawn else ""


def markdown(comparison: Comparison, *, picture: str) -> str:
    """`picture` is the file of the charts, empty for none."""
    lines = [f"# {_md(comparison.title)}", ""]
    for text in comparison.about:
        lines += [_md(text), ""]
    for title, table in zip(table_titles(comparison), comparison.tables, strict=True):
        lines += [f"## {_md(title)}", ""]
        if table.differences:
            lines += [_md(differs(table)), ""]
        lines += _markdown_table(*cells(table, comparison.baseline))
        lines += [f"- {_md(note)}" for note in table.notes]
        lines += [""] if table.notes else []
    if picture:
        lines += [f"![Gain over scratch, and quality against cost]({picture})", ""]
    lines += [_md(LEGEND), ""]
    for note in _notes(comparison):
        lines += [_md(note), ""]
    if comparison.papers:
        header, rows, notes = paper_cells(comparison.papers)
        lines += ["## Against the papers", "", "Gain over scratch, PSNR-Y in dB.", ""]
        lines += _markdown_table(header, rows, text=PAPER_TEXT)
        notes = [*notes, *budget_lines(comparison)]
        lines += [ABOUT, "", *(f"- {_md(note)}" for note in notes), ""]
    lines += ["## Runs", "", *_markdown_table(*run_cells(comparison), text=RUN_TEXT)]
    if left_out := _left_out(comparison):
        lines += ["## Left out", "", *(f"- {_md(line)}" for line in left_out), ""]
    return "\n".join(lines)


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
.whole td,.whole th{white-space:nowrap}.whole td:nth-child(3){white-space:normal;min-width:13rem}
p,li{max-width:70rem}.soft,li{color:var(--soft);font-size:.9rem}.bad{color:var(--fg);font-weight:600}
svg{display:block;max-width:100%;height:auto;margin:1.2rem 0}
"""


def html(comparison: Comparison) -> str:
    """One page without any other file: tables, charts, learning curves."""
    parts = [f"<h1>{escape(comparison.title)}</h1>"]
    parts += [f"<p>{escape(text)}</p>" for text in comparison.about]
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
    parts += [f'<p class="soft">{escape(note)}</p>' for note in _notes(comparison)]
    if comparison.papers:
        header, rows, notes = paper_cells(comparison.papers)
        parts.append("<h2>Against the papers: gain over scratch, PSNR-Y in dB</h2>")
        parts.append(_html_table(header, rows, text=PAPER_TEXT))
        parts.append(f'<p class="soft">{escape(ABOUT)}</p>')
        parts.append(_html_list([*notes, *budget_lines(comparison)]))
    parts += ["<h2>Runs</h2>", _html_table(*run_cells(comparison), text=RUN_TEXT)]
    if left_out := _left_out(comparison):
        parts += ["<h2>Left out</h2>", _html_list(left_out)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(comparison.title)}</title><style>{PAGE_STYLE}</style></head>\n<body>\n"
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
