"""DUKD: the student also copies the teacher on images for which no ground truth exists.

Paper: Zhang, Li, Li, Hu, Chen, et al., "Data Upcycling Knowledge Distillation for Image Super-Resolution",
arXiv 2309.14162 (version 1).      Checked against: yun224/DUKD.

    L = |S(x) - y|_1 + |S(x) - T(x)|_1                              pixel, logits     (1)
      + |A^-1(S(A(y_zi))) - T(y_zi)|_1                              zoom_in           (2)
      + |A^-1(S(A(x_zo))) - T(x_zo)|_1                              zoom_out          (3)

    x, y   step.lr, step.hr             (N, 3, h, w), (N, 3, s*h, s*w)
    y_zi   random crop of y, LR-sized   (N, 3, h, w): an input like an LR image, NOT made smaller
    x_zo   x made smaller by s          (N, 3, h/s, w/s): MATLAB's bicubic, double precision, not rounded
    A      per sample: colour inversion 1 - v, flip of the height, flip of the width, transpose, each with
           probability 0.3, in this order; A^-1 undoes them in reverse order on the output
    weights 1 each (the text adds the terms and prints none)

No zoom-out with window networks: the zoomed-out patch is too small for their windows (the paper's SwinIR).

`preset = "released"` takes the weights and switches of the public configuration files, without their two
defects: flips undone in the order in which they were applied, and a second optimiser step on top of the
first gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from srkd.data.degradation import crop_to_multiple, downscale
from srkd.errors import SrkdError
from srkd.methods.base import Method, choice, l1, network_scale, response_terms
from srkd.types import Facts, ViewInput

if TYPE_CHECKING:
    from torch import Tensor, nn

    from srkd.types import Batch, Setting, Step

RELEASED = ("edsr", "rcan", "swinir")  # families that the public configuration files cover
PAPER_ZOOMED_PX = 12  # LR patch 48 at x4
OPERATIONS = 4  # inversion, flip of the height, flip of the width, transpose


@dataclass(frozen=True)
class DukdConfig:
    preset: str = choice("paper", "released")
    pixel_weight: float = 1.0
    logits_weight: float = 1.0
    zoom_in_weight: float = 1.0
    zoom_out_weight: float = 1.0
    zoom_out: str = choice("auto", "on", "off")  # auto: off when either network has windows
    zoom_out_pixel_weight: float = 0.0  # |S(x_zo) - x|_1 of the released files
    augment: str = choice("both", "zoom_in", "none")  # which inputs A acts on
    probability: float = 0.3  # of each operation of A
    crop: str = choice("random", "tile")  # tile: one of the s x s LR-sized tiles of y
    crops: int = 1  # zoom-in crops of each image

    @staticmethod
    def preset_values(preset: str, family: str, scale: int) -> dict[str, Any]:
        """What the public configuration files set, by family of the student and scale."""
        if preset != "released":
            return {}
        if family not in RELEASED:
            raise SrkdError(
                f"method.dukd.preset = 'released' is known for students of {', '.join(RELEASED)}, not of "
                f"'{family}'; leave the preset out and set the options by hand."
            )
        like_edsr = family != "rcan"
        pixel = 5.0 if like_edsr else {3: 2.0}.get(scale, 1.0)
        zoom_out = family == "edsr" or (family == "rcan" and scale == 3)
        return {
            "pixel_weight": pixel,
            "zoom_out": "on" if zoom_out else "off",
            "zoom_out_pixel_weight": pixel if zoom_out else 0.0,
            "augment": "zoom_in",
            "probability": 0.3 if like_edsr or scale == 3 else 0.0,
            "crop": "tile",
            "crops": 2 if family == "edsr" and scale == 2 else 1,
        }


def augment(image: Tensor, operations: Tensor) -> Tensor:
    """A: (N, 3, p, p) with (N, 4) booleans, see OPERATIONS; the image is in [0, 1]."""
    i, h, v, t = _columns(operations)
    image = torch.where(i, 1 - image, image)
    image = torch.where(h, image.flip(2), image)
    image = torch.where(v, image.flip(3), image)
    return torch.where(t, image.mT, image)


def undo(image: Tensor, operations: Tensor) -> Tensor:
    """A^-1: the last operation first. Every one is its own inverse, their product is not."""
    i, h, v, t = _columns(operations)
    image = torch.where(t, image.mT, image)
    image = torch.where(v, image.flip(3), image)
    image = torch.where(h, image.flip(2), image)
    return torch.where(i, 1 - image, image)


def _columns(operations: Tensor) -> tuple[Tensor, ...]:
    return operations[:, :, None, None, None].unbind(1)


def crop_corners(
    count: int, size: tuple[int, int], scale: int, how: str, random: torch.Generator
) -> list[tuple[int, int]]:
    """Top left corners of LR-sized crops of HR images; `size` is (h, w) of the LR image."""
    corners = []
    for _ in range(count):
        if how == "tile":
            row, column = torch.randint(scale, (2,), generator=random).tolist()
            corners.append((row * size[0], column * size[1]))
        else:
            top = torch.randint((scale - 1) * size[0] + 1, (), generator=random)
            left = torch.randint((scale - 1) * size[1] + 1, (), generator=random)
            corners.append((int(top), int(left)))
    return corners


class Dukd(Method):
    Config = DukdConfig

    def __init__(
        self, config: DukdConfig, student: nn.Module, teachers: tuple[nn.Module, ...]
    ) -> None:
        super().__init__(config, student, teachers)
        if config.probability > 1:
            raise SrkdError(
                f"method.dukd.probability = {config.probability}, but a probability lies in 0..1."
            )
        if config.crops < 1:
            raise SrkdError(
                f"method.dukd.crops = {config.crops}, but at least one crop is needed; "
                "to leave zoom-in out set method.dukd.zoom_in_weight=0."
            )
        self.windowed = any(has_windows(n) for n in (student, *teachers))
        self.zooms_out = config.zoom_out == "on" or (
            config.zoom_out == "auto" and not self.windowed
        )
        if not (config.zoom_out_weight or config.zoom_out_pixel_weight):
            self.zooms_out = False
        self.scale = network_scale(student)
        # The smallest LR crop that every network of ours still takes when it is made smaller.
        self.zoom_out_px = max(smallest_zoom(n) for n in (student, *teachers))

    def check(self, setting: Setting) -> tuple[str, ...]:
        c, patch = self.config, setting.patch_px
        # Views of both networks and their outputs; what lies between is larger still.
        images = 2 * (1 + self.scale**2) * 3 * 4 * patch**2 * setting.batch * c.crops
        if images > setting.memory:
            raise SrkdError(
                f"method.dukd.crops = {c.crops} makes {c.crops * setting.batch} more images a step, which do not "
                "fit in memory; lower method.dukd.crops or train.batch."
            )
        auto = c.zoom_out == "auto" and (c.zoom_out_weight or c.zoom_out_pixel_weight)
        if auto and not self.windowed and patch < self.zoom_out_px:
            self.zooms_out = False  # said here, because only here the patch is known
            return (
                f"no zoom-out: with these networks it needs LR crops of {self.zoom_out_px} px, and data.patch "
                f"is {patch}",
            )
        if self.zooms_out and patch < self.zoom_out_px:
            raise SrkdError(
                f"data.patch = {setting.patch_px}, but zoom-out with these networks needs at least "
                f"{self.zoom_out_px} LR pixels; raise data.patch, or set method.dukd.zoom_out=off."
            )
        if auto and self.windowed:
            return ("no zoom-out: a network of the pair has windows, as in the paper",)
        zoomed_px = patch // self.scale
        if self.zooms_out and zoomed_px < PAPER_ZOOMED_PX:
            return (
                f"zoomed-out crops are {zoomed_px} px, the paper's smallest {PAPER_ZOOMED_PX}: small ones are mostly "
                f"border and can cost quality; raise data.patch to {PAPER_ZOOMED_PX * self.scale} or set "
                "method.dukd.zoom_out=off",
            )
        return ()

    def views(self, batch: Batch) -> dict[str, ViewInput]:
        c = self.config
        h, w = batch.lr.shape[-2:]
        scale = batch.hr.shape[-1] // w
        views = {}
        if c.zoom_in_weight:
            random = batch.generator("zoom_in")
            corners = crop_corners(len(batch.hr) * c.crops, (h, w), scale, c.crop, random)
            source = batch.hr.repeat_interleave(c.crops, 0) if c.crops > 1 else batch.hr
            crops = torch.stack(
                [y[:, a : a + h, b : b + w] for y, (a, b) in zip(source, corners, strict=True)]
            )
            views["zoom_in"] = self._view(batch, "zoom_in", crops)
        if self.zooms_out:
            views["zoom_out"] = self._view(batch, "zoom_out", downscale(batch.lr, scale))
        return views

    def _view(self, batch: Batch, name: str, clean: Tensor) -> ViewInput:
        """The teacher sees the clean image, the student the augmented one."""
        operations = self._operations(batch, name, len(clean), clean.device)
        layout = torch.channels_last if _is_channels_last(batch.lr) else torch.contiguous_format
        clean = clean.contiguous(memory_format=layout)
        seen = clean if operations is None else augment(clean, operations)
        return ViewInput(student=seen.contiguous(memory_format=layout), teacher=clean)

    def _operations(
        self, batch: Batch, name: str, count: int, device: torch.device
    ) -> Tensor | None:
        """(count, 4) booleans, None when this view is not augmented; the same at every call of a step."""
        c = self.config
        if c.probability == 0 or c.augment not in ("both", name):
            return None
        random = batch.generator(f"{name} augmentation")
        drawn = torch.rand(count, OPERATIONS, generator=random) < c.probability
        return drawn.to(device, non_blocking=True)

    def loss(self, step: Step) -> dict[str, Tensor]:
        c = self.config
        terms = response_terms(c, step)  # Eq. (1)
        for name, weight in (("zoom_in", c.zoom_in_weight), ("zoom_out", c.zoom_out_weight)):
            if name not in step.views:
                continue
            view = step.views[name]
            operations = self._operations(
                step.batch, name, len(view.student.sr), view.student.sr.device
            )
            sr = view.student.sr if operations is None else undo(view.student.sr, operations)
            if weight:
                terms[name] = weight * l1(sr, view.teacher.sr.detach())  # Eq. (2), (3)
            if name == "zoom_out" and c.zoom_out_pixel_weight:
                scale = step.hr.shape[-1] // step.size[1]
                original = crop_to_multiple(step.lr, scale)
                terms["zoom_out_pixel"] = c.zoom_out_pixel_weight * l1(sr, original)
        return terms


def has_windows(network: nn.Module) -> bool:
    """Whether a network of ours, or an aggregated teacher, works in windows; a foreign one is not known to."""
    facts = getattr(network, "facts", None)
    return isinstance(facts, Facts) and facts.size_multiple > 1


def smallest_zoom(network: nn.Module) -> int:
    """Side in pixels of the smallest image that, made smaller by the scale, a network of ours takes."""
    facts = getattr(network, "facts", None)
    return facts.scale * facts.minimum_px if isinstance(facts, Facts) else 1


def _is_channels_last(image: Tensor) -> bool:
    return image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
