"""The sizes of our networks, from tensors under keys of ours.

To tell those of a new family, add its line in `SIZES`, and in `UNWRITTEN` what tensors cannot tell.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from srkd.networks.layouts import State, pattern

if TYPE_CHECKING:
    from collections.abc import Callable


def _count(state: State, template: str) -> int:
    """How many different first numbers occur among keys that match."""
    return len({m[1] for m in (pattern(template).fullmatch(key) for key in state) if m})


def _channels(state: State) -> int:
    channels, colours = state["head.conv.weight"].shape[:2]
    if colours != 3:
        raise ValueError(f"the first convolution takes {colours} channels, not RGB")
    return channels


def _root(area: float) -> int:
    side = round(math.sqrt(area))
    if side**2 != area or side < 1:
        raise ValueError(f"{area:g} outputs per pixel are no pixel shuffle")
    return side


def _scale(state: State) -> int:
    """Product of the shuffles of the tail."""
    if "tail.conv.weight" in state:
        return _root(state["tail.conv.weight"].shape[0] / 3)
    stages = [v for k, v in state.items() if pattern("tail.upsample.{u}.weight").fullmatch(k)]
    if not stages:
        raise ValueError("the upsampling tail is missing")
    return math.prod(_root(v.shape[0] / v.shape[1]) for v in stages)


def _edsr_sizes(state: State) -> dict[str, Any]:
    return {
        "scale": _scale(state),
        "channels": _channels(state),
        "blocks": _count(state, "groups.{i}.conv1.weight"),
        "tail": "one_step" if "tail.conv.weight" in state else "staged",
    }


def _grouped_sizes(state: State) -> dict[str, Any]:
    """Of RCAN, HAN and SAN, whose groups hold blocks; SAN has one attention per group, not per block."""
    per_group = "groups.0.attention.squeeze.weight"
    per_block = "groups.0.blocks.0.attention.squeeze.weight"
    squeeze = state[per_group if per_group in state else per_block]
    return {
        "scale": _scale(state),
        "channels": _channels(state),
        "blocks": len({k.split(".")[3] for k in state if k.startswith("groups.0.blocks.")}),
        "group_count": _count(state, "groups.{g}.blocks.0.conv1.weight"),
        "reduction": squeeze.shape[1] // squeeze.shape[0],
    }


def _rdn_sizes(state: State) -> dict[str, Any]:
    growth = state["groups.0.layers.0.weight"].shape[0]
    stages = [v for k, v in state.items() if pattern("tail.upsample.{u}.weight").fullmatch(k)]
    return {
        # All stages but the last convolution, which gives three colours.
        "scale": math.prod(_root(v.shape[0] / growth) for v in stages if v.shape[0] > 3),
        "channels": _channels(state),
        "blocks": _count(state, "groups.{i}.fuse.weight"),
        "layers": len({k.split(".")[3] for k in state if k.startswith("groups.0.layers.")}),
        "growth": growth,
    }


def _swinir_sizes(state: State) -> dict[str, Any]:
    groups = _count(state, "groups.{i}.layers.0.norm1.weight")
    depths = (
        len({k.split(".")[3] for k in state if k.startswith(f"groups.{i}.layers.")})
        for i in range(groups)
    )
    layer = "groups.0.layers.0"
    rows, heads = state[f"{layer}.attn.relative_position_bias_table"].shape
    hidden, channels = state[f"{layer}.mlp.fc1.weight"].shape
    return {
        "scale": _scale(state),
        "channels": _channels(state),
        "depths": tuple(depths),
        "heads": heads,
        "window": (_root(rows) + 1) // 2,
        "mlp_ratio": hidden / channels,
        "tail": "one_step" if "tail.conv.weight" in state else "classical",
    }


def _bsrn_sizes(state: State) -> dict[str, Any]:
    return {
        "scale": _scale(state),
        "channels": state["head.conv.pointwise.weight"].shape[0],
        "blocks": _count(state, "groups.{i}.fuse.weight"),
    }


def _rlfn_sizes(state: State) -> dict[str, Any]:
    return {
        "scale": _scale(state),
        "channels": _channels(state),
        "mid_channels": state["groups.0.conv1.weight"].shape[0],
        "blocks": _count(state, "groups.{i}.mix.weight"),
        "esa_channels": state["groups.0.esa.squeeze.weight"].shape[0],
    }


def _smfanet_sizes(state: State) -> dict[str, Any]:
    channels = _channels(state)
    return {
        "scale": _scale(state),
        "channels": channels,
        "blocks": _count(state, "groups.{i}.smfa.alpha"),
        "growth": state["groups.0.pcfn.widen.weight"].shape[0] / channels,
    }


SIZES: dict[str, Callable[[State], dict[str, Any]]] = {
    "edsr": _edsr_sizes,
    "rcan": _grouped_sizes,
    "rdn": _rdn_sizes,
    "san": _grouped_sizes,
    "han": _grouped_sizes,
    "swinir": _swinir_sizes,
    "bsrn": _bsrn_sizes,
    "rlfn": _rlfn_sizes,
    "smfanet": _smfanet_sizes,
}

# Arguments of a family that sizes do not tell.
UNWRITTEN: dict[str, tuple[str, ...]] = {
    "edsr": ("residual_scale", "rgb_range", "mean_shift"),
    "rcan": ("rgb_range",),
    "rdn": ("rgb_range",),
    "san": ("rgb_range",),
    "han": ("rgb_range",),
    "swinir": (),
    "bsrn": (),
    "rlfn": ("rgb_range",),
    "smfanet": (),
}
