"""The picture sizes that an export is declared for. Plain values, nothing heavy imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from srkd.errors import SrkdError

if TYPE_CHECKING:
    from srkd.types import Facts

LARGEST_INDEX = 2**31 - 1  # elements of a tensor that a 32-bit index can count


@dataclass(frozen=True)
class Sizes:
    """Declared (h, w) of the pictures an export is for, in LR pixels.

    `static`: the graph takes one picture of the only size at a time; otherwise any batch and size.
    """

    smallest: tuple[int, int]
    usual: tuple[int, int]
    largest: tuple[int, int]
    static: bool = False

    @property
    def only(self) -> tuple[int, int] | None:
        """(h, w) of a static graph."""
        return self.usual if self.static else None

    def to_json(self) -> dict[str, list[int]]:
        return {"min": [*self.smallest], "opt": [*self.usual], "max": [*self.largest]}

    def __str__(self) -> str:
        if self.static:
            return "{}x{}".format(*self.usual)
        return ":".join(f"{h}x{w}" for h, w in (self.smallest, self.usual, self.largest))


DEFAULT_SIZES = Sizes((16, 16), (64, 64), (512, 512))


def parse_sizes(text: str, static: bool = False) -> Sizes:
    """`MIN:OPT:MAX`, each HxW, or one HxW for all three; `static` needs one."""
    try:
        parts = [tuple(int(v) for v in part.lower().split("x")) for part in text.split(":")]
        if len(parts) == 1:
            parts = parts * 3
        (a, b), (c, d), (e, f) = parts
    except ValueError:
        raise SrkdError(
            f"--size {text} is not MIN:OPT:MAX with each HxW; for example --size {DEFAULT_SIZES}"
        ) from None
    if not (0 < a <= c <= e and 0 < b <= d <= f):
        raise SrkdError(
            f"--size {text} does not grow from MIN to MAX in height and width; "
            f"for example --size {DEFAULT_SIZES}"
        )
    if static and (a, b) != (e, f):
        raise SrkdError(
            f"--static writes a graph of one size, and --size is {text}; give one, for example --size 64x64"
        )
    return Sizes((a, b), (c, d), (e, f), static)


def check_sizes(sizes: Sizes, facts: Facts, name: str) -> None:
    """Refuse sizes that the network cannot take, and pictures that nothing can hold."""
    if min(sizes.smallest) < facts.minimum_px:
        raise SrkdError(
            f"the smallest size {sizes.smallest[0]}x{sizes.smallest[1]} is below what {name} accepts "
            f"({facts.minimum_px} px a side); raise MIN in --size."
        )
    h, w = sizes.largest
    if 3 * facts.scale**2 * h * w > LARGEST_INDEX:
        side = math.isqrt(LARGEST_INDEX // (3 * facts.scale**2))
        raise SrkdError(
            f"at x{facts.scale} the largest size {h}x{w} makes a picture of more than 2^31 - 1 values, which runtimes "
            f"do not count; lower MAX in --size (at most {side}x{side}): larger pictures are cut into tiles."
        )
