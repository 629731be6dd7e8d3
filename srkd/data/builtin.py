"""The built-in images: photographs that ship inside scikit-image, and pictures drawn here.

Nothing is downloaded. Held-out photographs are for evaluation alone and are never trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont, features

from srkd.errors import MissingError
from srkd.files import sha256
from srkd.images import read_rgb8

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIDE = 256  # px of a drawn image
_SEED = 20_240


@dataclass(frozen=True)
class Photograph:
    """One photograph, with its origin and terms as the docstrings of skimage.data state them."""

    name: str
    file: str
    origin: str
    licence: str
    held_out: bool = False


# Left out because scikit-image states no licence: motorcycle, moon, colorwheel, page.
LICENCES: tuple[Photograph, ...] = (
    Photograph("astronaut", "astronaut.png", "NASA Great Images", "public domain", held_out=True),
    Photograph("chelsea", "chelsea.png", "Stefan van der Walt", "CC0", held_out=True),
    Photograph(
        "coffee", "coffee.png", "Rachel Michetti, Pikolo Espresso Bar", "CC0", held_out=True
    ),
    Photograph("rocket", "rocket.jpg", "SpaceX Photos", "public domain", held_out=True),
    Photograph("brick", "brick.png", "CC0Textures, Bricks25", "CC0"),
    Photograph("camera", "camera.png", "Lav Varshney", "CC0"),
    Photograph("clock", "clock_motion.png", "Stefan van der Walt", "public domain"),
    Photograph(
        "coins", "coins.png", "Brooklyn Museum Collection", "no known copyright restrictions"
    ),
    Photograph("grass", "grass.png", "DeviantArt, linolafett", "CC0"),
    Photograph("gravel", "gravel.png", "CC0Textures, Gravel04", "CC0"),
    Photograph("hubble_deep_field", "hubble_deep_field.jpg", "NASA, HubbleSite", "public domain"),
    Photograph(
        "immunohistochemistry",
        "ihc.png",
        "Center for Microscopy and Molecular Imaging (CMMI)",
        "no known copyright restrictions",
    ),
    Photograph("retina", "retina.jpg", "Mikael Häggström, Wikimedia Commons", "CC0"),
)


def held_out_images() -> list[tuple[str, np.ndarray]]:
    """(name, (H, W, 3) uint8) of the photographs kept for evaluation."""
    return [(photo.name, _read(photo)) for photo in LICENCES if photo.held_out]


def training_photographs() -> Iterator[tuple[str, np.ndarray]]:
    """(name, (H, W, 3) uint8) of all other photographs, each read when it is asked for."""
    return ((photo.name, _read(photo)) for photo in LICENCES if not photo.held_out)


def training_images() -> list[tuple[str, np.ndarray]]:
    """(name, (H, W, 3) uint8) of these photographs and of the drawn images. The same every time."""
    drawn = [
        (f"{name}_{n}", draw(np.random.default_rng([_SEED, kind, n])))
        for kind, (name, draw, count) in enumerate(_DRAWN)
        for n in range(count)
    ]
    return [*training_photographs(), *drawn]


def causes() -> str:
    """A hash of all that decides the training images, without making them (which takes a second)."""
    versions = f"{PIL.__version__} {features.version('freetype2')} {np.__version__}"
    files = [Path(__file__), *(_path(photo) for photo in LICENCES if not photo.held_out)]
    return " ".join([versions, *(sha256(path) for path in files)])


def _read(photo: Photograph) -> np.ndarray:
    return read_rgb8(_path(photo))


def _path(photo: Photograph) -> Path:
    spec = find_spec("skimage")
    path = Path(spec.origin).parent / "data" / photo.file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise MissingError(
            f"the built-in photograph '{photo.name}' ships inside scikit-image, but {photo.file} is not "
            "there; reinstall it (pip install --force-reinstall scikit-image) or give --data FOLDER."
        )
    return path


def dead_leaves(rng: np.random.Generator) -> np.ndarray:
    """Occluding discs and polygons whose sizes follow a power law, as edges in photographs do.

    Source: Lee, Mumford, Huang, "Occlusion models for natural images", IJCV 2001: density of radii
    proportional to r**-3. Drawn at twice the size and averaged, so that edges are antialiased.
    """
    side, smallest, largest = 2 * SIDE, 6.0, 200.0
    canvas = Image.new("RGB", (side, side), _colour(rng))
    pen = ImageDraw.Draw(canvas)
    # Inverse of the cumulative distribution of r**-3 between the two bounds.
    u = rng.random(1500)
    radii = (smallest**-2 - u * (smallest**-2 - largest**-2)) ** -0.5
    for radius in radii:
        x, y = rng.uniform(-0.1 * side, 1.1 * side, 2)
        if rng.random() < 0.5:
            stretch = rng.uniform(0.5, 1.0)
            box = (x - radius, y - stretch * radius, x + radius, y + stretch * radius)
            pen.ellipse(box, fill=_colour(rng))
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
            outline = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)
            pen.polygon([(float(a), float(b)) for a, b in outline], fill=_colour(rng))
    leaves = np.asarray(canvas.reduce(2), np.float64)
    return _to_uint8(leaves * _shading(rng) + rng.normal(0, 1.5, (SIDE, SIDE, 1)))


def text(rng: np.random.Generator) -> np.ndarray:
    """Lines of made-up words in Pillow's own font at several sizes and colours."""
    paper, ink = _colour(rng), _colour(rng)
    while abs(_brightness(paper) - _brightness(ink)) < 80:
        paper, ink = _colour(rng), _colour(rng)
    canvas = Image.new("RGB", (SIDE, SIDE), paper)
    pen = ImageDraw.Draw(canvas)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;"))
    y = 4.0
    while y < SIDE:
        size = int(rng.integers(9, 34))
        words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(12)]
        pen.text(
            (float(rng.uniform(-8, 12)), y), " ".join(words), ink, ImageFont.load_default(size)
        )
        y += 1.25 * size
    return np.asarray(canvas)


def stripes(rng: np.random.Generator) -> np.ndarray:
    """Bands of straight stripes, 4 to 32 px per period, in several directions, antialiased."""
    fine = 4
    y, x = np.mgrid[: fine * SIDE, : fine * SIDE] / fine
    out = np.empty((SIDE, SIDE, 3))
    half = SIDE // 2
    for top in (0, half):
        for left in (0, half):
            angle, period, duty = rng.uniform(0, np.pi), rng.uniform(4, 32), rng.uniform(0.25, 0.75)
            inside = np.s_[fine * top : fine * (top + half), fine * left : fine * (left + half)]
            phase = (x[inside] * np.cos(angle) + y[inside] * np.sin(angle)) / period % 1
            share = (phase < duty).reshape(half, fine, half, fine).mean(axis=(1, 3))[..., None]
            colours = np.array([_colour(rng), _colour(rng)], np.float64)
            out[top : top + half, left : left + half] = (
                share * colours[0] + (1 - share) * colours[1]
            )
    return _to_uint8(out)


def zone_plate(rng: np.random.Generator) -> np.ndarray:
    """Circular waves that grow finer outwards, up to 0.25 periods per px: every direction and frequency."""
    y, x = np.mgrid[:SIDE, :SIDE] - rng.uniform(0, SIDE, 2)[:, None, None]
    distance = np.hypot(x, y)
    # The frequency of cos(k r^2) is k r / pi.
    k = 0.25 * np.pi / distance.max()
    wave = 0.5 + 0.5 * np.cos(k * distance**2 + rng.uniform(0, 2 * np.pi))[..., None]
    colours = np.array([_colour(rng), _colour(rng)], np.float64)
    return _to_uint8(wave * colours[0] + (1 - wave) * colours[1])


# name, function, how many
_DRAWN: tuple[tuple[str, Callable[[np.random.Generator], np.ndarray], int], ...] = (
    ("dead_leaves", dead_leaves, 12),
    ("text", text, 5),
    ("stripes", stripes, 4),
    ("zone_plate", zone_plate, 3),
)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """A muted colour: brightness spread evenly, saturation small as in photographs."""
    red, green, blue = (
        (rng.uniform(10, 245) + rng.normal(0, 25, 3)).clip(0, 255).astype(int).tolist()
    )
    return red, green, blue


def _brightness(colour: tuple[int, int, int]) -> float:
    return sum(colour) / 3


def _shading(rng: np.random.Generator) -> np.ndarray:
    """A smooth light falling over the picture, (SIDE, SIDE, 1) about 1."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    slope_x, slope_y = rng.uniform(-0.5, 0.5, 2)
    return (1 + slope_x * x + slope_y * y)[..., None]


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.floor(image.clip(0, 255) + 0.5).clip(0, 255).astype(np.uint8)
