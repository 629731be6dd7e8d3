"""MTKD: several teachers are aggregated into a better one, which the student copies in the wavelet domain.

Paper: Jiang, Feng, Zhang, Bull, "MTKD: Multi-Teacher Knowledge Distillation for Image Super-Resolution",
ECCV 2024, arXiv 2404.09571.      Checked against: YuxuanJJ/MTKD.

Stage 1 (`Aggregation`) trains the aggregation network A (srkd/networks/dctswin.py) on the images of the teachers:

    L_KA  = |A(T_1(x), ..., T_n(x)) - y|_1                                            pixel     (1)

Stage 2 (`Mtkd`) trains the student; A is frozen, and A of the teachers is the only teacher of the step:

    L_stu = |S(x) - y|_1                                                                        (2)
    L_dis = 1/(3K+1) (|LL_K(d)|_1 + sum_{k=1..K} sum_{b=LH,HL,HH} |b_k(d)|_1)         wavelet   (3)
    L     = alpha L_stu + L_dis                                                       pixel     (4)

    x, y   step.lr, step.hr                        (N, 3, h, w), (N, 3, s*h, s*w)
    d      S(x) - A(x) = step.student.sr - step.teacher.sr; no gradient reaches A
    LL_k, LH_k, HL_k, HH_k   orthonormal Haar bands of level k, per channel, zeros outside (srkd/wavelet.py)
    |.|_1  mean over the elements of that band: a coarse band weighs as much as a fine one
    alpha  config.pixel_weight 0.1, on the term of the ground truth (4); K  config.levels 1

Of the ablation (its v5 to v7, of which the paper prints names only), in place of (3):

    |d|_1                                                                             l1        (5)
    |D_H d D_W^T|_1, D the orthonormal DCT-II over the whole patch                    dct       (6)
    1/(3K) sum_{k=1..K} sum_{b=LH,HL,HH} |b_k(d)|_1                                   high      (7)

The transforms are linear, so the difference of the images is transformed, once, in place of both images.

Departs from the paper: its double sum of (3) names LL at every level, which 3K+1 does not count; LL is
taken at level K alone (the same at K = 1). Its text gives no wavelet; Haar is the code's.

`preset = "released"` takes the wider network of the public configuration files and their plain L1 (5). Their
wavelet loss is left out: its LL term reads one image of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.methods.base import Method, choice, l1, network_scale
from srkd.networks.dctswin import DctSwinConfig, dct_matrix
from srkd.wavelet import largest_level, wavedec2, wavelet_filters

if TYPE_CHECKING:
    from srkd.types import Batch, Pass, Setting, Step


@dataclass(frozen=True)
class MtkdConfig:
    preset: str = choice("paper", "released")
    pixel_weight: float = 0.1  # alpha
    distance: str = choice("wavelet", "l1", "dct", "high")
    wavelet: str = "haar"  # any orthogonal one of PyWavelets
    levels: int = 1  # K
    # The aggregation network of stage 1.
    channels: int = 24
    blocks: int = 4
    layers: int = 2  # of each block
    heads: int = 6
    window: int = 8
    mlp_ratio: float = 2.0
    drop_path: float = 0.1
    layer: str = choice("dct", "swin", "mixer")  # swin, mixer: the ablation's v4, v3
    tail: str = choice("one_step", "classical")
    image_skip: str = choice("none", "mean")

    @staticmethod
    def preset_values(preset: str, family: str, scale: int) -> dict[str, Any]:
        """What the public configuration files set; they are the same for every family and scale."""
        if preset != "released":
            return {}
        return {"channels": 96, "blocks": 2, "layers": 4, "tail": "classical", "distance": "l1"}

    def __post_init__(self) -> None:
        """Refuse what cannot work as soon as the recipe is read: stage 2 begins when stage 1 is done."""
        for key in ("levels", "channels", "blocks", "layers", "heads", "window"):
            if getattr(self, key) < 1:
                raise SrkdError(
                    f"method.mtkd.{key} = {getattr(self, key)}, but at least 1 is needed."
                )
        if self.channels % self.heads:
            raise SrkdError(
                f"method.mtkd.channels = {self.channels} cannot be split over {self.heads} attention heads; "
                "choose a multiple of method.mtkd.heads."
            )
        if self.mlp_ratio <= 0:
            raise SrkdError(
                f"method.mtkd.mlp_ratio = {self.mlp_ratio}, but a number above 0 is needed."
            )
        if not 0 <= self.drop_path < 1:
            raise SrkdError(
                f"method.mtkd.drop_path = {self.drop_path}, but it is the probability of leaving a layer out, "
                "from 0 to below 1."
            )
        wavelet_filters(self.wavelet)


def network_config(config: MtkdConfig, teachers: int, scale: int) -> DctSwinConfig:
    """The aggregation network A for this many teachers at their scale."""
    c = config
    return DctSwinConfig(
        teachers=teachers,
        scale=scale,
        channels=c.channels,
        depths=(c.layers,) * c.blocks,
        heads=c.heads,
        window=c.window,
        mlp_ratio=c.mlp_ratio,
        drop_path=c.drop_path,
        layer=c.layer,
        tail=c.tail,
        image_skip=c.image_skip,
    )


def wavelet_distance(
    sr: Tensor, target: Tensor, filters: Tensor, levels: int, high_only: bool = False
) -> Tensor:  # Eq. (3); Eq. (7) with high_only
    """Average over the 3K+1 (3K) bands of each band's mean absolute difference; images (N, C, H, W)."""
    low, details = wavedec2(sr.float() - target.float(), filters, levels)
    bands = [band for level in details for band in level] + ([] if high_only else [low])
    return torch.stack([band.abs().mean() for band in bands]).mean()


def dct_distance(sr: Tensor, target: Tensor) -> Tensor:  # Eq. (6)
    """Mean absolute difference of the coefficients of the whole images (N, C, H, W), per channel."""
    gap = sr.float() - target.float()
    rows, columns = (_matrix_on(size, gap.device) for size in gap.shape[-2:])
    with torch.autocast(gap.device.type, enabled=False):
        return (rows @ gap @ columns.T).abs().mean()


@lru_cache(maxsize=8)  # a training has one crop size, that is one or two matrices
def _matrix_on(size: int, device: torch.device) -> Tensor:
    # A matrix born in inference mode could never serve a backward pass later.
    with torch.inference_mode(False):
        return dct_matrix(size).to(device)


class Aggregation(Method):
    """Stage 1: the trained network is A, and its input the images of the teachers."""

    Config = MtkdConfig

    def student_input(self, batch: Batch, teachers: tuple[Pass, ...]) -> Tensor:
        """(N, 3n, H, W): the teachers' images in the order in which they were given."""
        return torch.cat([teacher.sr for teacher in teachers], dim=1)

    def loss(self, step: Step) -> dict[str, Tensor]:  # Eq. (1)
        return {"pixel": l1(step.student.sr, step.hr)}


class Mtkd(Method):
    """Stage 2: the student copies A."""

    Config = MtkdConfig
    filters: Tensor

    def __init__(
        self, config: MtkdConfig, student: nn.Module, teachers: tuple[nn.Module, ...]
    ) -> None:
        super().__init__(config, student, teachers)
        self.scale = network_scale(student)
        # The recipe names the wavelet: nothing to save for resuming.
        filters = wavelet_filters(config.wavelet).float()
        self.register_buffer("filters", filters, persistent=False)

    def check(self, setting: Setting) -> tuple[str, ...]:
        c, crop = self.config, self.scale * setting.patch_px
        most = largest_level(crop, self.filters.shape[1])
        if c.distance in ("wavelet", "high") and c.levels > most:
            fix = (
                f"set method.mtkd.levels to {most} or less, "
                if most
                else "choose a shorter wavelet "
            )
            raise SrkdError(
                f"method.mtkd.levels = {c.levels}, but an HR crop of {crop} px has {most} levels of '{c.wavelet}'; "
                f"{fix}or raise data.patch."
            )
        return ()

    def loss(self, step: Step) -> dict[str, Tensor]:  # Eq. (4)
        c, sr = self.config, step.student.sr
        return {
            "pixel": c.pixel_weight * l1(sr, step.hr),  # Eq. (2)
            c.distance: self._distance(sr, step.teacher.sr.detach()),
        }

    def _distance(self, sr: Tensor, target: Tensor) -> Tensor:
        c = self.config
        if c.distance == "l1":
            return l1(sr, target)  # Eq. (5)
        if c.distance == "dct":
            return dct_distance(sr, target)
        return wavelet_distance(sr, target, self.filters, c.levels, c.distance == "high")
