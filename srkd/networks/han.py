"""HAN: the groups of RCAN, weighed against each other by layer attention.

Paper: Niu, Wen, Ren, Zhang, Yang, Wang, Zhang, Cao, Shen, "Single Image Super-Resolution via a Holistic
Attention Network", ECCV 2020, arXiv 2008.08767. Checked against: wwlCape/HAN @ 26ac0152.

    F_i      = group_i(F_{i-1}),  F_0 = head,  B = conv(F_n)               groups as in RCAN
    X        = [B, F_n, .., F_1], each map one row; E = X X^T                                    (1)
    layers   = X + gamma_l softmax_j(max_j E_ij - E_ij) X                   layer attention      (2)
    channels = B + gamma_c sigmoid(conv3d(B)) B                             over C, h and w      (3)
    sr       = tail(conv([channels, conv(layers)]) + head)                                       (4)

Internal range 0..255 after subtracting the DIV2K mean. Attention over whole maps: tiles are never exact.
The body is what (4) adds to the head feature. The public code fixes n = 10; here it is any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.networks.base import ConvTail, ImageHead, MeanShift, conv3x3
from srkd.networks.fused import FusedNetwork
from srkd.networks.precision import full_precision
from srkd.networks.rcan import ResidualGroup
from srkd.types import Facts


@dataclass(frozen=True)
class HanConfig:
    scale: int = 4
    channels: int = 64
    blocks: int = 20
    group_count: int = 10
    reduction: int = 16
    rgb_range: float = 255.0

    def __post_init__(self) -> None:
        if self.channels < self.reduction:
            raise SrkdError(
                f"HAN with {self.channels} channels has none left in its channel attention, which keeps "
                f"one in {self.reduction}; choose {self.reduction} channels or more, or a smaller reduction."
            )


def layer_attention(x: Tensor) -> Tensor:  # the product of Eq. (2)
    """Every layer as a mean of all, the least similar weighing most: (N, layers, values) -> same."""
    energy = x @ x.transpose(1, 2)  # Eq. (1)
    return torch.softmax(energy.amax(2, keepdim=True) - energy, 2) @ x


class HolisticAttention(nn.Module):
    """Body convolution and Eq. (2), (3), (4): n * (N, C, h, w), oldest first -> (N, C, h, w)."""

    def __init__(self, channels: int, group_count: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)
        self.layer_gamma = nn.Parameter(torch.zeros(1))
        self.layer_conv = conv3x3((group_count + 1) * channels, channels)
        self.channel_conv = nn.Conv3d(1, 1, 3, padding=1)
        self.channel_gamma = nn.Parameter(torch.zeros(1))
        self.merge = conv3x3(2 * channels, channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        body = self.conv(features[-1])
        stacked = torch.stack([body, *reversed(features)], 1)
        # A sum of squares over a whole map of an image in 0..255 overflows in half precision.
        with full_precision(stacked.flatten(2)) as rows:
            weighed = layer_attention(rows)
        layers = stacked + self.layer_gamma * weighed.view(stacked.shape)
        gate = torch.sigmoid(self.channel_conv(body.unsqueeze(1))).squeeze(1)
        channels = body + self.channel_gamma * gate * body
        return self.merge(torch.cat([channels, self.layer_conv(layers.flatten(1, 2))], 1))


class Han(FusedNetwork):
    family = "han"
    paper = "HAN, ECCV 2020, arXiv 2008.08767"
    tap_unit = "group"
    config: HanConfig

    def __init__(self, config: HanConfig) -> None:
        super().__init__(config)
        c = config
        shift = MeanShift(c.rgb_range)
        self.head = ImageHead(c.channels, shift)
        groups = [ResidualGroup(c.channels, c.blocks, c.reduction) for _ in range(c.group_count)]
        self.groups = nn.ModuleList([*groups, HolisticAttention(c.channels, c.group_count)])
        self.tail = ConvTail(c.channels, c.scale, shift)

    @property
    def facts(self) -> Facts:
        return Facts(scale=self.config.scale, receptive_field_px=None, exact_tiling=False)
