"""Sub-pixel upsampling (Shi et al., CVPR 2016, arXiv 1609.05158), as fast to train as memory can be copied.

    pixel_shuffle(conv(x)):  channel (c, i, j) of pixel (y, x)  ->  channel c of pixel (r y + i, r x + j)

In channels_last `pixel_shuffle` moves single values, its gradient is slower still, and on a GPU its result has lost the
layout; a last convolution to three channels at full size leaves most of a matrix unit idle. Together they were half
of a training step of RCAN-A on a CPU. So in that layout, up to the rounding of sums:

    enlarge   the convolution gives its outputs in the order (i, j, c), and runs of r * c values are moved
    finish    conv(pixel_shuffle(f)) is pixel_shuffle of one convolution of f, with the weights of `folded`: what is
              moved are three channels. More products, but with twelve outputs in place of three

In the plain layout, and in graphs that are exported or counted, everything is done as it is defined.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

# Factor of the shuffles that are folded into what follows: of 3 the weights would be mostly zeros.
FOLDED = 2


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
        if len(rest) == 1 and isinstance(rest[0], nn.Conv2d) and rest[0].kernel_size == (3, 3):
            return finish(layer, shuffle, rest[0], x)
        x = enlarge(layer, shuffle, x)
    return x


def by_runs(x: Tensor) -> bool:
    """Whether x is in the layout in which shuffling by definition is slow, and no graph is made of it."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    traced = torch.jit.is_tracing()  # type: ignore[reportPrivateImportUsage]
    return last and not traced and not torch.compiler.is_exporting()


def enlarge(conv: nn.Conv2d, shuffle: nn.PixelShuffle, x: Tensor) -> Tensor:
    """shuffle(conv(x)): (N, C, h, w) -> (N, C', r*h, r*w)."""
    if not by_runs(x):
        return shuffle(conv(x))
    r = shuffle.upscale_factor
    assert conv.bias is not None
    y = F.conv2d(x, _by_place(conv.weight, r), _by_place(conv.bias, r), padding=conv.padding)  # type: ignore[arg-type]
    n, _, h, w = y.shape
    runs = y.permute(0, 2, 3, 1).reshape(n, h, w, r, r, -1).transpose(2, 3)
    return runs.reshape(n, r * h, r * w, -1).permute(0, 3, 1, 2)


def _by_place(rows: Tensor, r: int) -> Tensor:
    """Rows (c, i, j), ... of a weight or bias in the order (i, j, c)."""
    return rows.unflatten(0, (-1, r * r)).transpose(0, 1).flatten(0, 1)


def finish(conv: nn.Conv2d, shuffle: nn.PixelShuffle, last: nn.Conv2d, x: Tensor) -> Tensor:
    """last(shuffle(conv(x))): (N, C, h, w) -> (N, C', r*h, r*w); `last` is 3x3 with padding 1."""
    r = shuffle.upscale_factor
    if r != FOLDED or not by_runs(x):
        return last(enlarge(conv, shuffle, x))
    assert last.bias is not None
    bias = last.bias.repeat_interleave(r * r)
    return shuffle(F.conv2d(conv(x), folded(last.weight, r), bias, padding=1))


def folded(weight: Tensor, r: int) -> Tensor:
    """Weights (O, C, 3, 3) at full size -> (O r^2, C r^2, 3, 3) before the shuffle.

    Row I of an r x r square meets, q squares further, row i at the distance d = r q + i - I; only |d| <= 1 have weights.
    """
    square, step = torch.arange(r), torch.arange(-1, 2)
    distance = r * step[None, None, :] + square[None, :, None] - square[:, None, None]  # (I, i, q)
    meets = (distance[..., None] == step).to(weight)  # (I, i, q, d)
    whole = torch.einsum("ocde,IiQd,JjPe->oIJcijQP", weight, meets, meets)
    return whole.flatten(0, 2).flatten(1, 3)
