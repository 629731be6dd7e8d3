"""What an engine says it runs, read back from the engine itself and not from the request.

Libraries change a request silently: a CPU with bf16 gets it unasked, a provider that fails to start is
replaced by the CPU, a flag of another version is ignored. So the layers that do the arithmetic
(convolutions and matrix products) are counted by the precision they run in and by where they run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from deploy.engines import Engine

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Proof:
    """Numbers of convolutions and matrix products, by precision (fp32, fp16, bf16, or the library's own
    word for another) and by place; `place` is where all of them were asked to run."""

    layers: dict[str, int]
    place: str
    places: dict[str, int]

    def share(self, precision: str) -> float:
        """Share of these layers that run in `precision`, 0 to 1."""
        return self.layers.get(precision, 0) / max(sum(self.layers.values()), 1)

    def mismatch(self, precision: str, least_share: float) -> str | None:
        """The sentence that says where the engine is not what was asked for."""
        if not self.layers:
            return "the engine does not say in which precision it runs"
        strays = {place: n for place, n in self.places.items() if place != self.place}
        if strays:
            where = ", ".join(f"{n} on {place}" for place, n in sorted(strays.items()))
            total = sum(self.places.values())
            return f"of {total} convolutions and matrix products, asked for on {self.place}, run {where}"
        if self.share(precision) < least_share:
            return (
                f"{self.layers.get(precision, 0)} of {sum(self.layers.values())} convolutions and matrix "
                f"products run in {precision} ({self}); at least {least_share:.0%} must"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        return {"layers": self.layers, "place": self.place, "places": self.places}

    def __str__(self) -> str:
        return ", ".join(f"{n} in {precision}" for precision, n in sorted(self.layers.items()))


class ProvableEngine(Engine, Protocol):
    """An engine that can be asked what it runs."""

    def proof(self, lr: np.ndarray) -> Proof:
        """`lr` is any picture it takes: some libraries only tell after a run."""
        ...
