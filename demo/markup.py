"""The few pieces of HTML that the page makes itself; every text that goes in is escaped here."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from demo.jobs import Progress
    from demo.scores import Table

LONG_CELL = 11  # characters, of which the cells of numbers have no more
PART = " · "
PASSING = re.compile(r"(tile|round) \d|~")


def status(text: str, done: float | None = None) -> str:
    """The status line; with `done` in [0, 1] a bar beside it.

    What a screen reader announces stands apart: Gradio changes only what differs, so it stays silent until the stage
    changes.
    """
    bar = (
        ""
        if done is None
        else f'<progress max="1" value="{done:.3f}" aria-label="progress"></progress>'
    )
    return (
        f'<p class="srkd-page-status">{bar}<span>{escape(text)}</span></p>{_announced(stage(text))}'
    )


def stage(text: str) -> str:
    """A text of `Progress` without the parts that change all the time: tile, round, time left."""
    return PART.join(part for part in text.split(PART) if not PASSING.match(part))


def progress(event: Progress) -> str:
    return status(event.text, event.done)


def refusal(sentence: str) -> str:
    shown = f'<p class="srkd-page-status srkd-page-refusal"><span>{escape(sentence)}</span></p>'
    return shown + _announced(f"Not done. {sentence}")


def _announced(text: str) -> str:
    return f'<p class="srkd-page-announced" role="status">{escape(text)}</p>'


def table(content: Table) -> str:
    """A table whose first column names the rows; it scrolls by itself where it is wider than the page."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in content.headers)
    body = "".join(_row(content, number) for number in range(len(content.rows)))
    notes = "".join(f"<li>{escape(note)}</li>" for note in content.notes)
    return (
        '<div class="srkd-page-table" tabindex="0" role="region" aria-label="results">'
        f'<table aria-describedby="srkd-page-caption"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="srkd-page-hint" id="srkd-page-caption">{escape(content.caption)}</p>'
        + (f'<ul class="srkd-page-notes">{notes}</ul>' if notes else "")
    )


def _row(content: Table, number: int) -> str:
    name, *cells = content.rows[number]
    best = {column for row, column in content.marks if row == number}
    texts = "".join(_cell(cell, column in best) for column, cell in enumerate(cells, start=1))
    return f'<tr><th scope="row">{escape(name)}</th>{texts}</tr>'


def _cell(text: str, best: bool) -> str:
    """Short cells stay on one line, so that the usual columns fit; the best of a column is bold beside its star."""
    classes = {"srkd-page-best": best, "srkd-page-long": len(text) > LONG_CELL}
    own = " ".join(name for name, holds in classes.items() if holds)
    return f'<td class="{own}">{escape(text)}</td>'


def unavailable(engines: Sequence[tuple[str, str]]) -> str:
    """Engines that cannot run here, each with the reason in words."""
    if not engines:
        return ""
    items = "".join(
        f'<li aria-disabled="true"><s>{escape(label)}</s> not available here: {escape(reason)}</li>'
        for label, reason in engines
    )
    return f'<ul class="srkd-page-unavailable">{items}</ul>'


def origins(examples: Sequence[tuple[str, str, str, str]]) -> str:
    """Title, what to look for, source and licence of each example, folded away."""
    if not examples:
        return ""
    items = "".join(
        f"<dt>{title}</dt><dd>{about}</dd><dd>Source: {source}. Licence: {licence}.</dd>"
        for title, about, source, licence in (map(escape, example) for example in examples)
    )
    return (
        '<details class="srkd-page-origins"><summary>About the examples: sources and licences</summary>'
        f"<dl>{items}</dl></details>"
    )


def hint(text: str) -> str:
    return f'<p class="srkd-page-hint">{escape(text)}</p>'
