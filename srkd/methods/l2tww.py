"""L2T-ww: the student matches the teacher's features, most where meta networks found that it helps.

Paper: Jang, Lee, Hwang, Shin, "Learning What and Where to Transfer", ICML 2019, arXiv 1905.05901.
Checked against: alinlab/L2T-ww @ 023c642, train_l2t_ww.py. The numbers of the equations are ours.

    d_c     = mean over places of ( r(F^s) - F^t )_c^2                                  (N, c_t)    (1)
    w       = softmax( f( mean over places of F^t ) )               what to transfer    (N, c_t)    (2)
    lambda  = relu6( g( mean over places of F^t ) )                 where               (N,)        (3)
    L_match = weight * sum over positions, mean over samples of  lambda sum_c w_c d_c               (4)

    F^s, F^t  features at the positions of MKD, or at those given     (N, c_s, h, w), (N, c_t, h, w)
    r         1x1 convolution c_s -> c_t of a position
    f, g      linear layers of a position, c_t -> c_t with zeros at the start, c_t -> 1 with a bias of 1
    weight    0.5, the public code's beta

r belongs to theta, as in the public code: it learns from (4) with the student. f and g are phi: they
learn from |S(x) - y|_1 after T steps of theta on (4) and one on |S(x) - y|_1 (`srkd/bilevel.py`).

Departs from the paper, for MKD's comparison: four positions and no lambda (`where = true` puts it back), and
MKD's iteration, in which the real steps on (4) come after the meta part and apart from the step on |S(x) - y|_1,
where the public code adds the two. Features are divided by their RMS over the batch, as in `mkd`. No weight decay
of f and g: the code's 1e-4 goes with an alpha of 0.1; the meta-gradient is in proportion to alpha, and at an alpha
of 1e-4 the decay would outweigh it from the first steps on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.bilevel import BilevelPlan
from srkd.errors import SrkdError
from srkd.methods.base import choice, l1
from srkd.methods.features import FeatureMethod
from srkd.methods.mkd import by_rms, quarters
from srkd.methods.positions import Pairs, choose_pairs, network_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from srkd.types import Step


@dataclass(frozen=True)
class L2twwConfig:
    pixel_weight: float = 1.0
    weight: float = 0.5
    where: bool = False
    feature_norm: str = choice("rms", "none")
    inner_steps: int = 2
    meta_every: int = 1
    meta_learning_rate: float = 1e-4
    positions: tuple[str, ...] = ()  # "student:teacher" taps; empty: the ends of four equal parts

    def __post_init__(self) -> None:
        for name in ("inner_steps", "meta_every"):
            if getattr(self, name) < 1:
                raise SrkdError(
                    f"method.l2tww.{name} = {getattr(self, name)}, but 1 or more is needed."
                )


def channel_gaps(f_s: Tensor, f_t: Tensor) -> Tensor:  # Eq. (1), after r
    """(N, c, h, w) twice -> (N, c)."""
    return (f_s - f_t).square().mean((2, 3))


def what_weights(scores: Tensor) -> Tensor:  # Eq. (2), after f
    """(N, c) -> (N, c), every row adds to 1."""
    return scores.softmax(1)


def where_weights(scores: Tensor) -> Tensor:  # Eq. (3), after g
    """(N, 1) -> (N,), 0 to 6."""
    return F.relu6(scores).squeeze(1)


def matching(gaps: Tensor, what: Tensor, where: Tensor | None) -> Tensor:  # Eq. (4), one position
    """(N, c), (N, c) and (N,) -> scalar, without the weight; no `where`: lambda is 1."""
    each = (what * gaps).sum(1)
    return (each if where is None else where * each).mean()


class L2tww(FeatureMethod):
    Config = L2twwConfig

    def __init__(
        self, config: L2twwConfig, student: nn.Module, teachers: tuple[nn.Module, ...]
    ) -> None:
        super().__init__(config, student, teachers)
        c_s, c_t = self.student_channels, self.teacher_channels
        self.match = nn.ModuleList(nn.Conv2d(c_s, c_t, 1) for _ in self.pairs)
        self.what = nn.ModuleList(nn.Linear(c_t, c_t) for _ in self.pairs)
        for p in self.what.parameters():
            nn.init.zeros_(p)  # every channel counts alike at the start
        self.where = nn.ModuleList(nn.Linear(c_t, 1) for _ in self.pairs if config.where)
        for layer in self.where:
            assert isinstance(layer, nn.Linear)
            nn.init.ones_(layer.bias)

    def choose_pairs(self, student: nn.Module, teacher: nn.Module) -> Pairs:
        ends = zip(quarters(network_of(student)), quarters(network_of(teacher)), strict=True)
        given = self.config.positions or dict.fromkeys(f"{s}:{t}" for s, t in ends)
        return choose_pairs(student, teacher, given)

    @property
    def needs_teacher_pass(self) -> bool:
        """The step on |S(x) - y|_1 reads no teacher; the bilevel step asks for its features."""
        return False

    @property
    def bilevel(self) -> BilevelPlan:
        c = self.config
        return BilevelPlan(
            inner_steps=c.inner_steps,
            meta=True,
            meta_every=c.meta_every,
            meta_learning_rate=c.meta_learning_rate,
            inner=tuple(f"match.{name}" for name, _ in self.match.named_parameters()),
            task_step=True,
        )

    def distance(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
    ) -> Tensor:  # Eq. (4)
        """In float32 or wider; the teacher's features get no gradient."""
        terms = []
        for k, (s, t) in enumerate(self.pairs):
            f_s, f_t = student[s], teacher[t].detach()
            with torch.autocast(f_s.device.type, enabled=False):
                dtype = torch.promote_types(f_s.dtype, torch.float32)
                f_s, f_t = f_s.to(dtype), f_t.to(dtype)
                if self.config.feature_norm == "rms":
                    f_s, f_t = by_rms(f_s), by_rms(f_t)
                means = f_t.mean((2, 3))
                what = what_weights(self.what[k](means))
                where = where_weights(self.where[k](means)) if self.config.where else None
                terms.append(matching(channel_gaps(self.match[k](f_s), f_t), what, where))
        return self.config.weight * torch.stack(terms).sum()

    def loss(self, step: Step) -> dict[str, Tensor]:
        return {"pixel": self.config.pixel_weight * l1(step.student.sr, step.hr)}
