"""Sub-pixel upsampling (Shi et al., CVPR 2016, arXiv 1609.05158), as fast to train as memory can be copied.

    pixel_shuffle(conv(x)):  channel (c, i, j) of pixel (y, x)  ->  channel c of pixel (r y + i, r x + j)

In channels_last `pixel_shuffle` moves single values, and its gradient is slower still: together a quarter of a
training step of RCAN-A on a CPU, and on a GPU its result has lost the layout. With the outputs of the convolution in
the order (i, j, c) it moves runs of r * c values. Only the order of the convolution's rows differs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SubPixel(nn.Sequential):
    """A sequence in which every convolution that a `PixelShuffle` follows runs together with it."""

    def forward(self, input: Tensor) -> Tensor:
        x, layers = input, list(self)
        del input  # each layer's input is freed before the next one runs
        shuffled = False
        for layer, after in zip(layers, [*layers[1:], None], strict=True):
            if shuffled:  # together with the convolution before it
                shuffled = False
            elif isinstance(after, nn.PixelShuffle) and _in_runs(x):
                assert isinstance(layer, nn.Conv2d)
                x, shuffled = enlarge(layer, after, x), True
            else:
                x = layer(x)
        return x


def enlarge(conv: nn.Conv2d, shuffle: nn.PixelShuffle, x: Tensor) -> Tensor:
    """shuffle(conv(x)): (N, C, h, w) -> (N, C', r*h, r*w), up to the rounding of the convolution.

    In the plain layout, and in exported graphs, it is exactly that.
    """
    if not _in_runs(x):
        return shuffle(conv(x))
    assert conv.bias is not None
    r = shuffle.upscale_factor
    y = F.conv2d(x, _by_place(conv.weight, r), _by_place(conv.bias, r), padding=conv.padding)  # type: ignore[arg-type]
    n, _, h, w = y.shape
    runs = y.permute(0, 2, 3, 1).reshape(n, h, w, r, r, -1).transpose(2, 3)
    return runs.reshape(n, r * h, r * w, -1).permute(0, 3, 1, 2)


def _in_runs(x: Tensor) -> bool:
    plain = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    return not (plain or torch.compiler.is_exporting())


def _by_place(rows: Tensor, r: int) -> Tensor:
    """Rows (c, i, j), ... of a weight or bias in the order (i, j, c)."""
    return rows.unflatten(0, (-1, r * r)).transpose(0, 1).flatten(0, 1)
