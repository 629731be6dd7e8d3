"""MKD: the student learns from knowledge maps, whose kernels a small network learned to make for it.

Paper: Zhu, Chen, Liu, "Learning Knowledge Representation with Meta Knowledge Distillation for Single Image
Super-Resolution", arXiv 2207.08356. No public code.

    A    = softmax( unit(F^t) unit(F^s)^T / tau )                              (N, c_t, c_s)
    W_1  = G_1(A F^s),  W_2 = G_2(A F^s)                                                            (4)
    K^s  = relu( D(F^s) * W_1 ) * W_2                                          (N, c_o, h, w)       (5)
    K^t  = relu( F^t * W_1 ) * W_2                                                                  (6)
    L_kd = sum_i |K_i^s - K_i^t|_1                                                                  (7)

    F^s, F^t  features at four positions      (N, c_s, h, w), (N, c_t, h, w); in A as matrices (C, h*w)
    unit      rows of unit length; the softmax is over c_s; tau is `temperature`
    G         1x1 convolution; the map in K x K tiles, K^2 = c_o; the means of the k x k parts of a tile
              are one filter, of unit length (section 4.3): (N, c_o, c, k, k), other filters for every sample
    D         1x1 convolutions c_s -> c_t -> c_t, ReLU between

The convolutions of D and G are the parameters phi, others at each position. `srkd/bilevel.py` trains the
student on (7), and phi on what that does to |S(x) - y|_1. `loss` is the step of the loop after that, on |S(x) - y|_1: it
alone trains the tail, which (7) does not reach.

Departs from the paper, where it is silent: unit rows and tau in A, because the product of features of 0..255
makes the softmax one-hot (`correlation = "literal"`: as printed); filters of unit length, because W = 0 would
solve (7); W_2 as wide as (5) needs; features divided by their RMS over the batch, because (7) grows with their
scale and the steps on it diverge (`feature_norm = "none"`: as they are); and in case 2 a smooth (7), see
`charbonnier`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.bilevel import BilevelPlan
from srkd.errors import SrkdError
from srkd.methods.base import choice, l1
from srkd.methods.features import FeatureMethod
from srkd.methods.positions import Pairs, choose_pairs, network_of, units
from srkd.networks.base import conv3x3

if TYPE_CHECKING:
    from collections.abc import Mapping

    from srkd.networks.base import Network
    from srkd.types import Step

POSITIONS = 4
TINY_SQUARE = 1e-12
CHARBONNIER_SHARE = 0.05  # of the RMS of the teacher's map


@dataclass(frozen=True)
class MkdConfig:
    pixel_weight: float = 1.0
    case: str = choice("4", "1", "2", "3")  # of Table 2; 4 is the method, 3 trains phi on L_kd
    channels_out: int = 64  # c_o, Table 3
    kernel: int = 3
    correlation: str = choice("cosine", "literal")
    temperature: float = 0.1
    feature_norm: str = choice("rms", "none")
    distance: str = choice("auto", "l1", "charbonnier")  # auto: charbonnier in case 2
    inner_steps: int = 2
    meta_every: int = 1
    meta_learning_rate: float = 1e-4
    positions: tuple[str, ...] = ()  # "student:teacher" taps; empty: the ends of four equal parts

    def __post_init__(self) -> None:
        if self.channels_out < 1 or math.isqrt(self.channels_out) ** 2 != self.channels_out:
            raise SrkdError(
                f"method.mkd.channels_out = {self.channels_out}, but every tile of a square grid makes one "
                "channel; choose a square number, such as 16, 64 or 144."
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise SrkdError(
                f"method.mkd.kernel = {self.kernel}, but a kernel needs a middle; choose an odd number."
            )
        for name in ("inner_steps", "meta_every"):
            if getattr(self, name) < 1:
                raise SrkdError(
                    f"method.mkd.{name} = {getattr(self, name)}, but 1 or more is needed."
                )
        if self.temperature == 0:
            raise SrkdError("method.mkd.temperature = 0, but it divides; choose a number above 0.")


def unit(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`x` at length 1 over `dims`; smooth where it is 0, as its second derivative is taken."""
    return x * (x.square().sum(dims, keepdim=True) + TINY_SQUARE).rsqrt()


def channel_correlation(
    f_s: Tensor, f_t: Tensor, temperature: float | None
) -> Tensor:  # Eq. (4), A
    """(N, c_s, h, w), (N, c_t, h, w) -> (N, c_t, c_s), every row adds to 1; no temperature: as printed."""
    rows_s, rows_t = f_s.flatten(2), f_t.flatten(2)
    if temperature is None:
        return (rows_t @ rows_s.transpose(1, 2)).softmax(2)
    return (unit(rows_t, (2,)) @ unit(rows_s, (2,)).transpose(1, 2) / temperature).softmax(2)


def generate_kernels(tiles: Tensor, grid: int) -> Tensor:  # Eq. (4), G after its convolution
    """Tile (r, c) of grid x grid as filter r * grid + c, of unit length.

    (N, c, grid*k, grid*k) -> (N, grid*grid, c, k, k)
    """
    k = tiles.shape[-1] // grid
    apart = tiles.unflatten(3, (grid, k)).unflatten(2, (grid, k))  # (N, c, grid, k, grid, k)
    return unit(apart.permute(0, 2, 4, 1, 3, 5).flatten(1, 2), (2, 3, 4))


def convolve(maps: Tensor, kernels: Tensor) -> Tensor:
    """Each sample with kernels of its own: (N, c, h, w), (N, c_o, c, k, k) -> (N, c_o, h, w)."""
    n, k = kernels.shape[0], kernels.shape[-1]
    mixed = F.conv2d(maps.flatten(0, 1)[None], kernels.flatten(0, 1), padding=k // 2, groups=n)
    return mixed[0].unflatten(0, (n, -1))


def knowledge(feature: Tensor, w1: Tensor, w2: Tensor) -> Tensor:  # Eq. (5), (6)
    """(N, c_t, h, w) -> (N, c_o, h, w); the student's feature as wide as the teacher's."""
    return convolve(F.relu(convolve(feature, w1)), w2)


def knowledge_gap(f_s: Tensor, f_t: Tensor, w1: Tensor, w2: Tensor) -> Tensor:  # Eq. (5) - (6)
    """K^s - K^t with one convolution by W_2, which is linear: the dearest part of the method."""
    return convolve(F.relu(convolve(f_s, w1)) - F.relu(convolve(f_t, w1)), w2)


def absolute(gap: Tensor) -> Tensor:  # Eq. (7), one position
    return gap.abs().mean()


def charbonnier(gap: Tensor, k_t: Tensor) -> Tensor:  # instead of (7)
    """Mean of sqrt(gap^2 + e^2), e a share of the RMS of K^t, which gets no gradient through it.

    Under (7) a convolution that only K^t passes has no meta-gradient: the gradient of (7) has but its sign.
    """
    e = CHARBONNIER_SHARE * k_t.detach().square().mean().sqrt()
    return (gap.square() + e.square()).sqrt().mean()


def by_rms(feature: Tensor) -> Tensor:
    """Divided by the root mean square over the batch, which the gradient sees."""
    return feature * (feature.square().mean() + TINY_SQUARE).rsqrt()


class KnowledgeNetwork(nn.Module):  # Cases 3 and 4
    """KRNet of one position: features (N, c_s, h, w), (N, c_t, h, w) -> their distance, a scalar."""

    def __init__(self, c_s: int, c_t: int, config: MkdConfig) -> None:
        super().__init__()
        self.grid, self.kernel = math.isqrt(config.channels_out), config.kernel
        self.temperature = config.temperature if config.correlation == "cosine" else None
        self.mix1 = nn.Conv2d(c_t, c_t, 1)
        self.mix2 = nn.Conv2d(c_t, config.channels_out, 1)
        self.match = nn.Sequential(nn.Conv2d(c_s, c_t, 1), nn.ReLU(), nn.Conv2d(c_t, c_t, 1))

    def kernels(self, f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:  # Eq. (4)
        """W_1 (N, c_o, c_t, k, k) and W_2 (N, c_o, c_o, k, k)."""
        # A and the 1x1 convolutions mix channels alone, so the means may be taken before them: less work.
        means = F.adaptive_avg_pool2d(f_s, self.grid * self.kernel)
        mixed = channel_correlation(f_s, f_t, self.temperature) @ means.flatten(2)
        mixed = mixed.unflatten(2, means.shape[2:])
        w1 = generate_kernels(self.mix1(mixed), self.grid)
        return w1, generate_kernels(self.mix2(mixed), self.grid)

    def forward(self, f_s: Tensor, f_t: Tensor, smooth: bool) -> Tensor:
        w1, w2 = self.kernels(f_s, f_t)
        gap = knowledge_gap(self.match(f_s), f_t, w1, w2)
        if not smooth:
            return absolute(gap)
        with torch.no_grad():
            k_t = knowledge(f_t, w1, w2)
        return charbonnier(gap, k_t)


class PlainKnowledge(nn.Module):
    """Cases 1 and 2: 1x1 convolution of the student's feature alone, or 3x3 convolutions of both.

    Takes and returns what `KnowledgeNetwork` does.
    """

    def __init__(self, c_s: int, c_t: int, both: bool) -> None:
        super().__init__()
        self.student = conv3x3(c_s, c_t) if both else nn.Conv2d(c_s, c_t, 1)
        self.teacher = conv3x3(c_t, c_t) if both else nn.Identity()

    def forward(self, f_s: Tensor, f_t: Tensor, smooth: bool) -> Tensor:
        k_t = self.teacher(f_t)
        gap = self.student(f_s) - k_t
        return charbonnier(gap, k_t) if smooth else absolute(gap)


def quarters(network: Network) -> list[str]:
    """The taps after one to four quarters of the groups, rounded, a half up: 3, 5, 8, 10 of 10."""
    n = units(network)
    ends = [max(1, (i * n + POSITIONS // 2) // POSITIONS) for i in range(1, POSITIONS + 1)]
    return [network.tap_names[end - 1] for end in ends]


class Mkd(FeatureMethod):
    Config = MkdConfig

    def __init__(
        self, config: MkdConfig, student: nn.Module, teachers: tuple[nn.Module, ...]
    ) -> None:
        super().__init__(config, student, teachers)
        c_s, c_t = self.student_channels, self.teacher_channels
        self.networks = nn.ModuleList(
            KnowledgeNetwork(c_s, c_t, config)
            if config.case in "34"
            else PlainKnowledge(c_s, c_t, both=config.case == "2")
            for _ in self.pairs
        )
        self.smooth = config.distance == "charbonnier" or (
            config.distance == "auto" and config.case == "2"
        )

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
            meta=c.case != "3",
            meta_every=c.meta_every,
            meta_learning_rate=c.meta_learning_rate,
        )

    def distance(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """L_kd of the features at the taps, in float32 or wider; the teacher's get no gradient."""
        gaps = []
        for (s, t), network in zip(self.pairs, self.networks, strict=True):
            f_s, f_t = student[s], teacher[t].detach()
            with torch.autocast(f_s.device.type, enabled=False):
                dtype = torch.promote_types(f_s.dtype, torch.float32)
                f_s, f_t = f_s.to(dtype), f_t.to(dtype)
                if self.config.feature_norm == "rms":
                    f_s, f_t = by_rms(f_s), by_rms(f_t)
                gaps.append(network(f_s, f_t, self.smooth))
        return torch.stack(gaps).sum()  # Eq. (7)

    def loss(self, step: Step) -> dict[str, Tensor]:
        return {"pixel": self.config.pixel_weight * l1(step.student.sr, step.hr)}
