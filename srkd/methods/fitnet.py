"""FitNet: the student's features, through a trained regressor, copy the teacher's.

Paper: Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015,
arXiv 1412.6550. For super-resolution as a baseline of FAKD, DUKD and MiPKD.

    L = pixel + logits + w * sum_k mean( (R_k(F_k^S) - F_k^T)^2 )     (1)

    F_k^S, F_k^T  step.student.taps, step.teacher.taps   (N, C, h, w) at the positions of `positions.py`
    R_k           1x1 convolution C_S -> C_T, trained and dropped
    w             1; the paper's own practice on small images uses 100

Departs from the paper: one joint training instead of a hint stage before the task, as the super-resolution
papers compare it; and both sides of (1) are divided by the teacher's running RMS, because the raw features of
EDSR and RCAN are on a 0..255 scale, where (1) is thousands of times the pixel term (`feature_norm = "none"`:
as they are; "auto": only across families, where the scales differ).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from srkd.methods.base import choice, response_terms
from srkd.methods.features import FeatureMethod, make_norms

if TYPE_CHECKING:
    from srkd.types import Step


@dataclass(frozen=True)
class FitnetConfig:
    pixel_weight: float = 1.0
    logits_weight: float = 1.0
    weight: float = 1.0
    feature_norm: str = choice("rms", "none", "auto")
    positions: tuple[str, ...] = ()  # "student:teacher" taps; empty: the usual three


def hint(regressed: Tensor, target: Tensor, rms: Tensor | float) -> Tensor:  # Eq. (1)
    """Mean squared error in float32; `rms` is the scale of the target."""
    return ((regressed.float() - target.float()) / rms).square().mean()


class Fitnet(FeatureMethod):
    Config = FitnetConfig

    def __init__(
        self, config: FitnetConfig, student: nn.Module, teachers: tuple[nn.Module, ...]
    ) -> None:
        super().__init__(config, student, teachers)
        self.regressors = nn.ModuleList(
            nn.Conv2d(self.student_channels, self.teacher_channels, 1) for _ in self.pairs
        )
        self.norms = make_norms(config.feature_norm, self.cross_family, len(self.pairs))

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = response_terms(self.config, step)
        gaps = []
        for k, (f_s, f_t) in enumerate(self.features(step)):
            rms = self.norms[k](f_t) if self.norms is not None else 1.0
            gaps.append(hint(self.regressors[k](f_s), f_t, rms))
        terms["hint"] = self.config.weight * sum(gaps[1:], gaps[0])
        return terms
