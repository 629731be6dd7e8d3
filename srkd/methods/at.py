"""Attention transfer: the student looks where the teacher looks.

Paper: Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928.

    Q(F) = unit( vec( mean_c F_c^2 ) )                             (1)   per sample
    L    = pixel + logits + w * sum_k mean( (Q(F_k^S) - Q(F_k^T))^2 )    (2)

    F_k^S, F_k^T  step.student.taps, step.teacher.taps   (N, C, h, w) at the positions of `positions.py`
    w             1000 (the paper: beta / 2 with beta = 1000 on a sum over pairs)

Widths and ranges need not match: Q has no channels and unit length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F

from srkd.methods.base import response_terms
from srkd.methods.features import FeatureMethod

if TYPE_CHECKING:
    from torch import Tensor

    from srkd.types import Step


@dataclass(frozen=True)
class AtConfig:
    pixel_weight: float = 1.0
    logits_weight: float = 1.0
    weight: float = 1000.0
    positions: tuple[str, ...] = ()  # "student:teacher" taps; empty: the usual three


def attention_map(feature: Tensor) -> Tensor:  # Eq. (1)
    """(N, C, h, w) -> (N, h*w), float32, unit length; the scale of the feature cancels."""
    return F.normalize(feature.float().square().mean(1).flatten(1), dim=1)


class AttentionTransfer(FeatureMethod):
    Config = AtConfig

    def loss(self, step: Step) -> dict[str, Tensor]:  # Eq. (2)
        terms = response_terms(self.config, step)
        gaps = [
            (attention_map(f_s) - attention_map(f_t)).square().mean()
            for f_s, f_t in self.features(step)
        ]
        terms["attention"] = self.config.weight * sum(gaps[1:], gaps[0])
        return terms
