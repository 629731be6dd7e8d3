"""RDN: residual dense blocks, all of them fused at the end.

Paper: Zhang, Tian, Kong, Zhong, Fu, "Residual Dense Network for Image Super-Resolution", CVPR 2018,
arXiv 1802.08797. Checked against: yulunzhang/RDN as ported to EDSR-PyTorch (wwlCape/HAN @ 26ac0152).

    F_-1     = conv(lr)                                                        SFENet1, the head feature
    F_0      = conv(F_-1)                                                      SFENet2
    rdb(x)   = x + conv1x1([x, y_1, .., y_C]),  y_c = relu(conv([x, y_1, .., y_{c-1}]))
    F_d      = rdb(F_{d-1})                                                    d = 1..D
    sr       = tail(conv(conv1x1([F_1, .., F_D])) + F_-1)                      GFF, then UPNet

Internal range 0..1 or 0..255, no mean shift. SFENet2 stands in the first group, as nothing else reads F_0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.networks.base import (
    ImageHead,
    MeanShift,
    conv3x3,
    reach,
    staged_tail_radius,
    upsampler,
)
from srkd.networks.fused import FusedNetwork
from srkd.networks.subpixel import SubPixel
from srkd.types import Facts


@dataclass(frozen=True)
class RdnConfig:
    """The defaults are configuration B of the public code; A has 20 blocks, 6 layers, growth 32."""

    scale: int = 4
    channels: int = 64
    blocks: int = 16
    layers: int = 8
    growth: int = 64
    rgb_range: float = 1.0


class DenseBlock(nn.Module):
    """RDB: every layer sees the input and all layers before it; fused, plus the input."""

    def __init__(self, channels: int, layers: int, growth: int, first: bool) -> None:
        super().__init__()
        self.enter = conv3x3(channels, channels) if first else nn.Identity()  # SFENet2
        self.layers = nn.ModuleList(conv3x3(channels + i * growth, growth) for i in range(layers))
        self.fuse = nn.Conv2d(channels + layers * growth, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        seen = x
        for layer in self.layers:
            seen = torch.cat([seen, F.relu(layer(seen))], 1)
        return self.fuse(seen) + x


class GlobalFusion(nn.Module):
    """GFF: the features after all blocks to one: D * (N, C, h, w) -> (N, C, h, w)."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(blocks * channels, channels, 1)
        self.conv = conv3x3(channels, channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.conv(self.mix(torch.cat(features, 1)))


class Tail(nn.Module):
    """Long skip and UPNet: sub-pixel stages of `growth` channels, last 3x3 convolution.

    Convolutions stand at even indices of one sequence, the last one too, as in official files.
    """

    def __init__(self, channels: int, growth: int, scale: int, shift: MeanShift) -> None:
        super().__init__()
        stages = upsampler(growth, scale)
        stages[0] = conv3x3(channels, growth * (scale if scale == 3 else 2) ** 2)
        self.upsample = SubPixel(*stages, conv3x3(growth, 3))
        self.shift = shift

    def forward(self, feature: Tensor, head: Tensor) -> Tensor:
        return self.shift.undo(self.upsample(feature + head))


class Rdn(FusedNetwork):
    family = "rdn"
    paper = "RDN, CVPR 2018, arXiv 1802.08797"
    tap_unit = "block"
    config: RdnConfig

    def __init__(self, config: RdnConfig) -> None:
        super().__init__(config)
        c = config
        shift = MeanShift(c.rgb_range, (0.0, 0.0, 0.0))
        self.head = ImageHead(c.channels, shift)
        blocks = [DenseBlock(c.channels, c.layers, c.growth, i == 0) for i in range(c.blocks)]
        self.groups = nn.ModuleList([*blocks, GlobalFusion(c.channels, c.blocks)])
        self.tail = Tail(c.channels, c.growth, c.scale, shift)

    @property
    def facts(self) -> Facts:
        c = self.config
        body_px = 2 + c.blocks * c.layers + 1  # SFENet1 and 2, the blocks, the fusion
        return Facts(
            scale=c.scale,
            receptive_field_px=reach(body_px, staged_tail_radius(c.scale)),
            exact_tiling=True,
        )
