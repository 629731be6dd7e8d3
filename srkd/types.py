"""The records that networks, methods and the training loop share. Plain data, nothing of ours imported.

Between loader and writer an image is a float32 RGB tensor (N, 3, H, W) in [0, 1].
"""

from __future__ import annotations

import hashlib
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
class Limits:
    """Sizes (h, w) in LR pixels that can be run, from `smallest` to `largest` (None: no end).

    A network has none of its own beyond `Facts.minimum_px`; an engine built for a range of sizes has.
    """

    smallest: tuple[int, int] = (1, 1)
    largest: tuple[int, int] | None = None


ANY_SIZE = Limits()


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
class Batch:
    """The images of one training step, before any network has seen them.

    lr, hr      (N, 3, h, w) and (N, 3, scale*h, scale*w) in [0, 1]
    iteration   0-based number of this step; total is the planned number of steps
    part        which micro-batch of the step this is, 0-based
    seed        of the run: methods draw random numbers from `generator()` alone, so that a resumed
                run draws the same ones
    """

    lr: Tensor
    hr: Tensor
    iteration: int = 0
    total: int = 1
    part: int = 0
    seed: int = 0

    def generator(
        self, stream: str, *, whole_step: bool = False, device: torch.device | str = "cpu"
    ) -> torch.Generator:
        """Random numbers that depend on (seed, iteration, part, stream) alone.

        `whole_step` leaves the part out: one draw for all micro-batches. A draw whose values Python
        needs must be on the CPU, or the step would wait for the device.
        """
        import torch

        part = -1 if whole_step else self.part
        key = f"{self.seed} {self.iteration} {part} {stream}".encode()
        mixed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")
        return torch.Generator(device).manual_seed(mixed)


@dataclass(frozen=True)
class ViewInput:
    """Images besides the batch that a method wants both networks to see.

    student, teacher    (M, 3, h'', w'') in about [0, 1]; the student's may be augmented (DUKD)
    """

    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class View:
    """Passes over a `ViewInput`: the student's with graph, the teachers' without. No taps."""

    student: Pass
    teachers: tuple[Pass, ...]

    @property
    def teacher(self) -> Pass:
        (only,) = self.teachers
        return only


@dataclass(frozen=True)
class Step:
    """What a method sees of one training step.

    batch       its images and its random numbers
    student     pass of the student over `lr`, with graph
    teachers    passes of the frozen teachers over `lr`, in the order given, without graph
    views       passes over the images that `Method.views` asked for, by name
    """

    batch: Batch
    student: Pass
    teachers: tuple[Pass, ...] = ()
    views: Mapping[str, View] = field(default_factory=dict)

    @property
    def lr(self) -> Tensor:
        return self.batch.lr

    @property
    def hr(self) -> Tensor:
        return self.batch.hr

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the LR images."""
        return (self.lr.shape[-2], self.lr.shape[-1])

    @property
    def teacher(self) -> Pass:
        """The only teacher, for methods that take exactly one."""
        (only,) = self.teachers
        return only


@dataclass(frozen=True)
class Setting:
    """What a training will ask of a method, known before it starts.

    patch_px    side of the LR crops; batch is the number of crops that are run at once
    iterations  planned number of steps
    memory      bytes that are free on the device
    """

    patch_px: int
    batch: int
    iterations: int
    memory: int
