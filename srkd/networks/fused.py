"""Networks whose last group takes the features after all groups before it, not the last one alone.

Besides the path through the groups every group has a path of its own to the fusion. So the rest after a
tap takes the features before the tap from this network's own head feature, as the long skip does, and
`rest` runs the groups before the tap again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srkd.errors import SrkdError
from srkd.networks.base import Network
from srkd.types import Pass

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor


class FusedNetwork(Network):
    """`groups[-1]` takes the list of the features after `groups[0]`, `groups[1]`, .., in this order."""

    def _extend(self, features: list[Tensor], position: int) -> list[Tensor]:
        """`features` are those after 0, 1, .. groups, the head feature first; adds up to `position`."""
        features = list(features)
        for i in range(len(features) - 1, position):
            fused = i + 1 == len(self.groups)
            features.append(self.groups[i](features[1:] if fused else features[-1]))
        return features

    def forward(self, lr: Tensor) -> Tensor:
        head = self.head(lr)
        return self.tail(self._extend([head], len(self.groups))[-1], head)

    def run(self, lr: Tensor, taps: Collection[str] = ()) -> Pass:
        at = {tap: self.position(tap) for tap in taps}
        head = self.head(lr)
        features = self._extend([head], len(self.groups))
        kept = {tap: features[position] for tap, position in at.items()}
        return Pass(network=self, sr=self.tail(features[-1], head), head=head, taps=kept)

    def between(
        self, feature: Tensor, after: str, until: str, head: Tensor | None = None
    ) -> Tensor:
        """As in `Network`; up to the fusion it needs this network's own head feature too."""
        start, stop = self.position(after), self.position(until)
        if start >= stop:
            return feature
        if stop < len(self.groups):
            return super().between(feature, after, until)
        if head is None:
            raise SrkdError(
                f"the features of {self.family} from '{after}' to '{until}' need all its {self.tap_unit}s, "
                "and one feature was given; choose positions before 'body' (method.mipkd.positions) or "
                "mix_mode = 'position'."
            )
        return self._extend([*self._extend([head], start - 1), feature], stop)[-1]

    def rest(self, feature: Tensor, after: str, head: Tensor, size: tuple[int, int]) -> Tensor:
        """As in `Network`; the groups before the tap run again, from `head`."""
        feature = self.between(feature, after, self.tap_names[-1], head)
        return self.crop(self.tail(feature, head), size)
