"""RCAN: residual groups of blocks with channel attention.

Paper: Zhang, Li, Li, Wang, Zhong, Fu, "Image Super-Resolution Using Very Deep Residual Channel Attention
Networks", ECCV 2018, arXiv 1807.02758. Checked against: yulunzhang/RCAN, XPixelGroup/BasicSR.

    s        = sigmoid(conv1x1(relu(conv1x1(mean_hw(x)))))     channel attention, C -> C/16 -> C
    block(x) = x + s(u) * u,   u = conv(relu(conv(x)))
    group(x) = x + conv(blocks(x))
    sr       = tail(body_conv(groups(head)) + head)

Internal range 0..255 after subtracting the DIV2K mean. The mean over the whole map makes the network see
the whole image: tiles are never exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.networks.base import ConvTail, ImageHead, MeanShift, Network, conv3x3
from srkd.types import Facts


@dataclass(frozen=True)
class RcanConfig:
    scale: int = 4
    channels: int = 64
    blocks: int = 20
    group_count: int = 10
    reduction: int = 16
    rgb_range: float = 255.0


class ChannelAttention(nn.Module):
    """Scale every channel by a gate computed from its mean: (N, C, h, w) -> (N, C, h, w)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // reduction, 1)
        self.excite = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))


class AttentionBlock(nn.Module):
    """RCAB: x + attention(conv(relu(conv(x))))."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.conv2 = conv3x3(channels, channels)
        self.attention = ChannelAttention(channels, reduction)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.conv2(F.relu(self.conv1(x))))


class ResidualGroup(nn.Module):
    """x + conv(blocks(x))."""

    def __init__(self, channels: int, blocks: int, reduction: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(AttentionBlock(channels, reduction) for _ in range(blocks)))
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.blocks(x))


class Rcan(Network):
    family = "rcan"
    paper = "RCAN, ECCV 2018, arXiv 1807.02758"
    tap_unit = "group"
    config: RcanConfig

    def __init__(self, config: RcanConfig) -> None:
        super().__init__(config)
        c = config
        shift = MeanShift(c.rgb_range)
        self.head = ImageHead(c.channels, shift)
        groups = [ResidualGroup(c.channels, c.blocks, c.reduction) for _ in range(c.group_count)]
        self.groups = nn.ModuleList([*groups, conv3x3(c.channels, c.channels)])
        self.tail = ConvTail(c.channels, c.scale, shift)

    @property
    def facts(self) -> Facts:
        return Facts(scale=self.config.scale, receptive_field_px=None, exact_tiling=False)
