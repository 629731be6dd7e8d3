"""A linear tail as convolutions of its input: several times fewer products and no feature map above LR size.

The upsampling of EDSR, RCAN, SwinIR, RDN, HAN and SAN (Shi et al., CVPR 2016) is a chain of 3x3 convolutions and pixel
shuffles with nothing else in it, so every output pixel is a weighted sum of 5x5 pixels of the chain's input. The
sums of the outermost LR rows and columns differ, because every convolution of the chain meets zeros beyond the image. Nine sets
of weights, for inside, four edges and four corners, therefore give what the chain gives, up to the rounding of float32.

srkd/networks/subpixel.py does the same in training, where the weights change in every step.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.networks.subpixel import SubPixel, linear_stages, scale_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from srkd.loaded import LoadedModel
    from srkd.types import Facts

# From x3 on: at x2 the chain is short, and little or nothing is saved.
LEAST_SCALE = 3
# First and last row must be two, with one between them.
LEAST_PX = 3
PLACES = ("top", "middle", "bottom"), ("left", "middle", "right")
# In an image of 5x5, where a row lies, which rows it sees, and how many rows of zeros its convolution needs: the
# middle one sees two beyond the row before the last.
ROWS = ((0, slice(0, 3), 0), (2, slice(0, 5), 1), (4, slice(2, 5), 0))


class CollapsedTail(nn.Module):
    """(N, C, h, w) -> (N, C', s h, s w), h and w at least `LEAST_PX`: what the layers give one after the other."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        found = linear_stages(layers)
        assert found is not None
        stages, last = found
        s, channels = scale_of(stages), stages[0][0].in_channels
        chain = nn.Sequential(*copy.deepcopy(layers)).double()
        with torch.no_grad():
            bias = F.pixel_unshuffle(chain(torch.zeros(1, channels, 5, 5).double()), s)[0]
        for layer in chain:
            if isinstance(layer, nn.Conv2d):
                layer.bias = None
        outputs = last.out_channels * s**2
        for row, (y, rows, above) in zip(PLACES[0], ROWS, strict=True):
            for column, (x, columns, beside) in zip(PLACES[1], ROWS, strict=True):
                # The gradient of one output of a linear map is the weights that it has for the input.
                image = torch.zeros(outputs, channels, 5, 5).double().requires_grad_()
                seen = F.pixel_unshuffle(chain(image), s)[:, :, y, x].diagonal().sum()
                weight = torch.autograd.grad(seen, image)[0][:, :, rows, columns]
                size = (weight.shape[2], weight.shape[3])
                conv = nn.Conv2d(channels, outputs, size, padding=(above, beside))
                conv.load_state_dict({"weight": weight, "bias": bias[:, y, x]})
                self.add_module(f"{row}_{column}", conv)
        self.shuffle = nn.PixelShuffle(s)

    def forward(self, feature: Tensor) -> Tensor:
        bands = feature[:, :, :3], feature, feature[:, :, -3:]
        parts = [
            torch.cat(
                [
                    self.get_submodule(f"{row}_left")(band[..., :3]),
                    self.get_submodule(f"{row}_middle")(band),
                    self.get_submodule(f"{row}_right")(band[..., -3:]),
                ],
                3,
            )
            for row, band in zip(PLACES[0], bands, strict=True)
        ]
        return self.shuffle(torch.cat(parts, 2))


def export_facts(model: LoadedModel, *, staged: bool) -> Facts:
    """What holds of the graph: a collapsed tail takes `LEAST_PX` pixels or more."""
    if staged or next(_tails(model.network), None) is None:
        return model.facts
    return replace(model.facts, minimum_px=max(model.facts.minimum_px, LEAST_PX))


def collapse_tail(network: nn.Module) -> nn.Module | None:
    """A copy of the network with its upsampling collapsed; None where that is no linear chain from `LEAST_SCALE` on."""
    if next(_tails(network), None) is None:
        return None
    changed = copy.deepcopy(network)
    for module, layers in _tails(changed):
        whole = SubPixel(OrderedDict(collapsed=CollapsedTail(layers)))
        module.upsample = whole.to(next(layers[0].parameters()).device)
        if "last" in dict(module.named_children()):
            module.last = nn.Identity()
    return changed.train(network.training)


def _tails(network: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Modules with `upsample`, and `last` behind it or inside it; and the layers of both."""
    for module in list(network.modules()):
        children = dict(module.named_children())
        if not isinstance(children.get("upsample"), SubPixel):
            continue
        layers = [*children["upsample"].children(), *filter(None, [children.get("last")])]
        found = linear_stages(layers) if len(layers) > 1 else None
        if found is not None and scale_of(found[0]) >= LEAST_SCALE:
            yield module, layers
