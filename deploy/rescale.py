"""Exact re-centring of a network's range, so that half precision holds what it computes.

    features' = features / k,   sr' = sr                     k a power of two

Dividing by a power of two changes the exponent of a float and no bit of its mantissa, and so does every sum,
product, maximum and root of values that are all divided alike: the rescaled network gives the same float32
output, bit for bit (edge E0). Two kinds of network allow it:

    homogeneous     f(x/k) = f(x)/k for convolution (with its bias divided by k), ReLU, leaky ReLU, maximum,
                    bilinear interpolation and pixel shuffle. The range that the network takes images to
                    (0..255) is divided by k, and weights before a sigmoid, which sees what it saw, are
                    multiplied by k.
    normalised      every branch begins with a norm, which takes the scale away if its eps is divided by k^2
                    (Swin layers), or with a division by the pixel's length. What branches add to the residual
                    stream is divided by k.

Where the image can be divided no weight is: small weights lose bits in half precision. Exactness ends at the
subnormal floats: a value that falls below 1.2e-38 loses bits, and E0 says so where that shows in the output.

Prior art outside super-resolution: lc0 #1921 (a power of two before layer norm), vLLM #13232 (DeepSeek-V2).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deploy.difference import difference, worst_of
from deploy.float16 import HALF_MAX
from deploy.ranges import BlockRange, audit
from deploy.verdict import EdgeResult, Gate, judge
from srkd.errors import SrkdError
from srkd.networks.base import MeanShift
from srkd.networks.rcan import ChannelAttention
from srkd.networks.rlfn import SpatialAttention
from srkd.networks.smfanet import ModulationBlock
from srkd.networks.swinir import Body, Rstb, SwinLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from deploy.engines import Engine
    from deploy.inputs import Input
    from srkd.networks.smfanet import Smfanet

# No stored value should exceed it, 511.75. Pictures of a user reach further than those of an audit, kernels
# may add up in half precision, where a partial sum exceeds the sum, and AutoCast (NVIDIA ModelOpt) keeps
# nodes with outputs above 512 in fp32 by default.
ALLOWED = HALF_MAX / 128
# No block's largest value should fall below it. There a half has steps of 2^-20, and the steps of the
# subnormal numbers, 2^-24, are still a sixteenth of them: what is rounded below costs nothing beside it.
FLOOR = 2.0**-10


@dataclass(frozen=True)
class Recentred:
    """A copy of a network divided by `k`, why that `k`, and the ranges of both."""

    network: nn.Module
    k: int
    reason: str
    before: tuple[BlockRange, ...]
    after: tuple[BlockRange, ...]


# --- rules ----------------------------------------------------------------------------------------


def _divide_homogeneous(network: nn.Module, k: int, gates: Sequence[nn.Conv2d] = ()) -> None:
    """EDSR and RDN as they are. `gates` are the convolutions before a sigmoid, whose result must not change."""
    _divide_range(network, k)
    for conv in _all(network, nn.Conv2d):
        if conv in gates:
            conv.weight.mul_(k)
        else:
            _bias(conv).div_(k)


def _divide_range(network: nn.Module, k: int) -> None:
    """Of the image, at the input and at the output."""
    for shift in _all(network, MeanShift):
        shift.rgb_range /= k


def _rcan(network: nn.Module, k: int) -> None:
    _divide_homogeneous(network, k, [m.excite for m in _all(network, ChannelAttention)])


def _rlfn(network: nn.Module, k: int) -> None:
    _divide_homogeneous(network, k, [m.excite for m in _all(network, SpatialAttention)])


def _smfanet(network: Smfanet, k: int) -> None:
    """Pixels enter every branch divided by their length; head and tail are homogeneous."""
    _divide_range(network, k)
    for part in (network.head, network.tail):
        for conv in _all(part, nn.Conv2d):
            _bias(conv).div_(k)
    for block in _all(network, ModulationBlock):
        _divide(block.smfa.merge, k)
        _divide(block.pcfn.narrow, k)


def _swinir(network: nn.Module, k: int) -> None:
    """The stream runs from the first group's norm to the body's; head, body convolution and tail stay."""
    for group in _all(network, Rstb):
        if group.norm is not None:
            _divide(group.norm, k)
        _bias(group.conv).div_(k)
    for layer in _all(network, SwinLayer):
        layer.norm1.eps /= k**2
        layer.norm2.eps /= k**2
        _divide(layer.attn.proj, k)
        _divide(layer.mlp.fc2, k)
    for body in _all(network, Body):
        body.norm.eps /= k**2


# family -> how a network of it is divided by k, in place
RESCALERS: dict[str, Callable[[Any, int], None]] = {
    "edsr": _divide_homogeneous,
    "rcan": _rcan,
    "rdn": _divide_homogeneous,
    "rlfn": _rlfn,
    "smfanet": _smfanet,
    "swinir": _swinir,
}
WHY_NOT = {
    "san": "its second-order attention compares the trace of a covariance with a fixed floor (1e-12), "
    "which does not shrink with the features",
    "han": "its layer attention takes a softmax of products of the features with each other, and no weight "
    "stands between the two that could undo k",
    "bsrn": "its blocks apply GELU to the residual stream itself, and gelu(x/k) is not gelu(x)/k",
}


def _divide(layer: nn.Conv2d | nn.Linear | nn.LayerNorm, k: int) -> None:
    layer.weight.div_(k)
    _bias(layer).div_(k)


def _bias(layer: nn.Conv2d | nn.Linear | nn.LayerNorm) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _all(network: nn.Module, kind: type[Any]) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, kind)]


# --- the copy and its k ---------------------------------------------------------------------------


def rescaled(network: nn.Module, k: int) -> nn.Module:
    """A copy with features divided by `k` and the same output, bit for bit; k = 1 copies any network.

    It is made to be exported: `arguments` are those of the original, weights are not what training left.
    """
    if k < 1 or k & (k - 1):
        raise SrkdError(
            f"k = {k} is no power of two, and only those divide without rounding; give 1, 2, 4, .."
        )
    network = copy.deepcopy(network)
    if k > 1:
        if (reason := _why_not(network)) is not None:
            raise SrkdError(f"{reason}; export it as it is (k = 1).")
        with torch.no_grad():
            RESCALERS[_family(network)](network, k)
    return network


def _family(network: nn.Module) -> str:
    return str(getattr(network, "family", type(network).__name__))


def _why_not(network: nn.Module) -> str | None:
    family = _family(network)
    if family in RESCALERS:
        return None
    why = WHY_NOT.get(family, "it is not known which of its operators scale with its features")
    return f"a network of family '{family}' cannot be rescaled exactly: {why}"


def choose_k(ranges: Sequence[BlockRange]) -> int:
    """The smallest power of two that brings every block within `ALLOWED`, and none below `FLOOR`.

    1 when all are within. Where both cannot be, the floor wins; the audit afterwards shows what is left.
    """
    top = _top(ranges)
    if not math.isfinite(top.largest):
        raise SrkdError(
            f"the block {top.block} computes values that are not finite in fp32 ({top.operation}); "
            "no scale mends that. Train or load the network again."
        )
    lowest = min((r.largest for r in ranges if r.largest > 0), default=math.inf)
    k = 1
    while top.largest / k > ALLOWED and lowest / (2 * k) >= FLOOR:
        k *= 2
    return k


def recentred(network: nn.Module, inputs: Sequence[Input]) -> Recentred:
    """Audit, choose k, divide, audit again. A network without a rule keeps k = 1, with the reason."""
    before = audit(network, inputs)
    k, why_not = choose_k(before), _why_not(network)
    top = _top(before)
    told = f"{top.block} reaches {top.largest:.5g}"
    if k == 1 or why_not:
        if top.largest <= ALLOWED:
            told += f", within {ALLOWED:g}"
        elif why_not:
            told += f", but {why_not}"
        else:
            told += f", but {_low(before)}"
        return Recentred(rescaled(network, 1), 1, told, before, before)
    divided = rescaled(network, k)
    after = audit(divided, inputs)
    told += f"; divided by {k}, {_top(after).block} reaches {_top(after).largest:.5g}"
    if top.largest / k > ALLOWED:
        told += f", and by more {_low(after)}"
    return Recentred(divided, k, told, before, after)


def _top(ranges: Sequence[BlockRange]) -> BlockRange:
    return max(ranges, key=lambda r: r.largest)


def _low(ranges: Sequence[BlockRange]) -> str:
    low = min((r for r in ranges if r.largest > 0), key=lambda r: r.largest)
    return f"{low.block}, which reaches {low.largest:.2g}, would fall below {FLOOR:.2g}"


# --- E0 -------------------------------------------------------------------------------------------


def check_rescale(
    trained: Engine, deployed: Engine, inputs: Sequence[Input], gate: Gate
) -> EdgeResult:
    """E0: the network as trained against the one that is exported, both in torch, on every input.

    Noise counts here too: equality asks for no real picture.
    """
    rows: list[dict[str, Any]] = []
    parts = []
    for item in inputs:
        try:
            x, y = trained(item.lr), deployed(item.lr)
        except SrkdError as error:
            return EdgeResult("E0", "FAIL", f"{item.name}: {error}", rows=tuple(rows))
        if x.shape != y.shape:
            reason = f"{item.name}: the output is {y.shape}, that of the trained network {x.shape}"
            return EdgeResult("E0", "FAIL", reason, rows=tuple(rows))
        parts.append(difference(x, y, item.name))
        rows.append({"input": item.name, "kind": item.kind, **parts[-1].to_json()})
    numbers = worst_of(parts)
    status, reason = judge(numbers, gate)
    if status == "PASS":
        reason = f"bit-identical on {len(parts)} pictures"
    return EdgeResult("E0", status, reason, numbers, rows=tuple(rows))
