"""How other frameworks name the modules of our networks.

Layouts are data (`LAYOUTS`): paths of a file against paths of ours. To read one more, add its row,
and for a new family its line in `srkd.networks.sizes`.

Checked against: sanghyun-son/EDSR-PyTorch, yulunzhang/RCAN, daitao/SAN @ 67df6d9f,
wwlCape/HAN @ 26ac0152, JingyunLiang/SwinIR @ 6545850f, XPixelGroup/BasicSR @ 8d56e3a0,
xiaom233/BSRN @ 355aa84f, bytedance/RLFN @ 79700af4, Zheng-MJ/SMFANet @ b3ac0712.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

State = dict[str, "Tensor"]


@dataclass(frozen=True)
class Layout:
    """How one framework names the modules of one network.

    `keys` maps paths in the file to paths of ours, of modules or of single tensors. A placeholder is one
    number: `{i}`, `{g}`, `{b}`, `{j}`, `{u}` stand for the same number on both sides; `{k}` counts from 1
    in the file and from 0 in ours; `{n}`, on our side, is the number of units before the body convolution;
    `{blocks}`, on the file's side, any number that ours does without.
    `marks` are keys of ours or of the file, also with placeholders, that tell the layout.
    `units` is the path of such a unit, `constants` are keys that hold no weights, and `unused` are weights
    that the official network has and never calls; both are dropped. `rgb_range` None: either range occurs.
    """

    name: str
    family: str
    marks: tuple[str, ...]
    keys: Mapping[str, str] = field(default_factory=dict)
    units: str = ""
    constants: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    rgb_range: float | None = 255.0
    mean_shift: bool = True

    def fits(self, state: State) -> bool:
        """Whether all marks are among the keys."""
        return all(any(pattern(mark).fullmatch(key) for key in state) for mark in self.marks)

    def drops(self, key: str) -> bool:
        """Whether the file's key has no place in ours, on purpose."""
        return any(pattern(t).fullmatch(key) for t in (*self.constants, *self.unused))


# Frozen convolutions that subtract and add the mean; constants, not weights.
MEAN_SHIFT_KEYS = ("sub_mean.weight", "sub_mean.bias", "add_mean.weight", "add_mean.bias")
_OFFICIAL_ENDS = {
    "head.0": "head.conv",
    "body.{i}": "groups.{i}",
    "tail.0.{u}": "tail.upsample.{u}",
    "tail.1": "tail.last",
}
_BASICSR_ENDS = {
    "conv_first": "head.conv",
    "conv_after_body": "groups.{n}",
    "upsample.{u}": "tail.upsample.{u}",
    "conv_last": "tail.last",
}
_EDSR_BLOCKS = {
    "body.{i}.body.0": "groups.{i}.conv1",
    "body.{i}.body.2": "groups.{i}.conv2",
}
_SWINIR_LAYER = "layers.{i}.residual_group.blocks.{j}"
_SWINIR = {
    "conv_first": "head.conv",
    "patch_embed.norm": "groups.0.norm",
    **{
        f"{_SWINIR_LAYER}.{part}": f"groups.{{i}}.layers.{{j}}.{part}"
        for part in ("norm1", "norm2", "attn", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    },
    "layers.{i}.conv": "groups.{i}.conv",
    "norm": "groups.{n}.norm",
    "conv_after_body": "groups.{n}.conv",
}
_SWINIR_MARK = "layers.0.residual_group.blocks.0.attn.qkv.weight"
_SWINIR_CONSTANTS = (
    f"{_SWINIR_LAYER}.attn_mask",  # for the image size of training; recomputed for any size
    f"{_SWINIR_LAYER}.attn.relative_position_index",
)


def _separable(theirs: str, ours: str) -> dict[str, str]:
    """Both parts of a blueprint separable convolution."""
    return {f"{theirs}.pw": f"{ours}.pointwise", f"{theirs}.dw": f"{ours}.depthwise"}


_BSRN_BLOCKS = {
    **{f"B{{k}}.c{i + 1}_d": f"groups.{{k}}.distil.{i}" for i in range(3)},
    "B{k}.c5": "groups.{k}.fuse",
    "B{k}.esa.conv1": "groups.{k}.esa.squeeze",
    "B{k}.esa.conv_f": "groups.{k}.esa.keep",
    "B{k}.esa.conv4": "groups.{k}.esa.excite",
    "B{k}.cca.conv_du.0": "groups.{k}.cca.squeeze",
    "B{k}.cca.conv_du.2": "groups.{k}.cca.excite",
}
for _theirs, _ours in (
    ("c1_r", "refine.0"),
    ("c2_r", "refine.1"),
    ("c3_r", "refine.2"),
    ("c4", "last"),
    ("esa.conv2", "esa.down"),
    ("esa.conv_max", "esa.conv1"),
    ("esa.conv3", "esa.conv2"),
    ("esa.conv3_", "esa.conv3"),
):
    _BSRN_BLOCKS |= _separable(f"B{{k}}.{_theirs}", f"groups.{{k}}.{_ours}")

_RCAN_OFFICIAL = {
    **_OFFICIAL_ENDS,
    "body.{g}.body.{b}.body.0": "groups.{g}.blocks.{b}.conv1",
    "body.{g}.body.{b}.body.2": "groups.{g}.blocks.{b}.conv2",
    "body.{g}.body.{b}.body.3.conv_du.0": "groups.{g}.blocks.{b}.attention.squeeze",
    "body.{g}.body.{b}.body.3.conv_du.2": "groups.{g}.blocks.{b}.attention.excite",
    "body.{g}.body.{blocks}": "groups.{g}.conv",
}
_SAN_UNUSED = (
    "RG.{g}.gamma",
    *(f"conv_last.{leaf}" for leaf in ("weight", "bias")),
    *(f"non_local.soca.conv_du.{{i}}.{leaf}" for leaf in ("weight", "bias")),
)

# In this order: the first row whose marks are all in the file.
LAYOUTS: tuple[Layout, ...] = (
    # Before EDSR's, whose marks it has too.
    Layout("srkd", "rlfn", ("head.conv.weight", "groups.0.esa.conv.weight"), mean_shift=False),
    Layout("srkd", "edsr", ("head.conv.weight", "groups.0.conv1.weight")),
    # Before RCAN's, whose groups it has.
    Layout("srkd", "han", ("head.conv.weight", "groups.{n}.layer_gamma")),
    Layout(
        "srkd", "rdn", ("head.conv.weight", "groups.0.enter.weight"), rgb_range=1, mean_shift=False
    ),
    Layout("srkd", "san", ("head.conv.weight", "gamma")),
    Layout("srkd", "rcan", ("head.conv.weight", "groups.0.blocks.0.conv1.weight")),
    Layout(
        "srkd", "swinir", ("head.conv.weight", "groups.0.layers.0.attn.qkv.weight"), rgb_range=1
    ),
    Layout(
        "srkd",
        "bsrn",
        ("head.conv.pointwise.weight", "groups.0.distil.0.weight"),
        rgb_range=1,
        mean_shift=False,
    ),
    Layout(
        "srkd",
        "smfanet",
        ("head.conv.weight", "groups.0.smfa.alpha"),
        rgb_range=1,
        mean_shift=False,
    ),
    Layout(
        "RDN of EDSR-PyTorch",
        "rdn",
        ("SFENet1.weight", "RDBs.0.LFF.weight"),
        {
            "SFENet1": "head.conv",
            "SFENet2": "groups.0.enter",
            "RDBs.{i}.convs.{j}.conv.0": "groups.{i}.layers.{j}",
            "RDBs.{i}.LFF": "groups.{i}.fuse",
            "GFF.0": "groups.{n}.mix",
            "GFF.1": "groups.{n}.conv",
            "UPNet.{u}": "tail.upsample.{u}",
        },
        units="RDBs.{i}",
        rgb_range=None,
        mean_shift=False,
    ),
    # Both before RCAN's and EDSR's, whose marks they may have too.
    Layout(
        "SAN official",
        "san",
        ("head.0.weight", "non_local.non_local.theta.weight"),
        {
            "head.0": "head.conv",
            "non_local.non_local.theta": "groups.{n}.theta",
            "non_local.non_local.phi": "groups.{n}.phi",
            "non_local.non_local.g": "groups.{n}.g",
            "non_local.non_local.W": "groups.{n}.out",
            "gamma": "gamma",
            "RG.{g}.rcab.{b}.conv_first.0": "groups.{g}.blocks.{b}.conv1",
            "RG.{g}.rcab.{b}.conv_first.2": "groups.{g}.blocks.{b}.conv2",
            "RG.{g}.soca.conv_du.0": "groups.{g}.attention.squeeze",
            "RG.{g}.soca.conv_du.2": "groups.{g}.attention.excite",
            "RG.{g}.conv_last": "groups.{g}.conv",
            "tail.0.{u}": "tail.upsample.{u}",
            "tail.1": "tail.last",
        },
        units="RG.{g}",
        constants=MEAN_SHIFT_KEYS,
        unused=_SAN_UNUSED,
    ),
    Layout(
        "HAN official",
        "han",
        ("head.0.weight", "la.gamma"),
        {
            **_RCAN_OFFICIAL,
            "body.{i}": "groups.{i}.conv",
            "la.gamma": "groups.{n}.layer_gamma",
            "last_conv": "groups.{n}.layer_conv",
            "csa.conv": "groups.{n}.channel_conv",
            "csa.gamma": "groups.{n}.channel_gamma",
            "last": "groups.{n}.merge",
        },
        units="body.{g}.body",
        constants=MEAN_SHIFT_KEYS,
    ),
    Layout(
        "RCAN official",
        "rcan",
        ("head.0.weight", "body.0.body.0.body.3.conv_du.0.weight"),
        _RCAN_OFFICIAL,
        constants=MEAN_SHIFT_KEYS,
    ),
    Layout(
        "MLPerf Mobile",
        "edsr",
        ("head.0.weight", "body.0.body.0.weight", "tail.0.weight"),
        {
            "head.0": "head.conv",
            **_EDSR_BLOCKS,
            "body.{i}": "groups.{i}",
            "tail.0": "tail.conv",
        },
        constants=MEAN_SHIFT_KEYS,
    ),
    Layout(
        "EDSR-PyTorch",
        "edsr",
        ("head.0.weight", "body.0.body.0.weight", "tail.1.weight"),
        {**_OFFICIAL_ENDS, **_EDSR_BLOCKS},
        constants=MEAN_SHIFT_KEYS,
    ),
    Layout(
        "BasicSR RCAN",
        "rcan",
        ("conv_first.weight", "body.0.residual_group.0.rcab.0.weight"),
        {
            **_BASICSR_ENDS,
            "body.{g}.residual_group.{b}.rcab.0": "groups.{g}.blocks.{b}.conv1",
            "body.{g}.residual_group.{b}.rcab.2": "groups.{g}.blocks.{b}.conv2",
            "body.{g}.residual_group.{b}.rcab.3.attention.1": "groups.{g}.blocks.{b}.attention.squeeze",
            "body.{g}.residual_group.{b}.rcab.3.attention.3": "groups.{g}.blocks.{b}.attention.excite",
            "body.{g}.conv": "groups.{g}.conv",
        },
        units="body.{g}",
    ),
    Layout(
        "BasicSR EDSR",
        "edsr",
        ("conv_first.weight", "body.0.conv1.weight", "conv_after_body.weight"),
        {
            **_BASICSR_ENDS,
            "body.{i}.conv1": "groups.{i}.conv1",
            "body.{i}.conv2": "groups.{i}.conv2",
        },
        units="body.{i}",
    ),
    Layout(
        "SwinIR classical",
        "swinir",
        (_SWINIR_MARK, "conv_before_upsample.0.weight"),
        {
            **_SWINIR,
            "conv_before_upsample.0": "tail.before",
            "upsample.{u}": "tail.upsample.{u}",
            "conv_last": "tail.last",
        },
        units="layers.{i}",
        constants=_SWINIR_CONSTANTS,
        rgb_range=1.0,
    ),
    Layout(
        "SwinIR one-step",
        "swinir",
        (_SWINIR_MARK, "upsample.0.weight"),
        {**_SWINIR, "upsample.0": "tail.conv"},
        units="layers.{i}",
        constants=_SWINIR_CONSTANTS,
        rgb_range=1.0,
    ),
    Layout(
        "BSRN official",
        "bsrn",
        ("fea_conv.pw.weight", "B1.c1_d.weight"),
        {
            **_separable("fea_conv", "head.conv"),
            **_BSRN_BLOCKS,
            "c1": "groups.{n}.mix",
            **_separable("c2", "groups.{n}.conv"),
            "upsampler.upsampleOneStep.0": "tail.conv",
        },
        units="B{k}",
        rgb_range=1.0,
        mean_shift=False,
    ),
    Layout(
        "RLFN official",
        "rlfn",
        ("conv_1.weight", "block_1.esa.conv1.weight"),
        {
            "conv_1": "head.conv",
            **{f"block_{{k}}.c{i}_r": f"groups.{{k}}.conv{i}" for i in (1, 2, 3)},
            "block_{k}.c5": "groups.{k}.mix",
            "block_{k}.esa.conv1": "groups.{k}.esa.squeeze",
            "block_{k}.esa.conv_f": "groups.{k}.esa.keep",
            "block_{k}.esa.conv2": "groups.{k}.esa.down",
            "block_{k}.esa.conv3": "groups.{k}.esa.conv",
            "block_{k}.esa.conv4": "groups.{k}.esa.excite",
            "conv_2": "groups.{n}",
            "upsampler.0": "tail.conv",
        },
        units="block_{k}",
        mean_shift=False,
    ),
    Layout(
        "SMFANet official",
        "smfanet",
        ("to_feat.weight", "feats.0.smfa.alpha"),
        {
            "to_feat": "head.conv",
            "feats.{i}.smfa.alpha": "groups.{i}.smfa.alpha",
            "feats.{i}.smfa.belt": "groups.{i}.smfa.beta",
            "feats.{i}.smfa.linear_0": "groups.{i}.smfa.split",
            "feats.{i}.smfa.linear_1": "groups.{i}.smfa.modulate",
            "feats.{i}.smfa.linear_2": "groups.{i}.smfa.merge",
            "feats.{i}.smfa.dw_conv": "groups.{i}.smfa.depthwise",
            "feats.{i}.smfa.lde.conv_0.0": "groups.{i}.smfa.local.depthwise",
            "feats.{i}.smfa.lde.conv_0.1": "groups.{i}.smfa.local.pointwise",
            "feats.{i}.smfa.lde.conv_1": "groups.{i}.smfa.local.project",
            "feats.{i}.pcfn.conv_0": "groups.{i}.pcfn.widen",
            "feats.{i}.pcfn.conv_1": "groups.{i}.pcfn.conv",
            "feats.{i}.pcfn.conv_2": "groups.{i}.pcfn.narrow",
            "to_img.0": "tail.conv",
        },
        rgb_range=1.0,
        mean_shift=False,
    ),
)


@cache
def pattern(template: str) -> re.Pattern[str]:
    """`body.{i}.conv1` as a regular expression with a named group per placeholder."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template)))


def _numbers(match: re.Match[str]) -> dict[str, int]:
    """Numbers of the placeholders as ours have them."""
    return {name: int(text) - (name == "k") for name, text in match.groupdict().items()}


def translate(layout: Layout, state: State) -> tuple[State, list[str]]:
    """Tensors under keys of ours, and the keys that the layout does not know. Constants and unused
    weights are dropped."""
    if not layout.keys:
        return state, []
    unit = pattern(layout.units)
    units = [max(_numbers(m).values()) for m in map(unit.match, state) if m and layout.units]
    ours: State = {}
    leftovers: list[str] = []
    for key, value in state.items():
        if layout.drops(key):
            continue
        module, _, leaf = key.rpartition(".")
        found = [
            (m, mine if m.string == key else f"{mine}.{leaf}")
            for t, mine in layout.keys.items()
            if (m := pattern(t).fullmatch(module) or pattern(t).fullmatch(key))
        ]
        targets = [mine.format(n=max(units, default=-1) + 1, **_numbers(m)) for m, mine in found]
        target = targets[0] if targets else None
        if target is None or target in ours:
            leftovers.append(key)
        else:
            ours[target] = value
    return ours, leftovers
