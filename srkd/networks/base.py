"""The one decomposition of every network: head -> groups[0..n-1] -> tail.

    head    image (N, 3, h, w) in [0, 1]   -> feature (N, C, h, w)
    groups  feature                        -> feature, one residual block / group / RSTB each;
                                              the last is the body convolution, before the long skip
    tail    feature and head feature       -> image (N, 3, scale*h, scale*w) in about [0, 1]

Mean shift, 0..255 scaling and window padding are inside. Positions for distillation are named
(`Network.tap_names`): the feature after `groups[i]` has the name `tap_names[i]`, so that a method can
read it (`run`) or continue from it (`rest`), with the head feature of the network that owns the rest.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.errors import SrkdError, nearest
from srkd.networks.subpixel import SubPixel, enlarge, in_turn
from srkd.types import Facts, Pass

if TYPE_CHECKING:
    from collections.abc import Collection

# Mean of the DIV2K training images, R G B in [0, 1]; every network of the papers but RDN subtracts it.
DIV2K_MEAN = (0.4488, 0.4371, 0.4040)


class Network(nn.Module):
    """A super-resolution network of ours. Subclasses set the class data and build the three parts."""

    family: ClassVar[str]
    paper: ClassVar[str]
    tap_unit: ClassVar[str] = "group"

    head: nn.Module
    groups: nn.ModuleList
    tail: nn.Module

    def __init__(self, config: Any) -> None:
        """`config` is the frozen dataclass of the family; it alone rebuilds the network."""
        super().__init__()
        self.config = config
        self.scale: int = config.scale
        self.channels: int = config.channels

    @property
    def arguments(self) -> dict[str, Any]:
        """The plain values that rebuild this network (stored in model.json)."""
        return asdict(self.config)

    @property
    def facts(self) -> Facts:
        """Facts for tiling and export; see `srkd.types.Facts`."""
        raise NotImplementedError

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Name of the feature after each group, e.g. block1 .. block16, body."""
        units = len(self.groups) - 1
        return (*(f"{self.tap_unit}{i + 1}" for i in range(units)), "body")

    def position(self, tap: str) -> int:
        """Number of groups run before the tap: `groups[position:]` is the rest after it."""
        names = self.tap_names
        if tap not in names:
            raise SrkdError(
                f"network family '{self.family}' has no tap '{tap}'; {nearest(tap, names)}"
            )
        return names.index(tap) + 1

    def pad(self, lr: Tensor) -> Tensor:
        """Reflect-pad bottom and right to the size multiple; a no-op for convolutional networks."""
        multiple = self.facts.size_multiple
        if multiple == 1:
            return lr
        h, w = lr.shape[-2:]
        # Written so that torch.export keeps it symbolic; a branch on the size would be baked in.
        return F.pad(
            lr,
            (0, (multiple - w % multiple) % multiple, 0, (multiple - h % multiple) % multiple),
            mode="reflect",
        )

    def crop(self, sr: Tensor, size: tuple[int, int]) -> Tensor:
        """Undo `pad` on the output; `size` is (h, w) of the unpadded LR image."""
        if self.facts.size_multiple == 1:
            return sr
        return sr[..., : self.scale * size[0], : self.scale * size[1]]

    def forward(self, lr: Tensor) -> Tensor:
        """(N, 3, h, w) in [0, 1] -> (N, 3, scale*h, scale*w), not clamped."""
        head = self.head(self.pad(lr))
        feature = head
        for group in self.groups:
            feature = group(feature)
        return self.crop(self.tail(feature, head), (lr.shape[-2], lr.shape[-1]))

    def run(self, lr: Tensor, taps: Collection[str] = ()) -> Pass:
        """Forward pass that also returns the head feature and the features at `taps`."""
        wanted = {self.position(tap): tap for tap in taps}
        head = self.head(self.pad(lr))
        feature, kept = head, {}
        for i, group in enumerate(self.groups):
            feature = group(feature)
            if i + 1 in wanted:
                kept[wanted[i + 1]] = feature
        sr = self.crop(self.tail(feature, head), (lr.shape[-2], lr.shape[-1]))
        return Pass(network=self, sr=sr, head=head, taps=kept)

    def features(self, lr: Tensor, taps: Collection[str]) -> dict[str, Tensor]:
        """As `run(lr, taps).taps`, but what no tap needs is not run: the groups after the last, the tail."""
        at = {tap: self.position(tap) for tap in taps}
        known = self._extend([self.head(self.pad(lr))], max(at.values(), default=0))
        return {tap: known[position] for tap, position in at.items()}

    def _extend(self, features: list[Tensor], position: int) -> list[Tensor]:
        """`features` are those after 0, 1, .. groups, the head feature first; adds up to `position`.

        Networks whose groups are no chain override it.
        """
        features = list(features)
        for group in self.groups[len(features) - 1 : position]:  # type: ignore[attr-defined]
            features.append(group(features[-1]))
        return features

    def between(
        self, feature: Tensor, after: str, until: str, head: Tensor | None = None
    ) -> Tensor:
        """Run the groups after the tap `after`, the one that ends in the tap `until` included.

        `head` is this network's own head feature, which networks whose groups are no chain need.
        """
        for group in self.groups[self.position(after) : self.position(until)]:  # type: ignore[attr-defined]
            feature = group(feature)
        return feature

    def rest(self, feature: Tensor, after: str, head: Tensor, size: tuple[int, int]) -> Tensor:
        """Run everything after the tap `after` on a feature (N, C, h', w').

        `head` is this network's own head feature (the long skip adds it), `size` the (h, w) of the LR
        image. Returns (N, 3, scale*h, scale*w).
        """
        for group in self.groups[self.position(after) :]:  # type: ignore[attr-defined]
            feature = group(feature)
        return self.crop(self.tail(feature, head), size)


class MeanShift(nn.Module):
    """Between images in [0, 1] and the network's own range: (x - mean) * range, and back."""

    mean: Tensor

    def __init__(self, rgb_range: float, mean: tuple[float, float, float] = DIV2K_MEAN) -> None:
        super().__init__()
        self.rgb_range = rgb_range
        # Not persistent: a constant of the architecture, not a weight.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.mean) * self.rgb_range

    def undo(self, image: Tensor) -> Tensor:
        return image / self.rgb_range + self.mean


class ImageHead(nn.Module):
    """Mean shift and the first 3x3 convolution."""

    def __init__(self, channels: int, shift: MeanShift) -> None:
        super().__init__()
        self.shift = shift
        self.conv = conv3x3(3, channels)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(self.shift(image))


class ConvTail(nn.Module):
    """Long skip, sub-pixel upsampling in stages, last 3x3 convolution, mean shift back.

    x2: conv(C -> 4C), shuffle 2. x3: conv(C -> 9C), shuffle 3. x4: two x2 stages. Then conv(C -> 3).
    """

    def __init__(self, channels: int, scale: int, shift: MeanShift) -> None:
        super().__init__()
        self.upsample = upsampler(channels, scale)
        self.last = conv3x3(channels, 3)
        self.shift = shift

    def forward(self, feature: Tensor, head: Tensor) -> Tensor:
        return self.shift.undo(in_turn([*self.upsample, self.last], feature + head))


class OneStepTail(nn.Module):
    """Long skip, one conv(C -> 3 * scale^2), shuffle: the tail of the small deployed networks."""

    def __init__(self, channels: int, scale: int, shift: MeanShift) -> None:
        super().__init__()
        self.conv = conv3x3(channels, 3 * scale**2)
        self.shuffle = nn.PixelShuffle(scale)
        self.shift = shift

    def forward(self, feature: Tensor, head: Tensor) -> Tensor:
        return self.shift.undo(enlarge(self.conv, self.shuffle, feature + head))


def conv3x3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def upsampler(channels: int, scale: int) -> SubPixel:
    """Convolutions and pixel shuffles; convolutions stand at even indices, as in official files."""
    stages = {2: (2,), 3: (3,), 4: (2, 2)}
    if scale not in stages:
        raise SrkdError(f"scale {scale} is not supported; use 2, 3 or 4.")
    layers: list[nn.Module] = []
    for factor in stages[scale]:
        layers += [conv3x3(channels, channels * factor**2), nn.PixelShuffle(factor)]
    return SubPixel(*layers)


def staged_tail_radius(scale: int) -> float:
    """Reach of `ConvTail` in LR pixels: one pixel per convolution at the resolution it runs at."""
    at = {2: (1, 2), 3: (1, 3), 4: (1, 2, 4)}[scale]
    return sum(1 / factor for factor in at)


def reach(body_px: float, tail_px: float) -> int:
    """Receptive-field radius in whole LR pixels."""
    return math.ceil(body_px + tail_px)
