"""Sub-pixel upsampling (Shi et al., CVPR 2016, arXiv 1609.05158), as fast to train as memory can be copied.

    pixel_shuffle(conv(x)):  channel (c, i, j) of pixel (y, x)  ->  channel c of pixel (r y + i, r x + j)

In channels_last `pixel_shuffle` moves single values, its gradient is slower still, and on a GPU its result has lost the
layout; a last convolution to three channels at full size leaves most of a matrix unit idle. Together they were half
of a training step of RCAN-A on a CPU. So in that layout, up to the rounding of sums:

    enlarge   the convolution gives its outputs in the order (i, j, c), and runs of r * c values are moved
    finish    conv(pixel_shuffle(f)) is pixel_shuffle of one convolution of f, with the weights of `folded`: what is
              moved are three channels. More products, but with twelve outputs in place of three
    collapse  where nothing but convolutions and shuffles is left, all of it is one 5x5 convolution with 3 * scale^2
              outputs: a tenth of the products of EDSR-baseline's tail at x4. Only at the border, where every stage
              begins with zeros of its own, the stages are done one by one

In the plain layout, and where a graph is traced or counted, everything is done as it is defined; exports collapse a
tail by themselves (deploy/collapse.py).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.networks.precision import full_precision

if TYPE_CHECKING:
    from collections.abc import Sequence

# Factor of the shuffles that are folded into what follows: of 3 the weights would be mostly zeros.
FOLDED = 2
# Collapsing pays from x3 on, on images of at least this side and from this many pixels for each input channel: making
# the weights and doing four borders of three pixels costs something too.
LEAST_SCALE, LEAST_SIDE, PIXELS_PER_CHANNEL = 3, 40, 50


class SubPixel(nn.Sequential):
    """Convolutions, pixel shuffles and what else there may be, one after the other."""

    def forward(self, input: Tensor) -> Tensor:
        return in_turn(list(self), input)


def in_turn(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The layers one after the other; a convolution before a shuffle and a last one behind it run with it."""
    rest = list(layers)
    while rest:
        layer = rest.pop(0)
        before_shuffle = (
            isinstance(layer, nn.Conv2d) and rest and isinstance(rest[0], nn.PixelShuffle)
        )
        # By definition one layer at a time, so that no input outlives its use.
        if not (before_shuffle and by_runs(x)):
            x = layer(x)
            continue
        shuffle = rest.pop(0)
        assert isinstance(layer, nn.Conv2d) and isinstance(shuffle, nn.PixelShuffle)
        stages = linear_stages([layer, shuffle, *rest])
        if stages is not None and pays(stages[0], x):
            return collapse(*stages, x)
        if len(rest) == 1 and plain_3x3(last := rest[0]):
            assert isinstance(last, nn.Conv2d)
            return finish(layer, shuffle, last, x)
        x = enlarge(layer, shuffle, x)
    return x


def by_runs(x: Tensor) -> bool:
    """Whether x is in the layout in which shuffling by definition is slow, and no graph is made of it."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    traced = torch.jit.is_tracing()  # type: ignore[reportPrivateImportUsage]
    return last and not traced and not torch.compiler.is_exporting()


class _Weights(NamedTuple):
    """Of a convolution before a shuffle by r: (C r^2, C_in, k, k) and (C r^2)."""

    weight: Tensor
    bias: Tensor
    r: int

    @classmethod
    def of(cls, conv: nn.Conv2d, shuffle: nn.PixelShuffle | None = None) -> _Weights:
        assert conv.bias is not None
        return cls(conv.weight, conv.bias, 1 if shuffle is None else shuffle.upscale_factor)

    def turned(self) -> _Weights:
        """For the image with rows and columns exchanged."""
        places = self.weight.unflatten(0, (-1, self.r, self.r)).transpose(1, 2)
        bias = self.bias.unflatten(0, (-1, self.r, self.r)).transpose(1, 2)
        return _Weights(places.flatten(0, 2).transpose(2, 3), bias.flatten(), self.r)


def enlarge(conv: nn.Conv2d, shuffle: nn.PixelShuffle, x: Tensor) -> Tensor:
    """shuffle(conv(x)): (N, C, h, w) -> (N, C', r*h, r*w)."""
    return _enlarged(_Weights.of(conv, shuffle), x) if by_runs(x) else shuffle(conv(x))


def _enlarged(stage: _Weights, x: Tensor) -> Tensor:
    r, padding = stage.r, stage.weight.shape[-1] // 2
    y = F.conv2d(x, _by_place(stage.weight, r), _by_place(stage.bias, r), padding=padding)
    n, _, h, w = y.shape
    runs = y.permute(0, 2, 3, 1).reshape(n, h, w, r, r, -1).transpose(2, 3)
    return runs.reshape(n, r * h, r * w, -1).permute(0, 3, 1, 2)


def _by_place(rows: Tensor, r: int) -> Tensor:
    """Rows (c, i, j), ... of a weight or bias in the order (i, j, c)."""
    return rows.unflatten(0, (-1, r * r)).transpose(0, 1).flatten(0, 1)


def finish(conv: nn.Conv2d, shuffle: nn.PixelShuffle, last: nn.Conv2d, x: Tensor) -> Tensor:
    """last(shuffle(conv(x))): (N, C, h, w) -> (N, C', r*h, r*w); `last` is 3x3 with padding 1."""
    if shuffle.upscale_factor != FOLDED or not by_runs(x):
        return last(enlarge(conv, shuffle, x))
    return _finished(_Weights.of(conv, shuffle), _Weights.of(last), x)


def _finished(stage: _Weights, last: _Weights, x: Tensor) -> Tensor:
    r, padding = stage.r, stage.weight.shape[-1] // 2
    before = F.conv2d(x, stage.weight, stage.bias, padding=padding)
    bias = last.bias.repeat_interleave(r * r)
    return F.pixel_shuffle(F.conv2d(before, folded(last.weight, r), bias, padding=1), r)


def folded(weight: Tensor, r: int) -> Tensor:
    """Weights (O, C, k, k) at full size -> (O r^2, C r^2, k', k') before the shuffle; k' is 3 for k of 3 and 5.

    Row I of an r x r square meets, q squares further, row i at the distance d = r q + i - I; only |d| <= k // 2 have weights.
    """
    reach = weight.shape[-1] // 2
    far = (reach + r - 1) // r
    square = torch.arange(r, device=weight.device)
    step, place = (torch.arange(-n, n + 1, device=weight.device) for n in (far, reach))
    distance = r * step[None, None, :] + square[None, :, None] - square[:, None, None]  # (I, i, q)
    meets = (distance[..., None] == place).to(weight)  # (I, i, q, d)
    whole = torch.einsum("ocde,IiQd,JjPe->oIJcijQP", weight, meets, meets)
    return whole.flatten(0, 2).flatten(1, 3)


# --- a whole tail as one convolution --------------------------------------------------------------

Stage = tuple[nn.Conv2d, nn.PixelShuffle]


def plain_3x3(layer: nn.Module) -> bool:
    """Whether it is the convolution that weights are folded of: 3x3 with bias, on zeros beyond the image."""
    return (
        isinstance(layer, nn.Conv2d)
        and (layer.kernel_size, layer.padding, layer.stride) == ((3, 3), (1, 1), (1, 1))
        and (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")
        and layer.bias is not None
    )


def linear_stages(layers: Sequence[nn.Module]) -> tuple[list[Stage], nn.Conv2d] | None:
    """The pairs (3x3 convolution, shuffle) and the last 3x3 convolution, if the layers are just that."""
    *pairs, last = layers
    convs, shuffles = pairs[::2], pairs[1::2]
    if len(convs) != len(shuffles) or not all(isinstance(s, nn.PixelShuffle) for s in shuffles):
        return None
    if not all(plain_3x3(layer) for layer in (*convs, last)):
        return None
    return list(zip(convs, shuffles, strict=True)), last  # type: ignore[return-value]


def pays(stages: list[Stage], x: Tensor) -> bool:
    """Whether `collapse` saves time on this image."""
    n, c, h, w = x.shape
    large = min(h, w) >= LEAST_SIDE and n * h * w >= PIXELS_PER_CHANNEL * c
    return large and scale_of(stages) >= LEAST_SCALE


def scale_of(stages: list[Stage]) -> int:
    return math.prod(shuffle.upscale_factor for _, shuffle in stages)


def collapse(stages: list[Stage], last: nn.Conv2d, x: Tensor) -> Tensor:
    """last(shuffle(conv(... x))): (N, C, h, w) -> (N, C', s h, s w), up to the rounding of sums.

    An output pixel sees 5x5 pixels of x. In the first and last row and column of x it also sees where every stage
    begins anew with zeros beyond the image, so these come of the stages themselves.
    """
    s = scale_of(stages)
    weight, bias = collapsed(stages, last)
    # With one row and column of zeros in place of two, what comes out is the image without its outermost pixels.
    inner = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=1)
    own, end = [_Weights.of(*stage) for stage in stages], _Weights.of(last)
    top, bottom = _borders(own, end, x, s)
    # Columns as rows: an image of few columns is slow to convolve.
    turned = _borders([w.turned() for w in own], end.turned(), x.transpose(2, 3), s)
    left, right = (side.transpose(2, 3)[:, :, s:-s] for side in turned)
    inner = F.pixel_shuffle(inner, s)
    # Parts of one layout keep it when they are joined.
    left, right = (side.contiguous(memory_format=torch.channels_last) for side in (left, right))
    return torch.cat([top, torch.cat([left, inner, right], 3), bottom], 2)


def collapsed(stages: list[Stage], last: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weights (C' s^2, C, 5, 5) and bias (C' s^2) of the one convolution before a shuffle by s.

    In the weights' own precision, float32 at least: they are sums of many products.
    """
    assert last.bias is not None
    with full_precision(last.weight) as weight:
        bias = last.bias.to(weight)
        for conv, shuffle in reversed(stages):
            assert conv.bias is not None
            r = shuffle.upscale_factor
            weight, bias = folded(weight, r), bias.repeat_interleave(r * r)
            bias = bias + torch.einsum("ocde,c->o", weight, conv.bias.to(weight))
            # First `conv`, then `weight`: the weights of both at once are their convolution.
            turned = conv.weight.to(weight).transpose(0, 1).flip(2, 3)
            weight = F.conv2d(weight, turned, padding=2)
        return _one_shuffle(weight, stages), _one_shuffle(bias, stages)


def _one_shuffle(rows: Tensor, stages: list[Stage]) -> Tensor:
    """Rows for the shuffles of all stages, (c, I2, J2, I1, J1), in the order for one: (c, I1, I2, J1, J2)."""
    factors = [shuffle.upscale_factor for _, shuffle in reversed(stages) for _ in range(2)]
    whole = rows.unflatten(0, (-1, *factors))
    rows_first = [*range(len(factors) - 1, 0, -2), *range(len(factors), 1, -2)]
    order = [0, *rows_first, *range(len(factors) + 1, whole.dim())]
    return whole.permute(order).flatten(0, len(factors))


def _borders(
    stages: Sequence[_Weights], last: _Weights, x: Tensor, s: int
) -> tuple[Tensor, Tensor]:
    """The s first and the s last rows of the enlarged image, both as one batch: (N, C', s, s w) each.

    Of every stage just the rows that the next one reads, and one more, behind which it meets zeros instead of the image.
    """

    def outermost(part: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        begin, end = part.chunk(2)
        return begin[:, :, :rows], end[:, :, -rows:]

    begin, _, end = x.split([3, x.shape[2] - 6, 3], 2)
    scale, both = 1, (begin, end)
    for number, stage in enumerate(stages, 1):
        part = torch.cat(both).contiguous(memory_format=torch.channels_last)
        scale *= stage.r
        if number < len(stages):
            both = outermost(_enlarged(stage, part), scale + 2)
        else:
            both = outermost(_finished(stage, last, part), s)
    return both
