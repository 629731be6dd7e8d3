"""MiPKD: student and teacher are mixed, in the features and in the networks that work on them.

Paper: Li, Zhang, Li, Chen, Wang, Jing, Lin, Hu, "Knowledge Distillation with Multi-granularity Mixture of
Priors for Image Super-Resolution", ICLR 2025, arXiv 2404.02573. No public code was found; what the paper
leaves open is our choice and marked so.

    Z^S = Enc_S(F^S),  Z^T = Enc_T(F^T)                                 (3)   at every position k
    Z^E = Z^S * (1 - M) + Z^T * M                                       (4)
    F^E = Dec(Z^E),  L_feat = |F^E - F^T|_1                             (5)
    I^E = R * B_S(F^E) + (1 - R) * B_T(F^E)                             (6), (7)
    L_block = |I^E - T(x)|_1                                            (8)
    L = logits + pixel + sum_k ( w_feat * L_feat + w_block * L_block )  (9)
    L_ae = |Dec(Enc_T(F^T)) - F^T|_1   added in the first tenth of the training

    F^S, F^T  step.student.taps, step.teacher.taps   (N, C, h, w), positions of `positions.py`; F^T detached
    M         random 0/1 of shape (C, h, w), drawn anew for every sample, position and step
    R         0 or 1, drawn once per step and position: 1 is the STUDENT's rest B_S, 0 the TEACHER's B_T.
              The rest is all of the network after the position; its long skip takes the head feature of
              the network that owns it; the gradient goes through the frozen teacher's rest to the student
    weights   pixel 1, logits 1, w_feat 1, w_block 0.1 (table 11)

Ours, where the paper is silent: P(M = 1) = 0.5; each position's L_block is dropped with probability 0.5 but
one always stays; encoders and decoder are two 3x3 convolutions with a ReLU; a 1x1 convolution C_T -> C_S
before the student's rest; L1; weight 1 for L_ae. Half the teacher's width in the latent space keeps the step
near the paper's cost for EDSR c256b32 -> c64b32 at x2 (1.78 logits steps; benchmarks/method_cost.py). L_feat and L_ae are divided by the running RMS of F^T: the raw
features of EDSR and RCAN are on a 0..255 scale, where L_feat is hundreds of times the pixel term and drowns it
(`feature_norm = "none"`: as they are). `mix_mode = "chain"` is the other reading of (6): one path
whose segments between positions belong to either network at random, each passing a mixer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.methods.base import choice, l1, response_terms, zero
from srkd.methods.features import FeatureMethod, make_norms, match_width, rest_of
from srkd.methods.positions import network_of

if TYPE_CHECKING:
    from srkd.networks.base import Network
    from srkd.types import Setting, Step


@dataclass(frozen=True)
class MipkdConfig:
    pixel_weight: float = 1.0
    logits_weight: float = 1.0
    feature_weight: float = 1.0  # 0: block mixer only
    block_weight: float = 0.1  # 0: feature mixer only
    autoencoder_weight: float = 1.0
    autoencoder_share: float = 0.1  # of the training, from its start
    mask: str = choice("random", "grid", "cosine", "cka")
    mask_ratio: float = 0.5  # share of the teacher in the mix
    encoder: str = choice("separate", "shared", "none")
    layers: str = choice("conv", "mlp")
    latent: float = 0.5  # channels of the latent space over the teacher's
    drop: float = 0.5  # probability that a position's L_block is left out of a step
    mix_mode: str = choice("position", "chain")
    feature_norm: str = choice("rms", "none", "auto")
    positions: tuple[str, ...] = ()  # "student:teacher" taps; empty: the usual three


# -- masks: 1 where the teacher's latent is taken ---------------------------------------------------


def random_mask(z: Tensor, ratio: float, random: torch.Generator) -> Tensor:
    """Bernoulli over (C, h, w), per sample: (N, C, h, w) booleans."""
    return torch.empty_like(z, dtype=torch.bool).bernoulli_(ratio, generator=random)


def grid_mask(z: Tensor) -> Tensor:
    """Checkerboard over (h, w), the same for all channels and samples: (1, 1, h, w) booleans."""
    rows = torch.arange(z.shape[2], device=z.device)[:, None]
    columns = torch.arange(z.shape[3], device=z.device)[None]
    return ((rows + columns) % 2 == 1)[None, None]


def least(score: Tensor, ratio: float) -> Tensor:
    """Where the `ratio` smallest values of each row lie: (N, P) -> (N, P) booleans."""
    count = round(ratio * score.shape[1])
    where = score.topk(count, dim=1, largest=False).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, where, True)


def cosine_mask(z_s: Tensor, z_t: Tensor, ratio: float) -> Tensor:
    """The places where the two differ most in direction: (N, 1, h, w) booleans."""
    similar = torch.cosine_similarity(z_s.float(), z_t.float(), dim=1)
    return least(similar.flatten(1), ratio).view_as(similar)[:, None]


def linear_cka(z_s: Tensor, z_t: Tensor) -> Tensor:
    """Linear CKA of every channel over the places: (N, C, h, w) twice -> (N, C) in 0..1.

    For one channel |Y^T X|^2 / (|X^T X| |Y^T Y|) of the centred columns is the squared correlation.
    """
    x, y = (z.float().flatten(2) for z in (z_s, z_t))
    x, y = x - x.mean(2, keepdim=True), y - y.mean(2, keepdim=True)
    joint = (x * y).sum(2).square()
    return joint / (x.square().sum(2) * y.square().sum(2)).clamp(min=1e-12)


def cka_mask(z_s: Tensor, z_t: Tensor, ratio: float) -> Tensor:
    """The channels that are least alike: (N, C, 1, 1) booleans."""
    return least(linear_cka(z_s, z_t), ratio)[:, :, None, None]


# -- mixers -----------------------------------------------------------------------------------------


def two_layers(c_in: int, c_latent: int, c_out: int, kind: str) -> nn.Sequential:
    """conv3x3 - ReLU - conv3x3, or an MLP per place with as many weights (hidden width 9 times)."""
    if kind == "mlp":
        hidden = 9 * c_latent
        return nn.Sequential(nn.Conv2d(c_in, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, c_out, 1))
    return nn.Sequential(
        nn.Conv2d(c_in, c_latent, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(c_latent, c_out, 3, padding=1),
    )


class Mixer(nn.Module):
    """Feature prior mixer of one position, Eq. (3) to (5)."""

    def __init__(self, c_s: int, c_t: int, config: MipkdConfig) -> None:
        super().__init__()
        self.config = config
        c_z = max(1, round(config.latent * c_t))
        kind = config.layers
        if config.encoder == "none":
            self.encode_s, self.encode_t = match_width(c_s, c_t), nn.Identity()
            self.decode: nn.Module = nn.Identity()
        elif config.encoder == "shared":
            shared = two_layers(c_t, c_z, c_z, kind)
            self.encode_s = nn.Sequential(match_width(c_s, c_t), shared)
            self.encode_t = shared
            self.decode = two_layers(c_z, c_z, c_t, kind)
        else:
            self.encode_s = two_layers(c_s, c_z, c_z, kind)
            self.encode_t = two_layers(c_t, c_z, c_z, kind)
            self.decode = two_layers(c_z, c_z, c_t, kind)

    def mask(self, z_s: Tensor, z_t: Tensor, random: torch.Generator) -> Tensor:
        ratio = self.config.mask_ratio
        with torch.no_grad():
            if self.config.mask == "random":
                return random_mask(z_t, ratio, random)
            if self.config.mask == "grid":
                return grid_mask(z_t)
            alike = cosine_mask if self.config.mask == "cosine" else cka_mask
            return alike(z_s.detach(), z_t.detach(), ratio)

    def forward(self, z_s: Tensor, z_t: Tensor, mask: Tensor) -> Tensor:
        """F^E from two latents of one shape."""
        return self.decode(torch.where(mask, z_t, z_s))


class Mipkd(FeatureMethod):
    Config = MipkdConfig

    def __init__(
        self, config: MipkdConfig, student: nn.Module, teachers: tuple[nn.Module, ...]
    ) -> None:
        super().__init__(config, student, teachers)
        _check(config)
        if config.mix_mode == "chain":
            self._check_order(network_of(student), network_of(teachers[0]))
        c_s, c_t, count = self.student_channels, self.teacher_channels, len(self.pairs)
        self.mixers: nn.ModuleList | None = None
        self.widen: nn.ModuleList | None = None
        self.norms: nn.ModuleList | None = None
        self.narrow: nn.ModuleList | None = None
        if config.feature_weight:
            self.mixers = nn.ModuleList(Mixer(c_s, c_t, config) for _ in self.pairs)
            self.norms = make_norms(config.feature_norm, self.cross_family, count)
        elif config.block_weight:
            self.widen = nn.ModuleList(match_width(c_s, c_t) for _ in self.pairs)
        if config.block_weight and self.mixers is not None:
            self.narrow = nn.ModuleList(match_width(c_t, c_s) for _ in self.pairs)

    def _check_order(self, student: Network, teacher: Network) -> None:
        """A path runs forwards: a position before the last one would silently skip its segment."""
        for one, other in pairwise(self.pairs):
            if student.position(one[0]) > student.position(other[0]) or (
                teacher.position(one[1]) > teacher.position(other[1])
            ):
                raise SrkdError(
                    f"position {':'.join(other)} comes after {':'.join(one)} in method.mipkd.positions but "
                    "before it in a network, and mix_mode = 'chain' runs forwards; list them in order."
                )

    def check(self, setting: Setting) -> tuple[str, ...]:
        """Options that were set and that the other options leave without effect are named."""
        super().check(setting)
        c, usual = self.config, MipkdConfig()
        idle = {
            "drop": c.mix_mode == "chain" or not c.block_weight,
            "mask": not c.feature_weight,
            "mask_ratio": c.mask == "grid" or not c.feature_weight,
            "encoder": not c.feature_weight,
            "latent": c.encoder == "none" or not c.feature_weight,
            "layers": c.encoder == "none" or not c.feature_weight,
            "feature_norm": not c.feature_weight,
            "autoencoder_weight": c.encoder == "none" or not c.feature_weight,
            "autoencoder_share": not c.autoencoder_weight or not c.feature_weight,
        }
        return tuple(
            f"method.mipkd.{key} = {getattr(c, key)} has no effect with these options"
            for key, unused in idle.items()
            if unused and getattr(c, key) != getattr(usual, key)
        )

    def loss(self, step: Step) -> dict[str, Tensor]:  # Eq. (9)
        c = self.config
        terms = response_terms(c, step)
        if self.mixers is None:
            if self.widen is not None:
                terms["block"] = c.block_weight * self._blocks(step, None)
            return terms
        mixed, gaps, rebuilt = [], [], []
        warm = step.batch.iteration < c.autoencoder_share * step.batch.total
        for k, ((f_s, f_t), mixer) in enumerate(zip(self.features(step), self.mixers, strict=True)):
            assert isinstance(mixer, Mixer)
            z_t = mixer.encode_t(f_t)
            f_e = self._mix(step, k, mixer, mixer.encode_s(f_s), z_t)
            rms = self.norms[k](f_t) if self.norms is not None else 1.0
            mixed.append(f_e)
            gaps.append(l1(f_e, f_t) / rms)  # Eq. (5)
            if warm and c.autoencoder_weight and c.encoder != "none":
                rebuilt.append(l1(mixer.decode(z_t), f_t) / rms)
        terms["feature"] = c.feature_weight * sum(gaps[1:], gaps[0])
        if c.autoencoder_weight and c.encoder != "none":
            total = sum(rebuilt[1:], rebuilt[0]) if rebuilt else zero(step)
            terms["autoencoder"] = c.autoencoder_weight * total
        if c.block_weight:
            chain = c.mix_mode == "chain"
            block = self._chain(step, mixed) if chain else self._blocks(step, mixed)
            terms["block"] = c.block_weight * block
        return terms

    def _mix(self, step: Step, k: int, mixer: Mixer, z_s: Tensor, z_t: Tensor) -> Tensor:
        random = step.batch.generator(f"mask {k}", device=z_t.device)
        return mixer(z_s, z_t, mixer.mask(z_s, z_t, random))

    def _draws(self, step: Step) -> tuple[list[bool], list[bool]]:
        """Per position: is L_block active, and is the rest the student's (R = 1)? One draw a step."""
        random = step.batch.generator("blocks", whole_step=True)
        count = len(self.pairs)
        active = (torch.rand(count, generator=random) >= self.config.drop).tolist()
        owner = (torch.rand(count, generator=random) < 0.5).tolist()
        if not any(active):
            active[int(torch.randint(count, (), generator=random))] = True
        return active, owner

    def _blocks(self, step: Step, mixed: list[Tensor] | None) -> Tensor:
        """Block prior mixer of every active position, Eq. (6) to (8).

        Without mixers F^E is the student's feature, at the teacher's width before the teacher's rest.
        """
        active, owner = self._draws(step)
        target, gaps = step.teacher.sr.detach(), []
        for k, (s, t) in enumerate(self.pairs):
            if not active[k]:
                continue
            if owner[k]:
                f_s = self.narrow[k](mixed[k]) if mixed and self.narrow else step.student.taps[s]
                sr = rest_of(step.student, f_s, s, step.size)
            else:
                f_t = mixed[k] if mixed else self._widened(step, k, s)
                sr = rest_of(step.teacher, f_t, t, step.size)
            gaps.append(l1(sr, target))
        return sum(gaps[1:], gaps[0])

    def _widened(self, step: Step, k: int, tap: str) -> Tensor:
        assert self.widen is not None
        return self.widen[k](step.student.taps[tap])

    def _chain(self, step: Step, mixed: list[Tensor]) -> Tensor:
        """One path from the first position to the image, whose segments belong to either network.

        What a segment gives takes the place of its network's own feature at the next mixer.
        """
        assert self.mixers is not None
        assert self.narrow is not None
        _, owner = self._draws(step)
        path, features = mixed[0], self.features(step)
        for k, (s, t) in enumerate(self.pairs):
            last = k + 1 == len(self.pairs)
            feature, after, run = (
                (self.narrow[k](path), s, step.student) if owner[k] else (path, t, step.teacher)
            )
            if last:
                return l1(rest_of(run, feature, after, step.size), step.teacher.sr.detach())
            until = self.pairs[k + 1][0 if owner[k] else 1]
            reached = network_of(run.network).between(feature, after, until, run.head)
            mixer = self.mixers[k + 1]
            assert isinstance(mixer, Mixer)
            f_s, f_t = features[k + 1]
            z_s = mixer.encode_s(reached if owner[k] else f_s)
            z_t = mixer.encode_t(f_t if owner[k] else reached)
            path = self._mix(step, k + 1, mixer, z_s, z_t)
        raise AssertionError("unreachable: a chain has a last position")


def _check(c: MipkdConfig) -> None:
    for key, value in (
        ("mask_ratio", c.mask_ratio),
        ("drop", c.drop),
        ("autoencoder_share", c.autoencoder_share),
    ):
        if value > 1:
            raise SrkdError(f"method.mipkd.{key} = {value}, but a share lies in 0..1.")
    if c.latent <= 0:
        raise SrkdError(f"method.mipkd.latent = {c.latent}, but it must be above 0.")
    if c.mix_mode == "chain" and not (c.feature_weight and c.block_weight):
        raise SrkdError(
            "method.mipkd.mix_mode = 'chain' runs through the mixers, so it needs feature_weight and "
            "block_weight above 0."
        )
