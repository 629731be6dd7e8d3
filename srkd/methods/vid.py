"""VID: the student's features say as much as they can about the teacher's, channel by channel.

Paper: Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge Transfer", CVPR
2019, arXiv 1904.05835.
Checked against: the authors' code as copied in HobbitLong/RepDistiller @ 1e2f816, distiller_zoo/VID.py.

    v_c = softplus(a_c) + 1e-5                                            (1)   one per channel, 5 at the start
    L   = pixel + logits + w * sum_k mean( ((m_k(F_k^S) - F_k^T)^2 / v_k + log v_k) / 2 )    (2)

    F_k^S, F_k^T  step.student.taps, step.teacher.taps   (N, C, h, w) at the positions of `positions.py`
    m_k           1x1 convolutions C_S -> C_T -> C_T -> C_T, ReLU between, no bias; trained and dropped
    a_k           (C_T,), trained and dropped: a channel that cannot be told gets a large variance, and little weight
    w             1

(2) is the negative logarithm of a Gaussian without its constant: below 0 where v is below 1 and the guess is good.

Departs from the paper: both sides of the difference are divided by the teacher's running RMS, because a first
variance of 5 means a target of about 1, while raw features of EDSR and RCAN are on a 0..255 scale, which v would
take the whole training to reach (`feature_norm = "none"`: as they are; "auto": only across families).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.methods.base import choice, response_terms
from srkd.methods.features import FeatureMethod, make_norms

if TYPE_CHECKING:
    from srkd.types import Step

FIRST_VARIANCE = 5.0
LEAST_VARIANCE = 1e-5


@dataclass(frozen=True)
class VidConfig:
    pixel_weight: float = 1.0
    logits_weight: float = 1.0
    weight: float = 1.0
    feature_norm: str = choice("rms", "none", "auto")
    positions: tuple[str, ...] = ()  # "student:teacher" taps; empty: the usual three


def variance(a: Tensor) -> Tensor:  # Eq. (1)
    """(C,) of any value -> (C,) above 0."""
    return F.softplus(a) + LEAST_VARIANCE


def surprise(mean: Tensor, target: Tensor, v: Tensor, rms: Tensor | float) -> Tensor:  # Eq. (2)
    """What the target (N, C, h, w) costs under a Gaussian of this mean and variance (C,); in float32, any sign.

    `rms` is the scale of the target; v is the variance of what is left after dividing by it.
    """
    v = v.view(1, -1, 1, 1)
    return (((mean.float() - target.float()) / rms).square() / v + v.log()).mean() / 2


class Gaussian(nn.Module):
    """What the student's feature says about the teacher's at one position: a mean and a variance."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        # Without biases m(F / rms) = m(F) / rms, so that the layers see no scale.
        self.mean = nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 1, bias=False),
        )
        inverse_softplus = math.log(math.expm1(FIRST_VARIANCE - LEAST_VARIANCE))
        self.a = nn.Parameter(torch.full((c_out,), inverse_softplus))

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C_S, h, w) -> mean (N, C_T, h, w), variance (C_T,)."""
        return self.mean(feature), variance(self.a)


class Vid(FeatureMethod):
    Config = VidConfig

    def __init__(
        self, config: VidConfig, student: nn.Module, teachers: tuple[nn.Module, ...]
    ) -> None:
        super().__init__(config, student, teachers)
        self.gaussians = nn.ModuleList(
            Gaussian(self.student_channels, self.teacher_channels) for _ in self.pairs
        )
        self.norms = make_norms(config.feature_norm, self.cross_family, len(self.pairs))

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = response_terms(self.config, step)
        costs = []
        for k, (f_s, f_t) in enumerate(self.features(step)):
            rms = self.norms[k](f_t) if self.norms is not None else 1.0
            mean, v = self.gaussians[k](f_s)
            costs.append(surprise(mean, f_t, v, rms))
        terms["information"] = self.config.weight * sum(costs[1:], costs[0])
        return terms
