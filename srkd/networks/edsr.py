"""EDSR: residual blocks without normalisation.

Paper: Lim, Son, Kim, Nah, Lee, "Enhanced Deep Residual Networks for Single Image Super-Resolution",
CVPRW 2017, arXiv 1707.02921. Checked against: sanghyun-son/EDSR-PyTorch, XPixelGroup/BasicSR.

    block(x) = x + r * conv(relu(conv(x)))                 r = residual scale
    sr       = tail(body_conv(blocks(head)) + head)

Internal range 0..255 after subtracting the DIV2K mean. The mobile variants (MLPerf Mobile) subtract no
mean and end in one convolution and one shuffle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from srkd.networks.base import (
    DIV2K_MEAN,
    ConvTail,
    ImageHead,
    MeanShift,
    Network,
    OneStepTail,
    conv3x3,
    reach,
    staged_tail_radius,
)
from srkd.types import Facts


@dataclass(frozen=True)
class EdsrConfig:
    scale: int = 4
    channels: int = 64
    blocks: int = 16
    residual_scale: float = 1.0
    rgb_range: float = 255.0
    mean_shift: bool = True
    tail: Literal["staged", "one_step"] = "staged"


class ResidualBlock(nn.Module):
    """x + r * conv(relu(conv(x)))."""

    def __init__(self, channels: int, residual_scale: float) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.conv2 = conv3x3(channels, channels)
        self.residual_scale = residual_scale

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv2(F.relu(self.conv1(x)))
        return x + branch if self.residual_scale == 1 else x + branch * self.residual_scale


class Edsr(Network):
    family = "edsr"
    paper = "EDSR, CVPRW 2017, arXiv 1707.02921"
    tap_unit = "block"
    config: EdsrConfig

    def __init__(self, config: EdsrConfig) -> None:
        super().__init__(config)
        c = config
        shift = MeanShift(c.rgb_range, DIV2K_MEAN if c.mean_shift else (0.0, 0.0, 0.0))
        self.head = ImageHead(c.channels, shift)
        blocks = [ResidualBlock(c.channels, c.residual_scale) for _ in range(c.blocks)]
        self.groups = nn.ModuleList([*blocks, conv3x3(c.channels, c.channels)])
        tail = ConvTail if c.tail == "staged" else OneStepTail
        self.tail = tail(c.channels, c.scale, shift)

    @property
    def facts(self) -> Facts:
        c = self.config
        tail_px = staged_tail_radius(c.scale) if c.tail == "staged" else 1
        return Facts(
            scale=c.scale,
            receptive_field_px=reach(1 + 2 * c.blocks + 1, tail_px),
            exact_tiling=True,
        )
