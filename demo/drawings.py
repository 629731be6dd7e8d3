"""Pictures drawn for the examples, where no photograph with free terms shows the hard case well.

Each is (360, 480) px, drawn `FINE` times larger and averaged, so that edges are antialiased as a lens would.
The letters are Pillow's own (Aileron, CC0). The same pixels every time for one version of Pillow and FreeType.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, HEIGHT = 480, 360
FINE = 4
_SEED = 2025

Point = tuple[float, float]
Colour = tuple[int, int, int]


def text() -> np.ndarray:
    """(H, W, 3) uint8: a board of departures whose letters shrink from line to line."""
    paper, ink, bar = (246, 243, 233), (28, 30, 38), (22, 48, 92)
    canvas, pen = _canvas(paper)
    pen.rectangle((0, 0, FINE * WIDTH, FINE * 62), fill=bar)
    _write(pen, 20, 13, "Departures", 36, (255, 255, 255))
    _write(pen, WIDTH - 20, 19, "Platform", 24, (255, 205, 70), anchor="ra")
    y = 70.0
    lines = (
        (30, "06:58", "Basel, Geneva", "8"),
        (26, "07:13", "Lyon, Marseille", "14"),
        (22, "07:41", "Utrecht, Groningen", "3b"),
        (19, "08:06", "Turin, Milan, Bologna", "11"),
        (17, "08:25", "Gothenburg, Copenhagen", "5"),
        (15, "09:17", "Thessaloniki, change at Larissa", "2"),
        (13, "09:30", "Bilbao, Zaragoza, Sundays only", "16a"),
        (12, "10:04", "Ljubljana, bicycles 4.50, seats 21 to 96", "7"),
        (11, "10:38", "Brno, with a dining car as far as the border", "12"),
        (10, "11:22", "Trains marked 16a do not run from 24 to 26 December", "16a"),
    )
    for n, (size, time, where, platform) in enumerate(lines):
        step = 1.53 * size
        if n % 2:
            shade = (232, 228, 214)
            pen.rectangle((0, FINE * (y - 1), FINE * WIDTH, FINE * (y + step - 1)), fill=shade)
        middle = y + step / 2 - 1
        _write(pen, 20, middle, time, size, (160, 32, 32), anchor="lm")
        _write(pen, 118, middle, where, size, ink, anchor="lm")
        _write(pen, WIDTH - 20, middle, platform, size, ink, anchor="rm")
        y += step
    return _shrunk(canvas)


def foliage() -> np.ndarray:
    """(H, W, 3) uint8: fern fronds, the near ones over the far ones, lit from above."""
    rng = np.random.default_rng(_SEED)
    canvas, pen = _canvas((14, 24, 18))
    layers = 9
    for layer in range(layers):
        near = layer / (layers - 1)
        for _ in range(14):
            root = (rng.uniform(-0.15, 1.15) * WIDTH, rng.uniform(0.3, 1.3) * HEIGHT)
            length = rng.uniform(0.35, 0.85) * HEIGHT * (0.65 + 0.3 * near)
            light = (0.30 + 0.70 * near) * rng.uniform(0.7, 1.1)
            green = (rng.uniform(75, 125), rng.uniform(128, 168), rng.uniform(48, 80))
            hue = tuple(light * c for c in green)
            _frond(pen, rng, root, rng.normal(-math.pi / 2, 0.75), length, hue)
        if near < 0.7:  # what is far away is a little out of focus
            canvas = canvas.filter(ImageFilter.GaussianBlur(FINE * 0.6 * (0.7 - near)))
            pen = ImageDraw.Draw(canvas)
    return _shrunk(canvas)


def line_art() -> np.ndarray:
    """(H, W, 3) uint8: a bicycle in ink, with spokes, a chain and hatching of less than a pixel's width."""
    canvas, pen = _canvas((250, 248, 242))
    ink = _Ink(pen)
    sun = (60.0, 62.0)
    for radius in (34, 30, 26.5, 23.5, 21, 19, 17.5):
        ink.ring(sun, radius, 0.7)
    for n in range(40):
        ink.line([_around(sun, r, n / 40) for r in (38, 46 + 9 * (n % 2))], 0.6)
    for n in range(70):  # the ground, hatched
        x = 12 + 6.6 * n
        ink.line([(x, 334 + 3 * math.sin(1.7 * n)), (x - 14 - 5 * math.cos(2.3 * n), 356)], 0.6)
    ink.line([(8, 330), (472, 330)], 1.2)
    back, front = (116.0, 236.0), (364.0, 236.0)
    crank, seat, head, fork = (218.0, 250.0), (182.0, 130.0), (318.0, 120.0), (323.0, 140.0)
    for hub in (back, front):
        _wheel(ink, hub)
    for a, b in ((crank, seat), (seat, head), (crank, fork), (back, seat), (back, crank)):
        _tube(ink, a, b, 2.6)
    ink.line([(314.0, 104.0), head, fork, (331.0, 172.0), (342.0, 203.0), front], 3)
    ink.line([seat, (175.0, 104.0)], 3)
    ink.line([(150, 102), (166, 97), (196, 100), (206, 103), (178, 106), (150, 102)], 3.5)
    drop = [(352 + 22 * math.sin(t), 116 - 20 * math.cos(t)) for t in np.linspace(0, 2.6, 14)]
    ink.line([(314.0, 104.0), (334.0, 96.0), *drop, (346.0, 134.0)], 3)
    for n in range(12):  # tape of the handlebar
        t = 0.2 * n
        ink.line(
            [(352 + r * math.sin(t), 116 - (r - 2) * math.cos(t)) for r in (18, 26)],
            0.6,
        )
    _chainset(ink, crank, back)
    return _shrunk(canvas)


def logo() -> np.ndarray:
    """(H, W, 4) uint8 with straight alpha: a soft shadow, glass and holes.

    Colour is black where nothing is drawn, as most programs save it.
    """
    size = (FINE * WIDTH, FINE * HEIGHT)
    mask = _mark(size, 4, 6).getchannel("A").filter(ImageFilter.GaussianBlur(FINE * 5))
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    picture.putalpha(mask.point(lambda a: a * 0.45))
    picture.alpha_composite(_mark(size, 0, 0))
    planes = premultiplied(np.asarray(picture))
    return straight(planes.reshape(HEIGHT, FINE, WIDTH, FINE, 4).mean((1, 3)))


def premultiplied(rgba: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 -> float64: colour weighed by alpha, so that a mean takes none of what is hidden."""
    planes = rgba / 255
    planes[..., :3] *= planes[..., 3:]
    return planes


def straight(planes: np.ndarray) -> np.ndarray:
    """The inverse of `premultiplied`; black where alpha rounds to 0."""
    alpha = np.rint(planes[..., 3:].clip(0, 1) * 255)
    colour = np.divide(
        planes[..., :3], planes[..., 3:], out=np.zeros_like(planes[..., :3]), where=alpha > 0
    )
    return np.dstack([np.rint(colour.clip(0, 1) * 255), alpha]).astype(np.uint8)


def _canvas(colour: Colour) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("RGB", (FINE * WIDTH, FINE * HEIGHT), colour)
    return canvas, ImageDraw.Draw(canvas)


def _shrunk(canvas: Image.Image) -> np.ndarray:
    return np.asarray(canvas.reduce(FINE))


def _write(
    pen: ImageDraw.ImageDraw,
    x: float,
    y: float,
    words: str,
    size: float,
    colour: Colour,
    anchor: str = "la",
) -> None:
    font = ImageFont.load_default(FINE * size)
    pen.text((FINE * x, FINE * y), words, colour, font, anchor=anchor)


def _frond(
    pen: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    root: Point,
    angle: float,
    length: float,
    hue: Sequence[float],
) -> None:
    """A curved stem with leaflets in pairs that grow and shrink along it."""
    steps = 30
    x, y = root
    bend = rng.normal(0, 0.035)
    stem = [(x, y)]
    for n in range(steps):
        x += length / steps * math.cos(angle)
        y += length / steps * math.sin(angle)
        angle += bend
        stem.append((x, y))
        along = (n + 1) / steps
        size = length * 0.22 * math.sin(math.pi * along**0.7) ** 0.8 + 2
        for side in (-1, 1):
            turn = side * (1.15 - 0.35 * along) + rng.normal(0, 0.06)
            _leaflet(
                pen, (x, y), angle + turn, size, [c * rng.uniform(0.85, 1.15) for c in hue], side
            )
    dark = tuple(round(0.55 * c) for c in hue)
    pen.line([(FINE * a, FINE * b) for a, b in stem], dark, round(FINE * 1.3), "curve")


def _leaflet(
    pen: ImageDraw.ImageDraw,
    root: Point,
    angle: float,
    length: float,
    hue: Sequence[float],
    side: int,
) -> None:
    """A pointed leaf in two halves of different light, with its midrib."""
    along = np.linspace(0, 1, 9)
    half = 0.16 * length * np.sin(np.pi * along**0.75)
    c, s = math.cos(angle), math.sin(angle)
    spine = [(root[0] + length * t * c, root[1] + length * t * s) for t in along]
    for edge in (-1, 1):
        rim = [(x - edge * w * s, y + edge * w * c) for (x, y), w in zip(spine, half, strict=True)]
        light = 1.12 if edge * side * c < 0 else 0.82
        fill = tuple(min(255, round(light * v)) for v in hue)
        pen.polygon([(FINE * x, FINE * y) for x, y in (*spine, *reversed(rim))], fill=fill)
    rib = tuple(min(255, round(1.35 * v)) for v in hue)
    pen.line([(FINE * x, FINE * y) for x, y in (spine[0], spine[-2])], rib, max(1, FINE // 3))


class _Ink:
    """A pen whose points and widths are in pixels of the finished drawing."""

    def __init__(self, pen: ImageDraw.ImageDraw) -> None:
        self._pen = pen
        self._colour = (24, 26, 34)

    def line(self, points: Sequence[Point], width: float) -> None:
        fine = [(FINE * x, FINE * y) for x, y in points]
        self._pen.line(fine, self._colour, round(FINE * width), "curve")

    def ring(self, centre: Point, radius: float, width: float) -> None:
        x, y = centre
        box = [FINE * v for v in (x - radius, y - radius, x + radius, y + radius)]
        self._pen.ellipse(box, outline=self._colour, width=round(FINE * width))


def _around(centre: Point, radius: float, turn: float) -> Point:
    """A point of a circle; `turn` counts whole turns."""
    angle = 2 * math.pi * turn
    return centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)


def _wheel(ink: _Ink, hub: Point) -> None:
    for radius, width in ((94, 4.5), (87, 0.8), (84, 0.8), (9, 1.2), (4, 1.2)):
        ink.ring(hub, radius, width)
    for n in range(36):
        # Spokes leave the hub's flange at a tangent, forwards and backwards in turn.
        flange = n / 36 + (0.14 if n % 2 else -0.14)
        ink.line([_around(hub, 9, flange), _around(hub, 84, n / 36)], 0.5)


def _tube(ink: _Ink, a: Point, b: Point, half: float) -> None:
    """Two parallel outlines and a line of shade between them."""
    length = math.dist(a, b)
    s, c = (b[1] - a[1]) / length, (b[0] - a[0]) / length
    for offset, width in ((-half, 1.2), (half, 1.2), (0.4 * half, 0.5)):
        ink.line([(x - offset * s, y + offset * c) for x, y in (a, b)], width)


def _chainset(ink: _Ink, crank: Point, back: Point) -> None:
    for radius, width in ((20, 0.8), (17, 0.8), (5, 1.5)):
        ink.ring(crank, radius, width)
    for n in range(40):
        ink.line([_around(crank, r, n / 40) for r in (20, 22.5)], 1)
    for turn in (0.14, 0.64):
        end = _around(crank, 34, turn)
        ink.line([crank, end], 3)
        ink.line([(end[0] - 9, end[1]), (end[0] + 9, end[1])], 3)
    links = 24
    for sign in (-1, 1):  # the chain above and below, as a row of links
        a, b = (crank[0], crank[1] + sign * 21), (back[0], back[1] + sign * 7)
        for n in range(links):
            ends = [
                ((1 - t) * a[0] + t * b[0], (1 - t) * a[1] + t * b[1])
                for t in (n / links, (n + 0.55) / links)
            ]
            ink.line(ends, 1.8)


def _mark(size: tuple[int, int], dx: float, dy: float) -> Image.Image:
    """RGBA of `size`: a large disc that hands over to a small one, and the project's name."""
    blue, orange, ink = (18, 92, 160), (240, 120, 40), (30, 34, 44)
    large, small = (124.0 + dx, 130.0 + dy), (210.0 + dx, 186.0 + dy)
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)

    def box(centre: Point, radius: float) -> list[float]:
        x, y = centre
        return [FINE * v for v in (x - radius, y - radius, x + radius, y + radius)]

    pen.ellipse(box(large, 92), outline=blue, width=FINE * 22)
    for radius in (60, 48, 36):
        pen.ellipse(box(large, radius), outline=blue, width=FINE * 3)
    for n in range(24):
        ends = [_around(large, r, n / 24) for r in (62, 67)]
        pen.line([(FINE * x, FINE * y) for x, y in ends], blue, FINE * 2)
    pen.ellipse(box(large, 17), fill=orange)
    glass = Image.new("RGBA", size, (0, 0, 0, 0))
    ImageDraw.Draw(glass).ellipse(box(small, 52), fill=(*orange, 150))
    picture.alpha_composite(glass)  # over the large disc, which shines through
    pen.ellipse(box(small, 52), outline=orange, width=FINE * 8)
    _write(pen, 276 + dx, 84 + dy, "srkd", 84, ink)
    _write(pen, 40 + dx, 276 + dy, "small networks, large pictures", 25, ink)
    pen.line([(FINE * (x + dx), FINE * (318 + dy)) for x in (40, 440)], blue, FINE * 2)
    return picture
