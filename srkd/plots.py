"""Charts as SVG text: dots with spread by row, points in a plane, lines. Nothing but strings.

Colours follow the reader's light or dark setting, inside a page and as a file of their own. A series
keeps its colour and its marker in every chart that is given the same order of names.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH = 820
CHAR = 7.2  # px, wider than an average character at 12 px, so that no text runs into the next
STEP = 11.0  # px between points of one place
LIGHT = ("#2b6cb8", "#c45a10", "#23834f", "#b32d45", "#7450b5", "#87622f", "#b8408f", "#56626e")
DARK = ("#7db2f2", "#f2a561", "#63cb97", "#f47f92", "#bda1f0", "#cfa87c", "#ee96d0", "#aebac6")
MARKERS = ("circle", "square", "diamond", "triangle")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f}.b{font-weight:600}.m{fill:#57606a}"
    ".bg{fill:#fff}.g{stroke:#d9dee3}.z{stroke:#57606a}.o{fill:#fff}"
    + "".join(f".s{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(LIGHT))
    + "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.m{fill:#9aa5b1}.bg,.o{fill:#0f1419}"
    ".g{stroke:#303a45}.z{stroke:#9aa5b1}"
    + "".join(f".s{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(DARK))
    + "}"
)


@dataclass(frozen=True)
class Figure:
    """A drawing of WIDTH x `height` px."""

    height: float
    body: str


@dataclass(frozen=True)
class Dot:
    """A row of `dot_rows`: mean, spread and single values of one series, in one unit."""

    series: str
    mean: float
    sd: float | None
    values: Sequence[float]
    solid: bool  # filled marker: more than its spread away from zero


@dataclass(frozen=True)
class Point:
    """A point of `plane`; `y_sd` is drawn as a bar."""

    series: str
    x: float
    y: float
    y_sd: float | None = None


def svg(figures: Sequence[Figure], title: str) -> str:
    """One SVG document with the figures below each other."""
    height = sum(f.height for f in figures)
    parts, top = [], 0.0
    for figure in figures:
        parts.append(f'<g transform="translate(0 {top:.1f})">{figure.body}</g>')
        top += figure.height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" role="img"><title>{escape(title)}</title>'
        f'<style>{STYLE}</style><rect class="bg" width="100%" height="100%"/>'
        f"{''.join(parts)}</svg>\n"
    )


def heading(text: str) -> Figure:
    """Lines of text above the figures that it is about."""
    lines = textwrap.wrap(text, int(WIDTH / CHAR) - 2) or [""]
    body = "".join(_text(12, 20 + 17 * i, line, cls="b") for i, line in enumerate(lines))
    return Figure(10 + 17 * len(lines) + 6, body)


def clipped(text: str, width: int = 40) -> str:
    """At most `width` characters, the middle left out: a name may be of any length, a chart not."""
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[:half]}…{text[-half:]}"


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at or below `low` to at or above `high`."""
    step = (high - low) / count
    power = 10 ** math.floor(math.log10(step))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten, around [low, high]."""
    steps = [
        m * 10.0**p
        for p in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for m in (1, 2, 5)
    ]
    first = max(i for i, s in enumerate(steps) if s <= low * (1 + 1e-9))
    last = min((i for i, s in enumerate(steps) if s >= high * (1 - 1e-9)), default=len(steps) - 1)
    return steps[first : max(last, first + 1) + 1]


@dataclass(frozen=True)
class _Axis:
    """Values of `marks[0]..marks[-1]` on pixels `start..end`."""

    marks: list[float]
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = self._scaled(self.marks[0]), self._scaled(self.marks[-1])
        return self.start + (self._scaled(value) - low) / (high - low) * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def name(self, value: float, sign: bool = False) -> str:
        """With as many decimals as the step between marks needs."""
        if self.log:
            return f"{value:g}"
        step = self.marks[1] - self.marks[0]
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        value = 0.0 if abs(value) < step / 2 else value  # no "-0.0"
        return f"{value:+,.{decimals}f}" if sign and value else f"{value:,.{decimals}f}"


def _linear(values: Sequence[float], start: float, end: float) -> _Axis:
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(high), 1):  # one value: some room around it
        room = abs(high) * 0.05 or 1.0
        low, high = low - room, high + room
    return _Axis(ticks(low, high), start, end)


# -- charts -------------------------------------------------------------------------------------


def dot_rows(
    title: str, groups: Mapping[str, Sequence[Dot]], axis_label: str, order: Sequence[str]
) -> Figure:
    """One row per series under the name of its group: mean, spread as a bar, single values as small dots."""
    rows = [dot for dots in groups.values() for dot in dots]
    left = 24 + CHAR * max(len(clipped(name)) for name in [*groups, *(d.series for d in rows)])
    right = WIDTH - 150  # the numbers stand there
    ends = [v for d in rows for v in (d.mean - (d.sd or 0), d.mean + (d.sd or 0), *d.values)]
    axis = _linear([0.0, *ends], left + 12, right)
    top, step = 44, 24
    out = [_text(12, 20, title, cls="b")]
    bottom = top + step * (len(rows) + len(groups))
    for mark in axis.marks:
        x, zero = axis.at(mark), abs(mark) < 1e-12
        out.append(_line(x, top - 6, x, bottom, "z" if zero else "g"))
        out.append(_text(x, bottom + 16, axis.name(mark, sign=True), "middle", "m"))
    out.append(_text((left + right) / 2, bottom + 36, axis_label, "middle"))
    y = top + 8
    for name, dots in groups.items():
        out.append(_text(12, y + 4, clipped(name), cls="m"))
        y += step
        for dot in dots:
            out += _dot_row(dot, axis, y, left, order.index(dot.series))
            y += step
    key = (
        "filled: the mean is further from zero than the spread over seeds · hollow: it is not, or "
        "there is one seed · small dots: seeds"
    )
    out.append(_text(12, bottom + 56, key, cls="m"))
    return Figure(bottom + 76, "".join(out))


def _dot_row(dot: Dot, axis: _Axis, y: float, left: float, index: int) -> list[str]:
    style = index % len(LIGHT)
    out = [_text(left, y + 4, clipped(dot.series), "end")]
    out += [
        f'<circle class="f{style}" cx="{axis.at(v):.1f}" cy="{y:.1f}" r="2" opacity="0.55"/>'
        for v in dot.values
    ]
    spread = "one seed"
    if dot.sd is not None:
        low, high = axis.at(dot.mean - dot.sd), axis.at(dot.mean + dot.sd)
        out.append(_line(low, y, high, y, f"s{style}", 2))
        out += [_line(x, y - 4, x, y + 4, f"s{style}", 2) for x in (low, high)]
        spread = f"± {dot.sd:.3f}"
    out.append(_marker(axis.at(dot.mean), y, index, dot.solid))
    out.append(_text(WIDTH - 138, y + 4, f"{round(dot.mean, 3) + 0.0:+.3f} {spread}"))
    return out


def plane(
    title: str,
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    order: Sequence[str],
    *,
    log_x: bool = False,
) -> Figure:
    """Points with a legend; the horizontal axis may be logarithmic.

    Points of one x stand side by side around it, so that none hides another.
    """
    xs = [p.x for p in points]
    ys = [v for p in points for v in (p.y - (p.y_sd or 0), p.y + (p.y_sd or 0))]
    names = [p.series for p in points]
    # Room for what stands beside the first and the last place.
    room = STEP * (max(xs.count(x) for x in xs) - 1) / 2
    frame = _Frame.around(title, xs, ys, x_label, y_label, names, order, log_x, room)
    places = side_by_side([frame.x.at(p.x) for p in points])
    for p, x in zip(points, places, strict=True):
        y, index = frame.y.at(p.y), order.index(p.series)
        if p.y_sd:
            ends = frame.y.at(p.y - p.y_sd), frame.y.at(p.y + p.y_sd)
            frame.out.append(_line(x, ends[0], x, ends[1], f"s{index % len(LIGHT)}", 1.5))
        frame.out.append(_marker(x, y, index, solid=True))
    return frame.figure()


def side_by_side(xs: Sequence[float], step: float = STEP) -> list[float]:
    """Pixels of points, those of one place moved apart, but not half-way to the next place."""
    places = sorted(set(xs))
    gaps = [b - a for a, b in itertools.pairwise(places)]
    most = max(xs.count(x) for x in places)
    step = min(step, 0.8 * min(gaps, default=math.inf) / most)
    moved, used = [], dict.fromkeys(places, 0)
    for x in xs:
        moved.append(x + step * (used[x] - (xs.count(x) - 1) / 2))
        used[x] += 1
    return moved


def lines(
    title: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    order: Sequence[str],
) -> Figure:
    """One line per series through its (x, y), with a legend."""
    xs = [x for curve in curves.values() for x, _ in curve]
    ys = [y for curve in curves.values() for _, y in curve]
    frame = _Frame.around(title, [0.0, *xs], ys, x_label, y_label, [*curves], order, False)
    for series, curve in curves.items():
        index = order.index(series)
        path = " ".join(f"{frame.x.at(x):.1f},{frame.y.at(y):.1f}" for x, y in curve)
        style = index % len(LIGHT)
        # Series beyond the colours share them, and are told apart by their dashes.
        dash = (
            f' stroke-dasharray="{4 + 2 * (index // len(LIGHT))} 3"' if index >= len(LIGHT) else ""
        )
        frame.out.append(
            f'<polyline class="s{style}" fill="none" stroke-width="1.8"{dash} points="{path}"/>'
        )
        marks = [_marker(frame.x.at(x), frame.y.at(y), index, True, 3) for x, y in curve]
        frame.out.extend(marks)
    return frame.figure()


@dataclass(frozen=True)
class _Frame:
    """Axes, grid, labels and legend of a chart; what is drawn in it is added to `out`."""

    x: _Axis
    y: _Axis
    height: float
    out: list[str]

    @classmethod
    def around(
        cls,
        title: str,
        xs: Sequence[float],
        ys: Sequence[float],
        x_label: str,
        y_label: str,
        names: Sequence[str],
        order: Sequence[str],
        log_x: bool,
        room: float = 0.0,
    ) -> _Frame:
        """`room` px lie between the frame and the ends of the horizontal axis."""
        series = sorted(set(names), key=list(order).index)
        right = WIDTH - 48 - CHAR * max(len(clipped(s)) for s in series)
        top, bottom = 56.0, max(330.0, 68 + 20.0 * len(series))
        y = _linear(ys, bottom, top)
        left = 24 + CHAR * max(len(y.name(m)) for m in y.marks)
        x = (
            _Axis(log_ticks(min(xs), max(xs)), left + room, right - room, log=True)
            if log_x
            else _linear(xs, left + room, right - room)
        )
        out = [_text(12, 20, title, cls="b"), _text(12, 38, y_label)]
        for mark in y.marks:
            out.append(_line(left, y.at(mark), right, y.at(mark), "g"))
            out.append(_text(left - 6, y.at(mark) + 4, y.name(mark), "end", "m"))
        for mark in x.marks:
            out.append(_line(x.at(mark), top, x.at(mark), bottom, "g"))
            out.append(_text(x.at(mark), bottom + 16, x.name(mark), "middle", "m"))
        out.append(_text((left + right) / 2, bottom + 36, x_label, "middle"))
        for i, name in enumerate(series):
            place = top + 8 + 20 * i
            out.append(_marker(right + 22, place, order.index(name), solid=True))
            out.append(_text(right + 34, place + 4, clipped(name)))
        return cls(x, y, bottom + 52, out)

    def figure(self) -> Figure:
        return Figure(self.height, "".join(self.out))


# -- pieces -------------------------------------------------------------------------------------


def _text(x: float, y: float, text: str, anchor: str = "start", cls: str = "") -> str:
    named = f' class="{cls}"' if cls else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, cls: str, width: float = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{cls}" {ends} stroke-width="{width}"/>'


def _marker(x: float, y: float, index: int, solid: bool, size: float = 5) -> str:
    """Colour and shape both differ between neighbours, and no pair of them comes twice in 32 series."""
    style = index % len(LIGHT)
    shape = MARKERS[(index + index // len(LIGHT)) % len(MARKERS)]
    paint = f'class="f{style}"' if solid else f'class="o s{style}"'
    paint += ' stroke-width="2"'
    if shape == "circle":
        return f'<circle {paint} cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
    s = size
    corners = {
        "square": ((-s, -s), (s, -s), (s, s), (-s, s)),
        "diamond": ((0, -1.3 * s), (1.3 * s, 0), (0, 1.3 * s), (-1.3 * s, 0)),
        "triangle": ((0, -1.2 * s), (1.15 * s, s), (-1.15 * s, s)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon {paint} points="{points}"/>'
