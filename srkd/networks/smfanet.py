"""SMFANet: an approximation of self-attention from pooled maxima, modulated by the variance.

Paper: Zheng, Sun, Dong, Pan, "SMFANet: A Lightweight Self-Modulation Feature Aggregation Network for
Efficient Image Super-Resolution", ECCV 2024. Checked against: Zheng-MJ/SMFANet @ b3ac0712.

    norm(x)  = x / |x|_2 over the channels of every pixel
    block(x) = z + pcfn(norm(z)),   z = x + smfa(norm(x))
    smfa(x)  = conv1x1(b * up(gelu(conv1x1(alpha * dw(pool(b)) + beta * var_hw(b)))) + lde(a))
               [a, b] = conv1x1(x)                                     lde = conv1x1(gelu(conv1x1(dw(.))))
    pcfn(x)  = conv1x1([gelu(conv(u)), v])           [u, v] = gelu(conv1x1(x)), u a quarter of the channels
    sr       = tail(blocks(head) + head)

Internal range 0..1, no mean shift. `pool` is the adaptive maximum over floor(h/8) x floor(w/8) cells, `up`
repeats the nearest cell, `var_hw` looks at the whole image: tiles are never exact. There is no body
convolution: the feature at the tap "body" is the one after the last block.

Departs from the public code: cells are looked up by whole-number index, so that the exported graph has
dynamic height and width. The values are the same; only ties share the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.networks.base import ImageHead, MeanShift, Network, OneStepTail, conv3x3
from srkd.types import Facts

CELL_PX = 8
LARGEST_CELL_PX = 15  # one cell alone takes up to 15 px, of which 7 are no cell of their own
PARTIAL = 0.25


@dataclass(frozen=True)
class SmfanetConfig:
    scale: int = 4
    channels: int = 36
    blocks: int = 8
    growth: float = 2.0  # hidden channels of the feed-forward part over `channels`


def cell_index(size: int, device: torch.device) -> Tensor:
    """Pixels of every cell of an axis: (floor(size/8), 15), a cell's last pixel repeated to fill the row.

    Cell i is floor(i size/n) .. ceil((i+1) size/n) - 1, as in adaptive pooling; cells may overlap.
    """
    cells = size // CELL_PX
    i = torch.arange(cells, device=device).unsqueeze(1)
    k = torch.arange(LARGEST_CELL_PX, device=device).unsqueeze(0)
    first = i * size // cells
    last = ((i + 1) * size + cells - 1) // cells - 1
    return torch.minimum(first + k, last)


def cell_maximum(x: Tensor) -> Tensor:
    """`adaptive_max_pool2d` to (floor(h/8), floor(w/8)), with sizes that export can keep symbolic."""
    for axis in (2, 3):
        index = cell_index(x.shape[axis], x.device)
        cells = x.index_select(axis, index.flatten())
        x = cells.unflatten(axis, index.shape).amax(axis + 1)
    return x


def repeat_cells(x: Tensor, h: int, w: int) -> Tensor:
    """Nearest interpolation of (N, C, n, m) to (N, C, h, w)."""
    for axis, size in ((3, w), (2, h)):  # in this order all but the last copy is small
        x = x.index_select(axis, torch.arange(size, device=x.device) * x.shape[axis] // size)
    return x


class LocalDetail(nn.Module):
    """LDE: depthwise 3x3 to twice the channels, 1x1, GELU, 1x1 back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.project = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.gelu(self.pointwise(self.depthwise(x))))


class SelfModulation(nn.Module):
    """SMFA: coarse non-local gate on one half, local detail of the other: (N, C, h, w) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.split = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.modulate = nn.Conv2d(channels, channels, 1)
        self.local = LocalDetail(channels)
        self.merge = nn.Conv2d(channels, channels, 1)
        self.alpha = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.split(x).chunk(2, 1)
        variance = b.var((2, 3), keepdim=True)
        coarse = self.depthwise(cell_maximum(b)) * self.alpha + variance * self.beta
        gate = repeat_cells(F.gelu(self.modulate(coarse)), x.shape[2], x.shape[3])
        return self.merge(b * gate + self.local(a))


class PartialFeedForward(nn.Module):
    """PCFN: 1x1 to `hidden` channels, 3x3 on a quarter of them, 1x1 back."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.parts = (int(hidden * PARTIAL), hidden - int(hidden * PARTIAL))
        self.widen = nn.Conv2d(channels, hidden, 1)
        self.conv = conv3x3(self.parts[0], self.parts[0])
        self.narrow = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.widen(x)).split(self.parts, 1)
        return self.narrow(torch.cat([F.gelu(self.conv(u)), v], 1))


class ModulationBlock(nn.Module):
    """FMB: x + smfa(norm(x)), then the same with pcfn."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.smfa = SelfModulation(channels)
        self.pcfn = PartialFeedForward(channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.smfa(F.normalize(x)) + x
        return self.pcfn(F.normalize(x)) + x


class Smfanet(Network):
    family = "smfanet"
    paper = "SMFANet, ECCV 2024"
    tap_unit = "block"
    config: SmfanetConfig

    def __init__(self, config: SmfanetConfig) -> None:
        super().__init__(config)
        c = config
        shift = MeanShift(1.0, (0.0, 0.0, 0.0))
        self.head = ImageHead(c.channels, shift)
        hidden = int(c.channels * c.growth)
        blocks = [ModulationBlock(c.channels, hidden) for _ in range(c.blocks)]
        self.groups = nn.ModuleList([*blocks, nn.Identity()])
        self.tail = OneStepTail(c.channels, c.scale, shift)

    @property
    def facts(self) -> Facts:
        return Facts(
            scale=self.config.scale,
            receptive_field_px=None,
            exact_tiling=False,
            minimum_px=CELL_PX,
        )
