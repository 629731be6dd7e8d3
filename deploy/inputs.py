"""What an exported network is verified on: photographs at several sizes, patterns, one noise image.

Random noise alone hides faults of range and invents others, so noise is reported and gates nothing.
Patterns are what photographs lack: flat black and white, the finest checkerboard, pure colours, a single
bright pixel, and a picture without any symmetry, which shows a transposed, flipped or channel-swapped
graph and a wrong order of sub-pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.sizes import Sizes
    from srkd.types import Facts

PHOTOGRAPHS = 8  # fewer make a verdict inconclusive
CHECKED_PX = 160  # no side of a checked picture is longer: the check must stay affordable on a CPU
PATTERN_PX = 48


@dataclass(frozen=True)
class Photo:
    """A real photograph: LR (1, 3, h, w) float32 in [0, 1] and its HR (1, 3, scale*h, scale*w)."""

    name: str
    lr: np.ndarray
    hr: np.ndarray


@dataclass(frozen=True)
class Input:
    """One picture (or batch) to run. `hr` is there where it is scored against the original."""

    name: str
    kind: Literal["photograph", "pattern", "noise"]
    lr: np.ndarray
    hr: np.ndarray | None = None

    @property
    def gated(self) -> bool:
        return self.kind != "noise"


def window(image: np.ndarray, h: int, w: int) -> np.ndarray:
    """The middle (h, w) of (1, 3, H, W); an image that is too small is continued by mirroring."""
    more = [max(0, want - have) for want, have in zip((h, w), image.shape[-2:], strict=True)]
    if any(more):
        pads = [(m // 2, m - m // 2) for m in more]
        image = np.pad(image, [(0, 0), (0, 0), *pads], mode="symmetric")
    y, x = (image.shape[-2] - h) // 2, (image.shape[-1] - w) // 2
    return np.ascontiguousarray(image[..., y : y + h, x : x + w])


def crop_pair(photo: Photo, h: int, w: int, scale: int) -> Input:
    """The middle (h, w) of a photograph with the HR that belongs to it, where it is that large."""
    lr = window(photo.lr, h, w)
    name = f"{photo.name} {h}x{w}"
    if photo.lr.shape[-2] < h or photo.lr.shape[-1] < w:
        return Input(name, "photograph", lr)
    y, x = (photo.lr.shape[-2] - h) // 2, (photo.lr.shape[-1] - w) // 2
    hr = photo.hr[..., scale * y : scale * (y + h), scale * x : scale * (x + w)]
    return Input(name, "photograph", lr, np.ascontiguousarray(hr))


def odd_size(sizes: Sizes, facts: Facts, *, built: bool = False) -> tuple[int, int]:
    """A size inside the declared ones that suits no grid: odd, unequal, off the network's multiple.

    Where the declared sizes leave no such choice, the nearest to it.
    """

    def pick(low: int, high: int, avoid: int) -> int:
        middle = (low + high) // 2
        valid = [
            v
            for v in range(low, high + 1)
            if v % 2 and (facts.size_multiple == 1 or v % facts.size_multiple) and v != avoid
        ]
        return min(valid, key=lambda v: abs(v - middle), default=middle)

    least = sizes.smallest if built else (1, 1)
    (low_h, low_w), (high_h, high_w) = sizes.smallest, bounded(sizes.usual, least=least)
    h = pick(min(low_h, high_h), high_h, avoid=0)
    return h, pick(min(low_w, high_w), high_w, avoid=h)


def bounded(
    size: tuple[int, int], limit: int = CHECKED_PX, least: tuple[int, int] = (1, 1)
) -> tuple[int, int]:
    """The size with each side cut to what is affordable to check, but not below `least`."""
    return max(min(size[0], limit), least[0]), max(min(size[1], limit), least[1])


def spread(items: Sequence[Photo], n: int) -> list[Photo]:
    """`n` items evenly spaced over the sequence, or all where there are fewer."""
    if len(items) <= n:
        return list(items)
    return [items[i * len(items) // n] for i in range(n)]


def build_inputs(
    photos: Sequence[Photo], sizes: Sizes, facts: Facts, *, built: bool = False
) -> list[Input]:
    """Every picture that edge E1 runs on, photographs first.

    All photographs at the usual and the smallest size, two at an odd size, one at the largest, two as a
    batch; then patterns and noise at the odd size. A graph runs smaller pictures than were declared, which
    keeps the check short; an engine that was `built` for these sizes does not. A static graph sees its size alone,
    and no batch.
    """
    built = built or sizes.static
    least = sizes.smallest if built else (1, 1)
    usual, odd = bounded(sizes.usual, least=least), odd_size(sizes, facts, built=built)
    inputs = [crop_pair(photo, *usual, facts.scale) for photo in photos]
    others = [(p, bounded(sizes.smallest, least=least)) for p in photos]
    others += [(p, odd) for p in photos[:2]]
    others += [(p, bounded(sizes.largest, least=least)) for p in photos[-1:]]
    there = {item.name for item in inputs}
    for photo, (h, w) in others:
        if (name := f"{photo.name} {h}x{w}") not in there:
            inputs.append(Input(name, "photograph", window(photo.lr, h, w)))
            there.add(name)
    if len(photos) > 1 and not sizes.static:
        pair = np.concatenate([window(p.lr, *odd) for p in photos[:2]])
        inputs.append(Input(f"batch of 2 {odd[0]}x{odd[1]}", "photograph", pair))
    h, w = bounded(odd, PATTERN_PX, bounded(sizes.smallest, least=least))
    inputs += [Input(name, "pattern", lr) for name, lr in patterns(h, w).items()]
    noise = np.random.default_rng(0).random((1, 3, h, w), dtype=np.float32)
    return [*inputs, Input("noise", "noise", noise)]


def patterns(h: int, w: int) -> dict[str, np.ndarray]:
    """Adversarial pictures, each (1, 3, h, w) float32 in [0, 1]."""
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    board = ((y + x) % 2).astype(np.float32)
    impulse = np.zeros((h, w), np.float32)
    impulse[h // 2, w // 2] = 1
    return {
        "black": _picture(np.zeros((h, w)), 3),
        "white": _picture(np.ones((h, w)), 3),
        "checkerboard": _picture(board, 3),
        "primaries": _primaries(h, w),
        "impulse": _picture(impulse, 3),
        "asymmetric": _asymmetric(y / max(h - 1, 1), x / max(w - 1, 1)),
    }


def _picture(plane: np.ndarray, channels: int) -> np.ndarray:
    return np.repeat(plane[None, None].astype(np.float32), channels, axis=1)


def _primaries(h: int, w: int) -> np.ndarray:
    """Vertical bars of red, green, blue, yellow, cyan, magenta, as wide as the picture allows."""
    colours = np.array(
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]], np.float32
    )
    bar = max(1, w // len(colours))
    order = list(islice((i for i in cycle(range(len(colours))) for _ in range(bar)), w))
    row = colours[order].T  # (3, w)
    return np.ascontiguousarray(np.broadcast_to(row[None, :, None, :], (1, 3, h, w)))


def _asymmetric(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Another ramp in every channel and direction, with a bright corner: equal to none of its flips,
    transposes or channel orders. `y`, `x` are (h, w) in [0, 1]."""
    red = 0.8 * x
    green = 0.6 * y**2
    blue = 0.5 * (1 - x) * y + 0.4 * x**2
    planes = np.stack([red, green, blue])
    planes[:, (y < 0.2) & (x > 0.8)] = np.array([1.0, 0.5, 0.25], np.float32)[:, None]
    return planes[None].astype(np.float32)
