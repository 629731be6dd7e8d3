"""RLFN: residual local feature blocks, plain convolutions and one spatial attention each.

Paper: Kong, Li, Liu, Liu, He, Bai, Chen, Fu, "Residual Local Feature Network for Efficient
Super-Resolution", CVPRW 2022, arXiv 2205.07514. Checked against: bytedance/RLFN @ 79700af4.

    f         = lrelu_0.05(conv(.))
    block(x)  = esa(conv1x1(f(f(f(x))) + x))
    esa(x)    = x * sigmoid(conv1x1(up(conv(pool(conv_s2(y)))) + conv1x1(y))),  y = conv1x1(x)
    sr        = tail(body_conv(blocks(head)) + head)

Internal range 0..255, no mean shift. `pool` is a maximum over 7x7 with stride 3 and `up` bilinear to the
size of x; neither pads. So the coarse map is stretched over the image by a factor that depends on the
image's size, and with it every pixel: tiles are never exact, however wide their halo.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.networks.base import ImageHead, MeanShift, Network, OneStepTail, conv3x3
from srkd.types import Facts

SLOPE = 0.05
ESA_MINIMUM_PX = 15  # convolution of stride 2, then a pool of 7: less leaves nothing


@dataclass(frozen=True)
class RlfnConfig:
    scale: int = 4
    channels: int = 52
    mid_channels: int = 52  # inside a block; 48 beside 46 channels in the NTIRE 2022 network
    blocks: int = 6
    esa_channels: int = 16
    rgb_range: float = 255.0


class SpatialAttention(nn.Module):
    """ESA: a gate per pixel from a map at about a sixth of the size: (N, C, h, w) -> same."""

    def __init__(self, channels: int, f: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, f, 1)
        self.keep = nn.Conv2d(f, f, 1)
        self.down = nn.Conv2d(f, f, 3, stride=2)
        self.conv = conv3x3(f, f)
        self.excite = nn.Conv2d(f, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.squeeze(x)
        z = self.conv(F.max_pool2d(self.down(y), 7, 3))
        z = F.interpolate(z, x.shape[-2:], mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.excite(z + self.keep(y)))


class LocalFeatureBlock(nn.Module):
    """RLFB: three convolutions, the skip inside, then 1x1 and ESA."""

    def __init__(self, config: RlfnConfig) -> None:
        super().__init__()
        c, m = config.channels, config.mid_channels
        self.conv1 = conv3x3(c, m)
        self.conv2 = conv3x3(m, m)
        self.conv3 = conv3x3(m, c)
        self.mix = nn.Conv2d(c, c, 1)
        self.esa = SpatialAttention(c, config.esa_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in (self.conv1, self.conv2, self.conv3):
            y = F.leaky_relu(conv(y), SLOPE)
        return self.esa(self.mix(y + x))


class Rlfn(Network):
    family = "rlfn"
    paper = "RLFN, CVPRW 2022, arXiv 2205.07514"
    tap_unit = "block"
    config: RlfnConfig

    def __init__(self, config: RlfnConfig) -> None:
        super().__init__(config)
        c = config
        shift = MeanShift(c.rgb_range, (0.0, 0.0, 0.0))
        self.head = ImageHead(c.channels, shift)
        blocks = [LocalFeatureBlock(c) for _ in range(c.blocks)]
        self.groups = nn.ModuleList([*blocks, conv3x3(c.channels, c.channels)])
        self.tail = OneStepTail(c.channels, c.scale, shift)

    @property
    def facts(self) -> Facts:
        return Facts(
            scale=self.config.scale,
            # Each attention looks 28 px far at most, but where it looks depends on the whole image's size.
            receptive_field_px=None,
            exact_tiling=False,
            minimum_px=ESA_MINIMUM_PX,
        )
