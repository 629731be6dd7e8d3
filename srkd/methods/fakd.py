"""FAKD: the similarity of every place of a feature map with every other is copied.

Paper: He, Dai, Lu, Jiang, Xia, "FAKD: Feature-Affinity Based Knowledge Distillation for Efficient Image
Super-Resolution", ICIP 2020. Checked against: Vincent-Hoo/Knowledge-Distillation-for-Super-resolution.

    A(F) = unit(F)^T unit(F)                                    (1)   unit over channels, per place
    L    = pixel + logits + w * sum_k mean |A(F_k^S) - A(F_k^T)|      (2)

    F_k^S, F_k^T  step.student.taps, step.teacher.taps   (N, C, h, w) at the positions of `positions.py`
    A             (N, h*w, h*w)
    w             20/255: the public code has 0.5 pixel + 0.5 logits + 10 * sum with images in 0..255, where |.|_1
                  is 255 times ours, while A has no scale; doubled, it is (2). A weight of 10 on images in
                  [0, 1] drowns the other terms

A for a map of 48 x 48 is 2304 x 2304 per sample: it is never made whole, but in blocks of rows, and only on
and above its diagonal, because it is symmetric. `pool_px` averages larger maps first (not in the paper).
The public code compares the map AFTER the long skip in place of the body convolution (the skip is added in
place); `after_skip` does so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.methods.base import response_terms
from srkd.methods.features import FeatureMethod

if TYPE_CHECKING:
    from srkd.types import Pass, Setting, Step

# Of the affinity matrices that are made at once: enough to fill a GPU, little enough for a CPU's cache.
BLOCK_BYTES = 64 * 2**20
CPU_BLOCK_BYTES = 2 * 2**20
LEAST_ROWS = 64  # thinner products are slow; a block takes fewer samples first


@dataclass(frozen=True)
class FakdConfig:
    pixel_weight: float = 1.0
    logits_weight: float = 1.0
    weight: float = 20 / 255
    pool_px: int = 0  # side that larger maps are averaged to first; 0: as they are
    after_skip: bool = False  # the last map after the long skip, as the public code has it
    positions: tuple[str, ...] = ()  # "student:teacher" taps; empty: the usual three


def unit(feature: Tensor, pool_px: int = 0) -> Tensor:
    """(N, C, h, w) -> (N, C, P) float32, every place of unit length over the channels."""
    f = feature.float()
    if pool_px:
        f = F.adaptive_avg_pool2d(f, (min(pool_px, f.shape[2]), min(pool_px, f.shape[3])))
    f = f.flatten(2)
    return f / (f.norm(dim=1, keepdim=True) + 1e-8)


def affinity(u: Tensor) -> Tensor:  # Eq. (1)
    """(N, C, P) of unit length -> (N, P, P): for tests and small maps; training uses blocks."""
    return u.mT @ u


class _AffinityGap(torch.autograd.Function):
    """mean |u_s^T u_s - u_t^T u_t| in blocks of rows; the gradient is made on the way.

    With D the difference, d(sum |D|)/du_s = 2 u_s sign(D), because D is symmetric.
    """

    @staticmethod
    def forward(ctx: Any, u_s: Tensor, u_t: Tensor, samples: int, rows: int) -> Tensor:
        n, _, places = u_s.shape
        total = u_s.new_zeros(())
        gradient = torch.zeros_like(u_s)
        for first in range(0, n, samples):
            s, t, grad = (u[first : first + samples] for u in (u_s, u_t, gradient))
            for a in range(0, places, rows):
                b = min(a + rows, places)
                gap = s[:, :, a:b].mT @ s[:, :, a:]
                gap.baddbmm_(t[:, :, a:b].mT, t[:, :, a:], alpha=-1)
                # What lies right of the diagonal block stands for its mirror image too.
                total += 2 * gap.abs().sum() - gap[:, :, : b - a].abs().sum()
                gap.sign_()
                grad[:, :, a:b].baddbmm_(s[:, :, a:], gap.mT)
                grad[:, :, b:].baddbmm_(s[:, :, a:b], gap[:, :, b - a :])
        entries = n * places * places
        ctx.save_for_backward(gradient.mul_(2 / entries))
        return total / entries

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[0] * gradient, None, None, None


def block_shape(samples: int, places: int, limit: int) -> tuple[int, int]:
    """Samples and rows of the affinity matrices that are made at once, within `limit` bytes."""
    samples = max(1, min(samples, limit // (4 * LEAST_ROWS * places)))
    return samples, max(1, min(places, limit // (4 * samples * places)))


def affinity_gap(u_s: Tensor, u_t: Tensor) -> Tensor:  # Eq. (2), one position
    """mean |A_s - A_t| over all entries, for (N, C_s, P) and (N, C_t, P) of unit length."""
    device = u_s.device.type
    limit = CPU_BLOCK_BYTES if device == "cpu" else BLOCK_BYTES
    block = block_shape(len(u_s), u_s.shape[2], limit)
    with torch.autocast(device, enabled=False):
        gap = _AffinityGap.apply(u_s, u_t.detach(), *block)
    assert isinstance(gap, Tensor)
    return gap


class Fakd(FeatureMethod):
    Config = FakdConfig

    def __init__(
        self, config: FakdConfig, student: nn.Module, teachers: tuple[nn.Module, ...]
    ) -> None:
        super().__init__(config, student, teachers)
        if config.pool_px < 0:
            raise SrkdError(
                f"method.fakd.pool_px = {config.pool_px}, but 0 (off) or a side is needed."
            )

    def check(self, setting: Setting) -> tuple[str, ...]:
        super().check(setting)
        side = self.map_px(setting, self.multiples[0])
        if 0 < self.config.pool_px < side:
            side = self.config.pool_px
        places, n = side * side, setting.batch
        whole = 4 * n * places**2
        # A block, its absolute values and a product in the making; the gradients and unit features stay.
        samples, rows = block_shape(n, places, BLOCK_BYTES)
        block = 3 * 4 * samples * rows * places
        kept = 4 * n * places * (3 * self.student_channels + self.teacher_channels)
        need = block + kept * len(self.pairs)
        if need > setting.memory:
            raise SrkdError(
                f"fakd compares {places} x {places} places in each of {n} images and needs about "
                f"{_size(need)}, but {_size(setting.memory)} are free; lower train.batch or data.patch, raise "
                "train.accumulate, or set method.fakd.pool_px=32."
            )
        if self.config.after_skip and not any("body" in pair for pair in self.pairs):
            raise SrkdError(
                "method.fakd.after_skip is for the last map, after the body, which is none of the positions; add "
                '"body:body" to method.fakd.positions or leave after_skip out.'
            )
        return (
            f"affinity of {places} x {places} places in {len(self.pairs)} positions takes about "
            f"{_size(need)} (in blocks; one whole matrix of the batch would be {_size(whole)})",
        )

    def loss(self, step: Step) -> dict[str, Tensor]:
        c = self.config
        terms = response_terms(c, step)
        gaps = []
        for (s, t), (f_s, f_t) in zip(self.pairs, self.features(step), strict=True):
            if c.after_skip:
                f_s, f_t = _skipped(step.student, s, f_s), _skipped(step.teacher, t, f_t)
            gaps.append(affinity_gap(unit(f_s, c.pool_px), unit(f_t, c.pool_px)))
        terms["affinity"] = c.weight * sum(gaps[1:], gaps[0])
        return terms


def _skipped(run: Pass, tap: str, feature: Tensor) -> Tensor:
    """The last feature of a network with its long skip added; others as they are."""
    if tap != "body":
        return feature
    assert run.head is not None
    return feature + run.head


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
