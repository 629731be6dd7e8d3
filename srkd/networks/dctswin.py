"""DCTSwin: the network of MTKD that aggregates the SR images of several teachers into one.

Paper: Jiang, Feng, Zhang, Bull, "MTKD: Multi-Teacher Knowledge Distillation for Image Super-Resolution",
ECCV 2024, arXiv 2404.09571.      Checked against: YuxuanJJ/MTKD.

    head        conv(unshuffle_s(T_1 - mu, ..., T_N - mu))                3N s^2 -> C channels, at LR size
    layer(x)  = z + mlp(norm(z)),   z = x + D^T attention(D norm(x) D^T) D                         (1)
    block(x)  = x + conv(layers(x))                                       the RSTB of srkd/networks/swinir.py
    I_MT      = mu + shuffle_s(conv(body_conv(norm(blocks(norm(head)))) + head))                   (2)

    T_n    SR image of teacher n, (B, 3, s*h, s*w); the N images lie on the channels, in a fixed order
    D      orthonormal DCT-II matrix; D X D^T acts on a W x W window, for each channel on its own
    mu     mean of DIV2K

Windows are shifted by W/2 in every second layer, before the transform. Attention then sees frequencies, for
which the shift mask of Swin has no meaning: there is none, and a shifted layer joins opposite borders.
In the ablation, `layer = "swin"` (its v4) leaves D out and has the mask; `layer = "mixer"` (its v3) mixes the
positions of a window by an MLP, without shift or D, at about the same number of parameters:

    layer(x)  = z + mlp(norm(z)),   z = x + token_mlp(norm(x))                                     (3)

Departs from the public code: D is orthonormal (theirs makes every token 16 to 32 times larger); no mask
(theirs depends on which coefficients of a map of region numbers happen to be equal); the inputs are centred
by mu (theirs are not, and its output is divided by 255).
The paper's text has neither the convolution and skip of a block nor the norms around the blocks; they are
the code's. `image_skip = "mean"` is ours: it adds the mean of the T_n to I_MT, and training starts there.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.errors import SrkdError, nearest
from srkd.networks.base import MeanShift, OneStepTail, conv3x3, reach, staged_tail_radius
from srkd.networks.swinir import (
    Body,
    ClassicalTail,
    DropPath,
    Mlp,
    Rstb,
    SwinIRConfig,
    SwinLayer,
    attention_reach,
    from_windows,
    initialise,
    to_windows,
)
from srkd.types import Facts

if TYPE_CHECKING:
    from collections.abc import Callable

CHOICES = {
    "layer": ("dct", "swin", "mixer"),
    "tail": ("one_step", "classical"),
    "image_skip": ("none", "mean"),
}


@dataclass(frozen=True)
class DctSwinConfig:
    teachers: int = 3
    scale: int = 4
    channels: int = 24
    depths: tuple[int, ...] = (2, 2, 2, 2)  # layers of each block
    heads: int = 6
    window: int = 8
    mlp_ratio: float = 2.0
    drop_path: float = 0.1  # of the last layer, growing linearly from 0; training only
    layer: str = "dct"  # or swin, mixer
    tail: str = "one_step"  # or classical: SwinIR's
    image_skip: str = "none"  # or mean

    def __post_init__(self) -> None:
        if self.teachers < 1:
            raise SrkdError(
                f"an aggregation network of {self.teachers} teachers was asked for; give at least 1."
            )
        if self.channels % self.heads:
            raise SrkdError(
                f"an aggregation network with {self.channels} channels cannot split them over {self.heads} "
                "attention heads; choose channels that are a multiple of heads."
            )
        for key, choices in CHOICES.items():
            if (value := getattr(self, key)) not in choices:
                raise SrkdError(
                    f"aggregation network with {key} = '{value}'; {nearest(str(value), choices)}"
                )


def dct_matrix(size: int) -> Tensor:
    """D[u, i] = a(u) cos(pi (2i+1) u / (2 size)), a(0) = sqrt(1/size), else sqrt(2/size); float32."""
    i = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / (2 * size) * i[:, None] * (2 * i + 1)) * (2 / size) ** 0.5
    matrix[0] /= 2**0.5
    return matrix.float()


def transform(windows: Tensor, matrix: Tensor) -> Tensor:
    """M X M^T of every W x W window X and channel: (n, W*W, C) -> same; the matrix M is (W, W).

    With D it is the two-dimensional DCT, with D^T its inverse.
    """
    n, tokens, c = windows.shape
    size = len(matrix)
    # Always in float32: in bf16 the error of the whole network's output grows by 3 to 15 %, and no time is
    # gained (a product of this size is short beside its cast).
    with torch.autocast(windows.device.type, enabled=False):
        x = windows.to(matrix.dtype).reshape(n, size, size * c)
        rows = (matrix @ x).view(n * size, size, c)
        return (matrix @ rows).view(n, tokens, c)


def mean_image(stack: Tensor) -> Tensor:
    """Mean of the images that lie on the channels: (B, 3N, H, W) -> (B, 3, H, W)."""
    return stack.unflatten(1, (-1, 3)).mean(1)


class DctLayer(SwinLayer):  # Eq. (1)
    """Swin layer whose attention sees the frequencies of each window, without a mask."""

    matrix: Tensor

    def __init__(self, config: SwinIRConfig, shifted: bool, drop_path: float) -> None:
        super().__init__(config, shifted, drop_path)
        # Not persistent: it follows from the window.
        self.register_buffer("matrix", dct_matrix(config.window), persistent=False)

    @property
    def needs_mask(self) -> bool:
        return False

    def attend(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        mixed = self.attn(transform(windows, self.matrix), None)
        return transform(mixed, self.matrix.T)


def token_hidden(channels: int, heads: int, window: int) -> int:
    """Hidden width of the token MLP at which a mixer layer has the parameters of a DCT layer.

    Attention has 4C^2 + 4C + heads (2W-1)^2 of them, the token MLP (2W^2 + 1) hidden + W^2.
    """
    attention = 4 * channels**2 + 4 * channels + heads * (2 * window - 1) ** 2
    return max(1, round((attention - window**2) / (2 * window**2 + 1)))


class MixerLayer(nn.Module):  # Eq. (3)
    """MLP-Mixer layer on the windows of (N, h, w, C)."""

    needs_mask = False

    def __init__(self, config: SwinIRConfig, drop_path: float) -> None:
        super().__init__()
        c = config
        self.window = c.window
        self.norm1 = nn.LayerNorm(c.channels)
        self.token_mlp = Mlp(c.window**2, token_hidden(c.channels, c.heads, c.window))
        self.norm2 = nn.LayerNorm(c.channels)
        self.mlp = Mlp(c.channels, int(c.channels * c.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: None) -> Tensor:
        _, h, w, _ = x.shape
        tokens = to_windows(self.norm1(x), self.window).transpose(1, 2)
        y = from_windows(self.token_mlp(tokens).transpose(1, 2), self.window, h, w)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class StackHead(nn.Module):
    """Pixel-unshuffle of the centred images and the first convolution: N images -> (B, C, h, w)."""

    def __init__(self, config: DctSwinConfig) -> None:
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(config.scale)
        self.conv = conv3x3(3 * config.teachers * config.scale**2, config.channels)

    def forward(self, centred: Tensor) -> Tensor:
        return self.conv(self.unshuffle(centred))


class DctSwin(nn.Module):  # Eq. (2)
    """SR images of N teachers on the channels, (B, 3N, s*h, s*w), to one: (B, 3, s*h, s*w), all about [0, 1]."""

    family = "dctswin"
    paper = "MTKD, ECCV 2024, arXiv 2404.09571"

    def __init__(self, config: DctSwinConfig) -> None:
        super().__init__()
        self.config = c = config
        self.scale = c.scale
        self.channels = c.channels
        self.shift = MeanShift(1.0)
        self.head = StackHead(c)
        make = _layer_maker(c)
        layers = sum(c.depths)
        rates = [c.drop_path * i / max(layers - 1, 1) for i in range(layers)]
        groups: list[nn.Module] = []
        for i, depth in enumerate(c.depths):
            first = sum(c.depths[:i])
            own = [make(j % 2 == 1, rates[first + j]) for j in range(depth)]
            groups.append(Rstb(own, c.channels, c.window, patch_norm=i == 0))
        self.groups = nn.ModuleList([*groups, Body(c.channels)])
        self.tail: nn.Module
        if c.tail == "classical":
            self.tail = ClassicalTail(c.channels, c.scale, self.shift)
            last = self.tail.last
        else:
            self.tail = OneStepTail(c.channels, c.scale, self.shift)
            last = self.tail.conv
        self.apply(initialise)
        if c.image_skip == "mean":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    @property
    def arguments(self) -> dict[str, Any]:
        """The plain values that rebuild this network (stored in model.json)."""
        return asdict(self.config)

    @property
    def facts(self) -> Facts:
        """Reach from the teachers' images to the output, in LR pixels.

        A shifted DCT layer has no mask, so the image's opposite borders reach each other.
        """
        c = self.config
        wraps = c.layer == "dct" and max(c.depths) > 1
        # Without shift every layer of a block stays in the same windows.
        depths = (1,) * len(c.depths) if c.layer == "mixer" else c.depths
        tail_px = 1 + staged_tail_radius(c.scale) if c.tail == "classical" else 1
        own = reach(1 + attention_reach(depths, c.window), tail_px)
        return Facts(
            scale=c.scale,
            receptive_field_px=None if wraps else own,
            exact_tiling=not wraps,
            size_multiple=c.window,
            minimum_px=c.window // 2 + 1,
        )

    def pad(self, stack: Tensor) -> Tensor:
        """Reflect-pad bottom and right to multiples of scale * window."""
        multiple = self.scale * self.config.window
        height, width = stack.shape[-2:]
        bottom, right = -height % multiple, -width % multiple
        if bottom >= height or right >= width:
            raise SrkdError(
                f"the teachers' images are {width}x{height}, but the aggregation network pads to windows by "
                f"mirroring, which needs LR images of {self.facts.minimum_px} px or more a side "
                f"(x{self.scale}); give larger images."
            )
        return F.pad(stack, (0, right, 0, bottom), mode="reflect")

    def forward(self, stack: Tensor) -> Tensor:
        """`stack` has its own height and width in the output; any from scale * `facts.minimum_px` on."""
        teachers = self.config.teachers
        if stack.ndim != 4 or stack.shape[1] != 3 * teachers:
            raise SrkdError(
                f"got images {tuple(stack.shape)}, but this network aggregates {teachers} teachers: "
                f"give their RGB images on the channels, (B, {3 * teachers}, H, W)."
            )
        height, width = stack.shape[-2:]
        centred = self.shift(self.pad(stack).unflatten(1, (teachers, 3))).flatten(1, 2)
        head = self.head(centred)
        feature = head
        for group in self.groups:
            feature = group(feature)
        sr = self.tail(feature, head)
        if self.config.image_skip == "mean":
            sr = sr + mean_image(centred)  # the tail adds mu back
        return sr[..., :height, :width]


def _layer_maker(config: DctSwinConfig) -> Callable[[bool, float], nn.Module]:
    """(shifted, drop_path) -> a layer of the kind that `config` names."""
    c = config
    sizes = SwinIRConfig(channels=c.channels, heads=c.heads, window=c.window, mlp_ratio=c.mlp_ratio)
    if c.layer == "mixer":
        return lambda _, drop_path: MixerLayer(sizes, drop_path)
    kind = DctLayer if c.layer == "dct" else SwinLayer
    return lambda shifted, drop_path: kind(sizes, shifted, drop_path)
