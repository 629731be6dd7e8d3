"""Relational distillation: distances and angles between the images of a batch are copied.

Paper: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068.

    e_i     = embedding of image i: body feature, averaged to 8x8, flattened
    d_ij    = |e_i - e_j|_2 / mean over i != j of |e_i - e_j|_2                  (1)
    a_ijk   = < unit(e_i - e_j), unit(e_k - e_j) >                               (2)
    L_RKD   = 25 * huber(d^S, d^T) + 50 * huber(a^S, a^T)                        (3)
    L       = pixel + logits + c * L_RKD

    e     (N, C*64) from step.student.taps["body"], step.teacher.taps["body"]
    25/50 the weights of the common public implementation
    c     no paper prints it for super-resolution. It is measured once: half of mean(pixel) / mean(L_RKD)
          over the steps calibrate_from..calibrate_to, and fixed after; the term is off until then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.methods.base import l1, response_terms, zero
from srkd.methods.features import FeatureMethod

if TYPE_CHECKING:
    from srkd.methods.positions import Pairs
    from srkd.types import Setting, Step

EMBEDDING_PX = 8


@dataclass(frozen=True)
class RkdConfig:
    pixel_weight: float = 1.0
    logits_weight: float = 1.0
    distance_weight: float = 25.0
    angle_weight: float = 50.0
    share: float = 0.5  # of the pixel term that the calibrated term amounts to
    calibrate_from: int = 900
    calibrate_to: int = 1000


def embed(feature: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, C*64), float32."""
    return F.adaptive_avg_pool2d(feature.float(), EMBEDDING_PX).flatten(1)


def distances(e: Tensor) -> Tensor:  # Eq. (1)
    """(N, D) -> (N, N) Euclidean distances over their mean; the diagonal is 0."""
    n = len(e)
    squared = (e[:, None] - e[None]).square().sum(2)
    off = ~torch.eye(n, dtype=torch.bool, device=e.device)
    # The square root has no gradient at 0, where the diagonal (and equal images) lie.
    d = torch.where(off, squared.clamp(min=1e-12).sqrt(), 0.0)
    return d / (d.sum() / (n * (n - 1))).clamp(min=1e-12)


def angles(e: Tensor) -> Tensor:  # Eq. (2)
    """(N, D) -> (N, N, N): cosine of the angle at j between i and k, at [j, i, k]."""
    gap = e[None] - e[:, None]
    # Equal images have no direction: without the mask rounding noise would get a gradient of 1e12.
    apart = gap.square().sum(2, keepdim=True) > 1e-12
    to = F.normalize(torch.where(apart, gap, 0.0), dim=2)  # [j, i] = unit(e_i - e_j)
    return to @ to.mT


class Rkd(FeatureMethod):
    Config = RkdConfig
    pixel_sum: Tensor
    rkd_sum: Tensor

    def __init__(
        self, config: RkdConfig, student: nn.Module, teachers: tuple[nn.Module, ...]
    ) -> None:
        super().__init__(config, student, teachers)
        self.register_buffer("pixel_sum", torch.zeros(()))
        self.register_buffer("rkd_sum", torch.zeros(()))

    def choose_pairs(self, student: nn.Module, teacher: nn.Module) -> Pairs:
        return (("body", "body"),)

    def check(self, setting: Setting) -> tuple[str, ...]:
        c = self.config
        if setting.batch < 3:
            raise SrkdError(
                f"rkd compares the images of a batch, angles need three of them, and {setting.batch} are run "
                "at once; raise train.batch or lower train.accumulate."
            )
        if not 0 <= c.calibrate_from < c.calibrate_to < setting.iterations:
            raise SrkdError(
                f"rkd measures its weight over steps {c.calibrate_from} to {c.calibrate_to} of "
                f"{setting.iterations}, so it would never act; set method.rkd.calibrate_from < calibrate_to < "
                "train.iterations."
            )
        return ()  # embeddings have one size, whatever the maps have

    def relations(self, step: Step) -> Tensor:  # Eq. (3)
        ((f_s, f_t),) = self.features(step)
        with torch.autocast(f_s.device.type, enabled=False):  # angles are a product of matrices
            e_s, e_t = embed(f_s), embed(f_t)
            distance = F.smooth_l1_loss(distances(e_s), distances(e_t))
            angle = F.smooth_l1_loss(angles(e_s), angles(e_t))
        return self.config.distance_weight * distance + self.config.angle_weight * angle

    def loss(self, step: Step) -> dict[str, Tensor]:
        c, i = self.config, step.batch.iteration
        terms = response_terms(c, step)
        if i < c.calibrate_from:
            return {**terms, "relations": zero(step)}
        if i < c.calibrate_to:
            with torch.no_grad():
                self.pixel_sum += l1(step.student.sr, step.hr)
                self.rkd_sum += self.relations(step)
            return {**terms, "relations": zero(step)}
        weight = c.share * self.pixel_sum / self.rkd_sum.clamp(min=1e-12)
        return {**terms, "relations": weight * self.relations(step)}
