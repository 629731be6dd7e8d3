"""SwinIR: residual groups of window attention.

Paper: Liang, Cao, Sun, Zhang, Van Gool, Timofte, "SwinIR: Image Restoration Using Swin Transformer",
ICCV Workshops 2021, arXiv 2108.10257. Attention: Liu et al., "Swin Transformer", ICCV 2021,
arXiv 2103.14030. Checked against: JingyunLiang/SwinIR @ 6545850f, XPixelGroup/BasicSR @ 8d56e3a0.

    attention(q, k, v) = softmax(q k^T / sqrt(d) + B + M) v         B relative position bias, M shift mask
    layer(x) = z + mlp(norm(z)),   z = x + attention(norm(x))       windows of W x W, shifted by W/2
    rstb(x)  = x + conv(layers(x))                                   in every second layer
    sr       = tail(body_conv(norm(rstbs(norm(head)))) + head)

Internal range 0..1 after subtracting the DIV2K mean. Groups map (N, C, h, w) to (N, C, h, w); tokens
exist inside a group alone. Images are reflect-padded to multiples of the window.

Departs from the public code: the shift mask is recomputed in the forward pass from comparisons, so that
any size works and the exported graph has dynamic height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.networks.base import (
    ImageHead,
    MeanShift,
    Network,
    OneStepTail,
    conv3x3,
    reach,
    staged_tail_radius,
    upsampler,
)
from srkd.networks.subpixel import in_turn
from srkd.types import Facts

if TYPE_CHECKING:
    from collections.abc import Sequence

MASKED = -100.0  # added to a logit, as in the public code; representable in half precision
TAIL_CHANNELS = 64


@dataclass(frozen=True)
class SwinIRConfig:
    scale: int = 4
    channels: int = 180
    depths: tuple[int, ...] = (6, 6, 6, 6, 6, 6)  # layers of each RSTB
    heads: int = 6
    window: int = 8
    mlp_ratio: float = 2.0
    drop_path: float = (
        0.1  # stochastic depth of the last layer, growing linearly from 0; training only
    )
    tail: Literal["classical", "one_step"] = "classical"

    def __post_init__(self) -> None:
        if self.channels % self.heads:
            raise SrkdError(
                f"SwinIR with {self.channels} channels cannot split them over {self.heads} attention "
                "heads; choose channels that are a multiple of heads."
            )


def to_windows(x: Tensor, window: int) -> Tensor:
    """(N, h, w, C) -> (N * windows, W*W, C); h and w are multiples of the window."""
    n, h, w, c = x.shape
    x = x.view(n, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, c)


def from_windows(x: Tensor, window: int, h: int, w: int) -> Tensor:
    """Inverse of `to_windows`: (N * windows, W*W, C) -> (N, h, w, C)."""
    c = x.shape[-1]
    x = x.view(-1, h // window, w // window, window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, c)


def shift_mask(h: int, w: int, window: int, like: Tensor) -> Tensor:
    """0 where two tokens of a shifted window were neighbours, `MASKED` where the roll joined them.

    (windows, W*W, W*W), dtype and device of `like`. After the roll by W/2 the last window of each axis
    holds the image's end and its beginning.
    """
    shift = window // 2

    def bands(size: int) -> Tensor:
        at = torch.arange(size, device=like.device)
        return (at >= size - window).to(torch.int64) + (at >= size - shift).to(torch.int64)

    region = 3 * bands(h).view(1, h, 1, 1) + bands(w).view(1, 1, w, 1)
    token = to_windows(region, window).squeeze(-1)
    apart = token.unsqueeze(1) != token.unsqueeze(2)
    return apart.to(like.dtype) * MASKED


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for every pair of tokens in a window: (W*W, W*W), values < (2W-1)^2."""
    at = torch.arange(window)
    y, x = (a.flatten() for a in torch.meshgrid(at, at, indexing="ij"))
    dy = y.unsqueeze(1) - y.unsqueeze(0) + window - 1
    dx = x.unsqueeze(1) - x.unsqueeze(0) + window - 1
    return dy * (2 * window - 1) + dx


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows: (N * windows, W*W, C) -> same."""

    index: Tensor

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.rescale = (channels // heads) ** -0.5
        table = torch.empty((2 * window - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        # Not persistent: it follows from the window.
        self.register_buffer("index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` (windows, W*W, W*W) of `shift_mask`, None in layers without shift."""
        n, tokens, c = x.shape
        qkv = self.qkv(x).view(n, tokens, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        # Plain products, not the fused operator: fvcore counts them, and every engine can run them.
        logits = (q * self.rescale) @ k.transpose(-2, -1)
        table = self.relative_position_bias_table[self.index.view(-1)]
        bias = table.view(tokens, tokens, self.heads).permute(2, 0, 1)
        if mask is not None:
            bias = bias + mask.unsqueeze(1)
            logits = logits.view(-1, mask.shape[0], self.heads, tokens, tokens)
        # One pass over the largest tensor of the network, which stays in half precision where it is in it.
        logits = (logits + bias.to(logits.dtype)).view(n, self.heads, tokens, tokens)
        mixed = logits.softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(n, tokens, c))


class Mlp(nn.Module):
    """Linear, GELU, linear on the last dimension."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: drop the branch of whole samples in training, rescale the rest."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep


class SwinLayer(nn.Module):
    """One transformer layer on (N, h, w, C)."""

    def __init__(self, config: SwinIRConfig, shifted: bool, drop_path: float) -> None:
        super().__init__()
        c = config
        self.window = c.window
        self.shift = c.window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(c.channels)
        self.attn = WindowAttention(c.channels, c.heads, c.window)
        self.norm2 = nn.LayerNorm(c.channels)
        self.mlp = Mlp(c.channels, int(c.channels * c.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    @property
    def needs_mask(self) -> bool:
        return self.shift > 0

    def attend(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """(N * windows, W*W, C) -> same; `mask` of `shift_mask` in shifted layers."""
        return self.attn(windows, mask)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` is used by layers that need it alone."""
        _, h, w, _ = x.shape
        y = self.norm1(x)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = self.attend(to_windows(y, self.window), mask if self.needs_mask else None)
        y = from_windows(y, self.window, h, w)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Rstb(nn.Module):
    """Residual Swin transformer block: x + conv(layers(x)) on (N, C, h, w).

    A layer maps (N, h, w, C) and the mask of `shift_mask` to (N, h, w, C) and says whether it needs that
    mask. The first group of a network normalises its input first (`patch_norm`), the skip included.
    """

    def __init__(
        self, layers: Sequence[nn.Module], channels: int, window: int, patch_norm: bool
    ) -> None:
        super().__init__()
        self.window = window
        self.norm = nn.LayerNorm(channels) if patch_norm else None
        self.layers = nn.ModuleList(layers)
        self.needs_mask = any(layer.needs_mask for layer in layers)
        self.conv = conv3x3(channels, channels)

    def forward(self, feature: Tensor) -> Tensor:
        x = feature.permute(0, 2, 3, 1)
        if self.norm is not None:
            x = self.norm(x)
        h, w = x.shape[1:3]
        mask = shift_mask(h, w, self.window, like=x) if self.needs_mask else None
        y = x
        for layer in self.layers:
            y = layer(y, mask)
        return self.conv(y.permute(0, 3, 1, 2)) + x.permute(0, 3, 1, 2)


class Body(nn.Module):
    """Final norm and the body convolution on (N, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = conv3x3(channels, channels)

    def forward(self, feature: Tensor) -> Tensor:
        return self.conv(self.norm(feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class ClassicalTail(nn.Module):
    """Long skip, conv(C -> 64), LeakyReLU, sub-pixel upsampling in stages, conv(64 -> 3)."""

    def __init__(self, channels: int, scale: int, shift: MeanShift) -> None:
        super().__init__()
        self.before = conv3x3(channels, TAIL_CHANNELS)
        self.act = nn.LeakyReLU(0.01)
        self.upsample = upsampler(TAIL_CHANNELS, scale)
        self.last = conv3x3(TAIL_CHANNELS, 3)
        self.shift = shift

    def forward(self, feature: Tensor, head: Tensor) -> Tensor:
        x = self.act(self.before(feature + head))
        return self.shift.undo(in_turn([*self.upsample, self.last], x))


def attention_reach(depths: tuple[int, ...], window: int) -> int:
    """Largest distance in pixels over which the groups of these depths carry information.

    Each layer looks at its whole window, up to W-1 px away, and each convolution 1 px further. But grids
    alternate by W/2 only, so a long chain gains W/2 per layer: the windows themselves are followed here,
    from the output back to the input, for every position on the grid.
    """

    def down(at: int, grid: int) -> int:
        return (at - grid) // window * window + grid

    largest = 0
    for start in range(window):
        low = high = start
        low, high = low - 1, high + 1  # the body convolution
        for depth in reversed(depths):
            low, high = low - 1, high + 1
            for i in reversed(range(depth)):
                grid = window // 2 if i % 2 else 0
                low, high = down(low, grid), down(high, grid) + window - 1
        largest = max(largest, start - low, high - start)
    return largest


class SwinIR(Network):
    family = "swinir"
    paper = "SwinIR, ICCV Workshops 2021, arXiv 2108.10257"
    tap_unit = "rstb"
    config: SwinIRConfig

    def __init__(self, config: SwinIRConfig) -> None:
        super().__init__(config)
        c = config
        shift = MeanShift(1.0)
        self.head = ImageHead(c.channels, shift)
        layers = sum(c.depths)
        rates = [c.drop_path * i / max(layers - 1, 1) for i in range(layers)]
        groups: list[nn.Module] = []
        for i, depth in enumerate(c.depths):
            first = sum(c.depths[:i])
            own = [SwinLayer(c, j % 2 == 1, rates[first + j]) for j in range(depth)]
            groups.append(Rstb(own, c.channels, c.window, patch_norm=i == 0))
        self.groups = nn.ModuleList([*groups, Body(c.channels)])
        tail = ClassicalTail if c.tail == "classical" else OneStepTail
        self.tail = tail(c.channels, c.scale, shift)
        self.apply(initialise)

    @property
    def facts(self) -> Facts:
        c = self.config
        tail_px = 1 + staged_tail_radius(c.scale) if c.tail == "classical" else 1
        return Facts(
            scale=c.scale,
            receptive_field_px=reach(1 + attention_reach(c.depths, c.window), tail_px),
            exact_tiling=True,
            size_multiple=c.window,
            minimum_px=c.window // 2 + 1,
        )


def initialise(module: nn.Module) -> None:
    """Linear layers as in the public code; convolutions keep PyTorch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
