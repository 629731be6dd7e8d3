"""BSRN: distillation blocks of blueprint separable convolutions, all of them fused at the end.

Paper: Li, Liu, Chen, Cai, Gu, Qiao, Dong, "Blueprint Separable Residual Network for Efficient Image
Super-Resolution", CVPRW 2022, arXiv 2205.05996. Checked against: xiaom233/BSRN @ 355aa84f.

    bsconv(x) = depthwise3x3(conv1x1(x))
    r_k       = gelu(bsconv(r_{k-1}) + r_{k-1}),  d_k = gelu(conv1x1(r_{k-1}))       k = 1..3, r_0 = x
    block(x)  = x + cca(esa(conv1x1([d_1, d_2, d_3, gelu(bsconv(r_3))])))
    esa(x)    = x * sigmoid(conv1x1(up(g(pool(bsconv_s2(y)))) + conv1x1(y))),  y = conv1x1(x)
    cca(x)    = x * sigmoid(conv1x1(relu(conv1x1(std_hw(x) + mean_hw(x)))))
    sr        = tail(bsconv(gelu(conv1x1([block_1, ..., block_n]))) + head)

Internal range 0..1, no mean shift. The head sees the image four times over. CCA looks at the whole image:
tiles are never exact.

Besides the path through the blocks every block has a path of its own to the fusion. So the rest after a
tap takes the features before the tap from this network's own head feature, as the long skip does, and
`rest` runs the blocks before the tap again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.networks.base import MeanShift, Network, OneStepTail
from srkd.types import Facts, Pass

if TYPE_CHECKING:
    from collections.abc import Collection

IMAGE_COPIES = 4
CCA_REDUCTION = 16
ESA_MINIMUM_PX = 15  # convolution of stride 2, then a pool of 7: less leaves nothing
TINY_VARIANCE = 1e-12


@dataclass(frozen=True)
class BsrnConfig:
    scale: int = 4
    channels: int = 64
    blocks: int = 8

    def __post_init__(self) -> None:
        if self.channels < CCA_REDUCTION:
            raise SrkdError(
                f"BSRN with {self.channels} channels has none left in its channel attention, which "
                f"keeps one in {CCA_REDUCTION}; choose {CCA_REDUCTION} channels or more."
            )


class BSConv(nn.Module):
    """Blueprint separable convolution (BSConv-U): pointwise without bias, then depthwise 3x3."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.depthwise = nn.Conv2d(c_out, c_out, 3, stride, padding, groups=c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(self.pointwise(x))


class SpatialAttention(nn.Module):
    """ESA: a gate per pixel from a map at about a sixth of the size: (N, C, h, w) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        f = channels // 4
        self.squeeze = nn.Conv2d(channels, f, 1)
        self.keep = nn.Conv2d(f, f, 1)
        self.down = BSConv(f, f, stride=2, padding=0)
        self.conv1 = BSConv(f, f)
        self.conv2 = BSConv(f, f)
        self.conv3 = BSConv(f, f)
        self.excite = nn.Conv2d(f, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.squeeze(x)
        z = F.max_pool2d(self.down(y), 7, 3)
        z = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(z)))))
        z = F.interpolate(z, x.shape[-2:], mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.excite(z + self.keep(y)))


class ContrastAttention(nn.Module):
    """CCA: a gate per channel from its mean and its standard deviation: (N, C, h, w) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // CCA_REDUCTION, 1)
        self.excite = nn.Conv2d(channels // CCA_REDUCTION, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = F.adaptive_avg_pool2d(x, 1)
        variance = F.adaptive_avg_pool2d((x - mean).square(), 1)
        # Not in the public code: the root of a flat channel's variance has no finite gradient.
        contrast = variance.clamp(min=TINY_VARIANCE).sqrt()
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(contrast + mean))))


class DistillationBlock(nn.Module):
    """ESDB: three refinements, a part of each kept aside, fused and gated; plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        kept = channels // 2
        self.distil = nn.ModuleList(nn.Conv2d(channels, kept, 1) for _ in range(3))
        self.refine = nn.ModuleList(BSConv(channels, channels) for _ in range(3))
        self.last = BSConv(channels, kept)
        self.fuse = nn.Conv2d(4 * kept, channels, 1)
        self.esa = SpatialAttention(channels)
        self.cca = ContrastAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        r, parts = x, []
        for distil, refine in zip(self.distil, self.refine, strict=True):
            parts.append(F.gelu(distil(r)))
            r = F.gelu(refine(r) + r)
        parts.append(F.gelu(self.last(r)))
        return self.cca(self.esa(self.fuse(torch.cat(parts, 1)))) + x


class Head(nn.Module):
    """BSConv over the image repeated four times: (N, 3, h, w) -> (N, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = BSConv(3 * IMAGE_COPIES, channels)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(torch.cat([image] * IMAGE_COPIES, 1))


class Fusion(nn.Module):
    """The features after all blocks, concatenated, to one: (N, blocks * C, h, w) -> (N, C, h, w)."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(blocks * channels, channels, 1)
        self.conv = BSConv(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv(F.gelu(self.mix(features)))


class Bsrn(Network):
    family = "bsrn"
    paper = "BSRN, CVPRW 2022, arXiv 2205.05996"
    tap_unit = "block"
    config: BsrnConfig

    def __init__(self, config: BsrnConfig) -> None:
        super().__init__(config)
        c = config
        self.head = Head(c.channels)
        blocks = [DistillationBlock(c.channels) for _ in range(c.blocks)]
        self.groups = nn.ModuleList([*blocks, Fusion(c.channels, c.blocks)])
        self.tail = OneStepTail(c.channels, c.scale, MeanShift(1.0, (0.0, 0.0, 0.0)))

    @property
    def facts(self) -> Facts:
        return Facts(
            scale=self.config.scale,
            receptive_field_px=None,
            exact_tiling=False,
            minimum_px=ESA_MINIMUM_PX,
        )

    def _extend(self, features: list[Tensor], position: int) -> list[Tensor]:
        """`features` are those after 0, 1, .. groups, the head feature first; adds up to `position`."""
        features = list(features)
        for i in range(len(features) - 1, position):
            fused = i + 1 == len(self.groups)
            features.append(self.groups[i](torch.cat(features[1:], 1) if fused else features[-1]))
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
                f"BSRN's features from '{after}' to '{until}' need all its blocks, and one feature was "
                "given; choose positions before 'body' (method.mipkd.positions) or mix_mode = 'position'."
            )
        return self._extend([*self._extend([head], start - 1), feature], stop)[-1]

    def rest(self, feature: Tensor, after: str, head: Tensor, size: tuple[int, int]) -> Tensor:
        """As in `Network`; the blocks before the tap run again, from `head`."""
        feature = self.between(feature, after, self.tap_names[-1], head)
        return self.crop(self.tail(feature, head), size)
