"""SAN: second-order channel attention, and non-local attention before and after the groups.

Paper: Dai, Cai, Zhang, Xia, Zhang, "Second-order Attention Network for Single Image Super-Resolution",
CVPR 2019. Checked against: daitao/SAN @ 67df6d9f (TrainCode, which the published weights belong to).

    S         = mean_p (x_p - mean x)(x_p - mean x)^T              over the pixels p             (1)
    sqrt(S)   = sqrt(tr S) Y_5,  Y_0 = S / tr S,  Z_0 = I                                        (2)
                T = (3 I - Z Y) / 2,  Y <- Y T,  Z <- T Z          Newton-Schulz, 5 times
    soca(x)   = x * sigmoid(conv1x1(relu(conv1x1(column mean of sqrt(S)))))   C -> C/r -> C      (3)
    nl(x)     = x + conv1x1(softmax(theta(x)^T phi(x)) g(x))       in each of four quadrants     (4)
    group(x)  = x + conv(soca(blocks(x))),  block(x) = x + conv(relu(conv(x)))                   (5)
    F_0       = nl(head),  F_i = group_i(F_{i-1}) + gamma F_0                                    (6)
    sr        = tail(nl(F_n) + head)                               nl is the same layer both times

Internal range 0..255 after subtracting the DIV2K mean. Both attentions look beyond every tile: tiles are
never exact. The feature after group i is F_i; the body is nl(F_n).

Departs from the public code: no modules that its forward pass never calls; a flat map has a square root of
zero, not of NaN; a side of exactly 1000 px beside a shorter one is not cropped wrongly; the M x M matrix
of (1) over M pixels is never built.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from srkd.errors import SrkdError
from srkd.networks.base import ConvTail, ImageHead, MeanShift, Network, conv3x3
from srkd.networks.edsr import ResidualBlock
from srkd.networks.precision import full_precision
from srkd.types import Facts, Pass

if TYPE_CHECKING:
    from collections.abc import Collection

ITERATIONS = 5
COVARIANCE_PX = 1000  # of a longer side the covariance takes its centre
NON_LOCAL_REDUCTION = 8
TINY_TRACE = 1e-12


@dataclass(frozen=True)
class SanConfig:
    scale: int = 4
    channels: int = 64
    blocks: int = 10
    group_count: int = 20
    reduction: int = 16
    rgb_range: float = 255.0

    def __post_init__(self) -> None:
        least = max(NON_LOCAL_REDUCTION, self.reduction)
        if self.channels < least:
            raise SrkdError(
                f"SAN with {self.channels} channels has none left in its attentions, which keep one in "
                f"{NON_LOCAL_REDUCTION} and one in {self.reduction}; choose {least} channels or more, or a "
                "smaller reduction."
            )


def covariance(x: Tensor, limit_px: int = COVARIANCE_PX) -> Tensor:  # Eq. (1)
    """Of the channels over the central pixels: (N, C, h, w) -> (N, C, C)."""
    rows, columns = (_central(side, limit_px, x) for side in x.shape[-2:])
    weight = (rows[:, None] * columns).flatten()
    pixels = weight.sum()
    x = x.flatten(2)
    centred = (x - (x * weight).sum(2, keepdim=True) / pixels) * weight
    return centred @ centred.transpose(1, 2) / pixels


def _central(side: int, limit_px: int, like: Tensor) -> Tensor:
    """1 at the central `limit_px` of `side` positions, 0 outside: (side).

    Instead of a crop, whose branch on the size would be baked into an exported graph.
    """
    start = (side - limit_px) // 2
    at = torch.arange(side, device=like.device)
    return ((at >= start) & (at < start + limit_px)).to(like.dtype)


def square_root(matrix: Tensor) -> Tensor:  # Eq. (2)
    """Of positive semidefinite matrices, approximately: (N, C, C) -> (N, C, C)."""
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1).clamp(min=TINY_TRACE)[:, None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    y, z = matrix / trace, identity.expand_as(matrix)
    for _ in range(ITERATIONS):
        step = (3 * identity - z @ y) / 2
        y, z = y @ step, step @ z
    return y * trace.sqrt()


def non_local(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:  # the sum of Eq. (4)
    """In each quadrant the mean of g, weighted by similarity: three maps (N, c, h, w) -> (N, c, h, w)."""
    h, w = g.shape[-2:]
    rows, columns = _halves(h, g.device), _halves(w, g.device)
    real = ((rows >= 0)[:, None] & (columns >= 0))[None, None]
    query, key, value = (
        _quadrants(m.index_select(2, rows.clamp(min=0)).index_select(3, columns.clamp(min=0)))
        for m in (theta, phi, g)
    )
    # Fused kernels need no matrix of pixels times pixels, but have no second derivative.
    kernel = sdpa_kernel(SDPBackend.MATH) if torch.is_grad_enabled() else nullcontext()
    with kernel:
        mean = F.scaled_dot_product_attention(
            query, key, value, attn_mask=_quadrants(real).transpose(2, 3), scale=1.0
        )
    whole = mean.view(-1, 2, 2, rows.numel() // 2, columns.numel() // 2, g.shape[1])
    whole = whole.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    for dim, side in ((2, h), (3, w)):
        kept = torch.arange(side, device=g.device) + (whole.shape[dim] - side)
        whole = whole.index_select(dim, kept)
    return whole


def _halves(side: int, device: torch.device) -> Tensor:
    """Positions of both halves, one after the other; the first of an odd side begins with -1, no position.

    So both have one length, and an exported graph takes odd and even sides alike.
    """
    length = 2 * ((side + 1) // 2)
    return torch.arange(length, device=device) + (side - length)


def _quadrants(x: Tensor) -> Tensor:
    """Upper left, upper right, lower left, lower right: (N, c, 2a, 2b) -> (N, 4, a*b, c)."""
    n, c, h, w = x.shape
    x = x.view(n, c, 2, h // 2, 2, w // 2)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


class SecondOrderAttention(nn.Module):  # Eq. (3)
    """Scale every channel by a gate from its covariances: (N, C, h, w) -> (N, C, h, w)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // reduction, 1)
        self.excite = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Features of images in 0..255 and a square root by iteration: half precision loses both.
        with full_precision(x) as wide:
            mean = square_root(covariance(wide)).mean(1)[:, :, None, None]
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))


class NonLocal(nn.Module):  # Eq. (4)
    """RL-NL: each quadrant attends to itself: (N, C, h, w) -> same; h, w at least 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // NON_LOCAL_REDUCTION
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(channels, inner, 1)
        self.g = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1)
        # As in the public code: at first the layer is the identity.
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(non_local(self.theta(x), self.phi(x), self.g(x)))


class Group(nn.Module):  # Eq. (5)
    """LSRAG: x + conv(soca(blocks(x)))."""

    def __init__(self, channels: int, blocks: int, reduction: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualBlock(channels, 1.0) for _ in range(blocks)))
        self.attention = SecondOrderAttention(channels, reduction)
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.attention(self.blocks(x)))


class San(Network):
    family = "san"
    paper = "SAN, CVPR 2019"
    tap_unit = "group"
    config: SanConfig

    def __init__(self, config: SanConfig) -> None:
        super().__init__(config)
        c = config
        shift = MeanShift(c.rgb_range)
        self.head = ImageHead(c.channels, shift)
        groups = [Group(c.channels, c.blocks, c.reduction) for _ in range(c.group_count)]
        self.groups = nn.ModuleList([*groups, NonLocal(c.channels)])
        self.gamma = nn.Parameter(torch.zeros(1))
        self.tail = ConvTail(c.channels, c.scale, shift)

    @property
    def facts(self) -> Facts:
        return Facts(
            scale=self.config.scale,
            receptive_field_px=None,
            exact_tiling=False,
            minimum_px=2,  # four quadrants
        )

    def _advance(self, feature: Tensor, start: int, stop: int, shared: Tensor | None) -> Tensor:
        """Run `groups[start:stop]`. All but the network's last add `shared`, F_0; None if none of these do."""
        for i in range(start, stop):
            feature = self.groups[i](feature)
            if shared is not None and i + 1 < len(self.groups):  # Eq. (6)
                feature = feature + self.gamma * shared
        return feature

    def _extend(self, features: list[Tensor], position: int) -> list[Tensor]:
        features = list(features)
        shared = self.groups[-1](features[0])
        for i in range(len(features) - 1, position):
            features.append(self._advance(features[i] if i else shared, i, i + 1, shared))
        return features

    def forward(self, lr: Tensor) -> Tensor:
        head = self.head(lr)
        shared = self.groups[-1](head)
        return self.tail(self._advance(shared, 0, len(self.groups), shared), head)

    def run(self, lr: Tensor, taps: Collection[str] = ()) -> Pass:
        at = {tap: self.position(tap) for tap in taps}
        head = self.head(lr)
        features = self._extend([head], len(self.groups))
        kept = {tap: features[position] for tap, position in at.items()}
        return Pass(network=self, sr=self.tail(features[-1], head), head=head, taps=kept)

    def between(
        self, feature: Tensor, after: str, until: str, head: Tensor | None = None
    ) -> Tensor:
        """As in `Network`; every group adds the non-local head feature, so it needs the head."""
        start, stop = self.position(after), self.position(until)
        if start >= min(stop, len(self.groups) - 1):
            return self._advance(feature, start, stop, None)
        if head is None:
            raise SrkdError(
                f"the features of SAN from '{after}' to '{until}' add its head feature, and one feature was "
                "given; give this network's own head feature too."
            )
        return self._advance(feature, start, stop, self.groups[-1](head))

    def rest(self, feature: Tensor, after: str, head: Tensor, size: tuple[int, int]) -> Tensor:
        """As in `Network`."""
        feature = self.between(feature, after, self.tap_names[-1], head)
        return self.crop(self.tail(feature, head), size)
