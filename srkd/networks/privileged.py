"""The teacher of PISR: an encoder makes an LR-sized image of HR, a network of ours makes HR of that.

    T(y) = decoder(encoder(y))        y (N, 3, s*h, s*w) -> imitated LR (N, 3, h, w) -> (N, 3, s*h, s*w)

Source: the encoder of cvlab-yonsei/PISR @ 809e3a5, models/encoder.py, with 3 channels in place of luminance.

What it is given is the image that it shall make, so it upscales nothing. Images are in [0, 1]; what the encoder makes
is about in [0, 1], because it is trained to resemble LR, and not clamped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from srkd.types import Facts, Pass

if TYPE_CHECKING:
    from collections.abc import Collection

    from srkd.networks.base import Network

IMITATED_LR = "imitated_lr"  # the name of the encoder's image among the features of a pass


def encoder(scale: int) -> nn.Sequential:
    """HR image (N, 3, s*h, s*w) -> (N, 3, h, w); every PReLU has one slope for all channels."""
    return nn.Sequential(
        nn.Conv2d(3, 56, 5, padding=2),
        nn.PReLU(),
        nn.Conv2d(56, 56, 5, stride=scale, padding=2),
        nn.PReLU(),
        nn.Conv2d(56, 12, 3, padding=1),
        nn.PReLU(),
        nn.Conv2d(12, 3, 3, padding=1),
    )


class PrivilegedTeacher(nn.Module):
    """Encoder and decoder: (N, 3, s*h, s*w) in [0, 1] -> the same size, not clamped."""

    family = "privileged"

    def __init__(self, decoder: Network) -> None:
        super().__init__()
        self.scale = decoder.scale
        self.encoder = encoder(decoder.scale)
        self.decoder = decoder

    @property
    def arguments(self) -> dict[str, Any]:
        """The plain values that rebuild it (stored in model.json): those of the decoder."""
        return {"decoder": {"family": self.decoder.family, "arguments": self.decoder.arguments}}

    @property
    def facts(self) -> Facts:
        """Those of the decoder, whose input is LR-sized."""
        return self.decoder.facts

    def forward(self, hr: Tensor) -> Tensor:
        return self.decoder(self.encoder(hr))

    def run(self, hr: Tensor, taps: Collection[str] = ()) -> Pass:
        """A pass with the decoder's features at `taps`, and the encoder's image where `taps` names it."""
        imitated = self.encoder(hr)
        own = self.decoder.run(imitated, [tap for tap in taps if tap != IMITATED_LR])
        kept = {IMITATED_LR: imitated} if IMITATED_LR in taps else {}
        return Pass(network=self, sr=own.sr, head=own.head, taps={**own.taps, **kept})
