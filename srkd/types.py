"""The records that networks, methods and the training loop share. Plain data, nothing of ours imported.

Between loader and writer an image is a float32 RGB tensor (N, 3, H, W) in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor, nn

OutputRange = Literal["unclamped", "clamped"]


@dataclass(frozen=True)
class Facts:
    """What tiling, export and upscaling must know about a network, all in LR pixels.

    `receptive_field_px` is the largest distance at which an input pixel can change an output pixel
    (rounded up), None when the network looks at the whole image (global pooling).
    `size_multiple` is the grid that tiles must start on (1 for convolutions, the window for window
    attention); any image size is accepted from `minimum_px` on, because networks pad themselves.
    `exact_tiling` says that tiles with a halo of `receptive_field_px` reproduce the whole image.
    """

    scale: int
    receptive_field_px: int | None
    exact_tiling: bool
    size_multiple: int = 1
    minimum_px: int = 1
    output_range: OutputRange = "unclamped"


@dataclass(frozen=True)
class Pass:
    """One forward pass of one network.

    network  what made it; a method may run it again on other inputs (DUKD) or from a tap (`rest`)
    sr       (N, 3, scale*h, scale*w) in about [0, 1], not clamped
    head     (N, C, h', w') head feature, which the long skip of the rest of the network needs
    taps     name -> (N, C, h', w') feature after that group; h', w' are h, w padded to the size multiple
    """

    network: nn.Module
    sr: Tensor
    head: Tensor | None = None
    taps: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What a method sees of one training step.

    lr, hr      (N, 3, h, w) and (N, 3, scale*h, scale*w) in [0, 1]
    student     pass of the student over `lr`, with graph
    teachers    passes of the frozen teachers over `lr`, in the order given, without graph
    iteration   0-based number of this step; total is the planned number of steps
    seed        of the run: methods draw random numbers from `generator()` alone, so that a resumed
                run draws the same ones
    """

    lr: Tensor
    hr: Tensor
    student: Pass
    teachers: tuple[Pass, ...] = ()
    iteration: int = 0
    total: int = 1
    seed: int = 0

    @property
    def teacher(self) -> Pass:
        """The only teacher, for methods that take exactly one."""
        (only,) = self.teachers
        return only

    def generator(self, stream: int = 0) -> torch.Generator:
        """CPU random numbers that depend on (seed, iteration, stream) alone."""
        import torch

        mixed = (self.seed * 1_000_003 + self.iteration) * 1_009 + stream
        return torch.Generator().manual_seed(mixed % (2**63))
