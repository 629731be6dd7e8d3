"""ICKD: the channels of the student's features resemble each other as the teacher's do.

Paper: Liu, Huang, Lin, Xie, Wang, Chang, Liang, "Exploring Inter-Channel Correlation for
Diversity-preserved Knowledge Distillation", ICCV 2021, arXiv 2202.03680.
Checked against: ADLab-AutoDrive/ICKD @ 04e1d3e, Cifar100/distiller_zoo/ICKD.py.

    G(F) = unit( F F^T )                                                  (1)   rows of unit length, per sample
    L    = pixel + logits + w * sum_k |G(B_k(F_k^S)) - G(F_k^T)|^2 / (C_T N)    (2)   sum over all entries

    F_k^S, F_k^T  step.student.taps, step.teacher.taps   (N, C, h, w) at the positions of `positions.py`,
                  in (1) as matrices (C, h*w)
    B_k           1x1 convolution C_S -> C_T without bias and batch norm, trained and dropped
    w             2.5, the public code's

Ranges need not match: (1) has none, and the batch norm takes the student's away.

Departs from the paper: three positions, where the public code compares the last feature alone; and a floor under
the student's rows, because a batch of one colour leaves the batch norm nothing but rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.methods.base import response_terms
from srkd.methods.features import FeatureMethod

if TYPE_CHECKING:
    from srkd.types import Step


# Rows of the student have a length of about 1 and more: the batch norm gives every channel a mean square of 1.
STUDENT_SHORTEST = 1e-3


@dataclass(frozen=True)
class IckdConfig:
    pixel_weight: float = 1.0
    logits_weight: float = 1.0
    weight: float = 2.5
    positions: tuple[str, ...] = ()  # "student:teacher" taps; empty: the usual three


def correlation(feature: Tensor, shortest: float = 1e-12) -> Tensor:  # Eq. (1)
    """(N, C, h, w) -> (N, C, C), float32; the scale of the feature cancels.

    Rows of F F^T / (h w) below the length `shortest` are divided by it, so that a channel of zeros has a row of
    zeros; the gradient of any row grows with one over its length, at most 1 / shortest.
    """
    with torch.autocast(feature.device.type, enabled=False):
        f = feature.float().flatten(2)
        gram = f @ f.transpose(1, 2) / f.shape[2]
    return F.normalize(gram, dim=2, eps=shortest)


def correlation_gap(f_s: Tensor, f_t: Tensor) -> Tensor:  # Eq. (2), one position
    """Squared distance of the rows of (1), a mean over channels and samples: 0 to 4.

    `f_s` comes from the batch norm.
    """
    return (correlation(f_s, STUDENT_SHORTEST) - correlation(f_t)).square().sum(2).mean()


class Ickd(FeatureMethod):
    Config = IckdConfig

    def __init__(
        self, config: IckdConfig, student: nn.Module, teachers: tuple[nn.Module, ...]
    ) -> None:
        super().__init__(config, student, teachers)
        self.embeddings = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(self.student_channels, self.teacher_channels, 1, bias=False),
                nn.BatchNorm2d(self.teacher_channels),
            )
            for _ in self.pairs
        )

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = response_terms(self.config, step)
        gaps = [
            correlation_gap(self.embeddings[k](f_s), f_t)
            for k, (f_s, f_t) in enumerate(self.features(step))
        ]
        terms["correlation"] = self.config.weight * sum(gaps[1:], gaps[0])
        return terms
