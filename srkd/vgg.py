"""VGG19 up to relu5_1, as a measure of how alike two images are. Its weights come from the user's file.

Paper: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR
2015, arXiv 1409.1556. Weights: a state dict with torchvision's names, `features.N.weight` and
`features.N.bias`; what lies beyond conv5_1 may be there and is not read.

    block(x) = relu(conv(...relu(conv(x))))       2, 2, 4, 4 convolutions 3x3, then max pooling 2x2
    phi_i(x) = first ReLU of block i, i = 1..5    relu1_1, relu2_1, relu3_1, relu4_1, relu5_1
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.checkpoint import read_tensors
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from pathlib import Path

# Output channels of the convolutions of each block; the fifth is read up to its first.
BLOCKS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,))
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Four poolings must leave a pixel.
MINIMUM_PX = 2 ** (len(BLOCKS) - 1)
# float32 values per pixel of the image: of the five maps, and of all that a backward pass needs (ReLUs,
# pooled maps, their indices of 8 bytes).
MAP_VALUES = sum(widths[0] / 4**i for i, widths in enumerate(BLOCKS))
GRAPH_VALUES = sum(sum(widths) / 4**i for i, widths in enumerate(BLOCKS)) + sum(
    3 * widths[-1] / 4**i for i, widths in enumerate(BLOCKS[:-1], 1)
)


def convolutions() -> list[list[tuple[int, int, int]]]:
    """Per block, of every convolution: its number in torchvision's `features`, channels in and out."""
    blocks, number, c_in = [], 0, 3
    for widths in BLOCKS:
        block = []
        for c_out in widths:
            block.append((number, c_in, c_out))
            number, c_in = number + 2, c_out  # the ReLU is counted too
        blocks.append(block)
        number += 1  # and the pooling
    return blocks


class Vgg19(nn.Module):
    """(N, 3, H, W) in [0, 1] -> the five maps phi_i, (N, C_i, H / 2^(i-1), W / 2^(i-1)).

    The weights are buffers outside the state: they move with the module, but no optimiser trains them and
    no checkpoint repeats them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, state: dict[str, Tensor]) -> None:
        """`state` has the names and shapes that `load_vgg` checks."""
        super().__init__()
        self.blocks = [[number for number, _, _ in block] for block in convolutions()]
        for number in chain(*self.blocks):
            for kind in ("weight", "bias"):
                tensor = state[f"features.{number}.{kind}"].float()
                self.register_buffer(f"{kind}{number}", tensor, persistent=False)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        # float32 even where the networks run in bf16: what is compared are small differences of nearly
        # equal maps, and bf16 would round each map by up to its 256th part.
        with torch.autocast(image.device.type, enabled=False):
            x = (image.float() - self.mean) / self.std
            maps = []
            for i, numbers in enumerate(self.blocks):
                x = F.max_pool2d(x, 2) if i else x
                for number in numbers:
                    x = F.relu(self._convolve(x, number))
                    if number == numbers[0]:
                        maps.append(x)
        return maps

    def _convolve(self, x: Tensor, number: int) -> Tensor:
        weight, bias = self.get_buffer(f"weight{number}"), self.get_buffer(f"bias{number}")
        return F.conv2d(x, weight, bias, padding=1)


def load_vgg(path: Path) -> Vgg19:
    """VGG19 from a .safetensors or .pth file; of a pickle only the tensors are read."""
    state = read_tensors(path)
    for number, c_in, c_out in chain(*convolutions()):
        name = f"features.{number}"
        for key, shape in ((f"{name}.weight", (c_out, c_in, 3, 3)), (f"{name}.bias", (c_out,))):
            if key not in state or tuple(state[key].shape) != shape:
                got = f"has it as {tuple(state[key].shape)}" if key in state else "lacks it"
                raise SrkdError(
                    f"VGG19 needs '{key}' of shape {shape}, but {path} {got}; give the state dict of an "
                    "ImageNet VGG19 (without batch normalisation) in torchvision's layout."
                )
    return Vgg19(state)
