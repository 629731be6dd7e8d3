"""What a network costs: parameters, multiply-adds, activation memory, reach.

Two counting rules, because the papers use two:

    fvcore   multiply-adds of convolutions, linear layers and attention products, without bias, plus one
             per element entering a global average pool, plus five per element of a layer norm
             (DUKD Table 1, MiPKD Table 1, at 256x256; the counter is facebookresearch/fvcore itself, with
             fused attention, which it does not know, counted as its two products)
    mkd      multiply-adds of convolutions, plus one per convolution output element for the bias, plus
             one per element entering a global average pool (MKD's table, at 512x512)

The counter runs the network. It does so at three small sizes; where the counts lie on one line
a * pixels + b, exactly, as for every fully convolutional or windowed network, the line gives the count at
any size; where they do not, the network is run at the size asked for.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from srkd.errors import SrkdError
from srkd.networks.base import Network

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from srkd.types import Facts

Rule = Literal["fvcore", "mkd"]
RULES: tuple[str, ...] = get_args(Rule)
MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass over one LR image of `size` (h, w).

    macs              multiply-adds (and what the rule adds to them), a whole number
    by_operator       the same, split by operator
    uncounted         operator -> how often it ran, for the operators that the rule gives no cost
    activation_mib    largest sum of live tensors in eval mode without graph, input and output included,
                      weights, kernel workspace and allocator rounding not; None when the network cannot
                      run without data (some networks of other libraries)
    weights_mib       parameters and buffers as they are stored now
    receptive_field_px  radius in LR pixels, None: the whole image
    """

    size: tuple[int, int]
    scale: int
    rule: str
    parameters: int
    macs: int
    by_operator: Mapping[str, int]
    uncounted: Mapping[str, int]
    weights_mib: float
    activation_mib: float | None
    receptive_field_px: int | None

    @property
    def macs_g(self) -> float:
        """Multiply-adds in G (1e9), the unit of the papers' tables."""
        return self.macs / 1e9

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "macs_g": self.macs_g}


def cost(
    network: nn.Module,
    size: tuple[int, int] = (256, 256),
    rule: str = "fvcore",
    facts: Facts | None = None,
) -> Cost:
    """Cost of `network` on one LR image of `size` (h, w).

    `facts` are needed for networks that are not ours. The network itself is not changed.
    """
    own, facts = _countable(network, rule, facts)
    if min(size) < facts.minimum_px:
        raise SrkdError(
            f"size {size[0]}x{size[1]} is too small: this network takes {facts.minimum_px} px or more."
        )
    by_operator, uncounted = _count(own, size, rule, facts)
    tensors = [*own.parameters(), *own.buffers()]
    return Cost(
        size=size,
        scale=facts.scale,
        rule=rule,
        parameters=sum(p.numel() for p in own.parameters()),
        macs=sum(by_operator.values()),
        by_operator=by_operator,
        uncounted=uncounted,
        weights_mib=sum(t.nbytes for t in tensors) / MIB,
        activation_mib=_activation_mib(own, size),
        receptive_field_px=facts.receptive_field_px,
    )


def macs_by_size(
    network: nn.Module, rule: str = "fvcore", facts: Facts | None = None
) -> Callable[[tuple[int, int]], int] | None:
    """Multiply-adds of one forward pass as a function of the LR size (h, w), at the cost of three small runs.

    None where the counts lie on no line, so that only a run at the size itself could tell (`cost` does it).
    `facts` as for `cost`.
    """
    own, facts = _countable(network, rule, facts)
    probes = _probes(facts)
    points = [(h * w, _run_counter(own, (h, w), rule)[0]) for h, w in probes]
    # Sizes differ by whole cells of the grid: a count that is whole one cell further is whole at every size.
    if _line(points, points[0][0] + facts.size_multiple**2) is None:
        return None

    def macs(size: tuple[int, int]) -> int:
        line = _line(points, _padded_pixels(size, facts))
        assert line is not None, "three points that lie on a line stay on it"
        return sum(line.values())

    return macs


def _countable(network: nn.Module, rule: str, facts: Facts | None) -> tuple[nn.Module, Facts]:
    """A copy in eval mode that the counter may run, and the facts of the network."""
    if rule not in RULES:
        raise SrkdError(f"unknown counting rule '{rule}'; use one of {', '.join(RULES)}.")
    if facts is None:
        if not isinstance(network, Network):
            raise SrkdError(f"{type(network).__name__} is no network of srkd; give its facts too.")
        facts = network.facts
    if any(p.is_meta for p in network.parameters()):
        raise SrkdError("cannot count a network without weights; build it on the CPU first.")
    return copy.deepcopy(network).eval().requires_grad_(False), facts


# --- multiply-adds ----------------------------------------------------------------------------


def _count(
    network: nn.Module, size: tuple[int, int], rule: str, facts: Facts
) -> tuple[dict[str, int], dict[str, int]]:
    """Counts by operator at `size`, and uncounted operators."""
    probes = _probes(facts)
    if size[0] * size[1] > probes[-1][0] * probes[-1][1]:
        counts = [_run_counter(network, probe, rule) for probe in probes]
        points = [(p[0] * p[1], c) for p, (c, _) in zip(probes, counts, strict=True)]
        line = _line(points, _padded_pixels(size, facts))
        if line is not None:
            return line, counts[0][1]
    return _run_counter(network, size, rule)


def _probes(facts: Facts) -> list[tuple[int, int]]:
    """The small sizes (h, w) that are counted by running, smallest first."""
    grid = facts.size_multiple
    small = -(-max(8, facts.minimum_px) // grid) * grid
    # Odd multiples of the grid too, so that a network that rounds its inner sizes leaves the line.
    middle, large = 3 * small - grid, 2 * small + grid
    return [(small, small), (small, large), (middle, large)]


def _padded_pixels(size: tuple[int, int], facts: Facts) -> int:
    """Pixels after networks have padded themselves to their grid."""
    h, w = (-(-s // facts.size_multiple) * facts.size_multiple for s in size)
    return h * w


def _line(counts: list[tuple[int, dict[str, int]]], pixels: int) -> dict[str, int] | None:
    """Counts at `pixels` from counts at three numbers of pixels; None where they are on no line."""
    (x0, c0), (x1, c1), (x2, c2) = counts
    result: dict[str, int] = {}
    for name in sorted(c0.keys() | c1.keys() | c2.keys()):
        y0, y1, y2 = (c.get(name, 0) for c in (c0, c1, c2))
        if (y1 - y0) * (x2 - x0) != (y2 - y0) * (x1 - x0):
            return None
        result[name], rest = divmod(y0 * (x1 - x0) + (y1 - y0) * (pixels - x0), x1 - x0)
        if rest:
            return None
    return result


class _Whole(nn.Module):
    """A network as one piece: hidden from the counter's split by module, which takes it longer than the count."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.hidden = (network,)

    def forward(self, lr: Tensor) -> Tensor:
        return self.hidden[0](lr)


def _run_counter(
    network: nn.Module, size: tuple[int, int], rule: str
) -> tuple[dict[str, int], dict[str, int]]:
    """Run fvcore's counter over a black image of `size`."""
    like = next(network.parameters())
    lr = torch.zeros(1, 3, *size, dtype=like.dtype, device=like.device)
    analysis = FlopCountAnalysis(_Whole(network), lr)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention)
    if rule == "mkd":
        analysis.clear_op_handles()
        analysis.set_op_handle("aten::_convolution", _mkd_convolution)
        analysis.set_op_handle("aten::adaptive_avg_pool2d", _mkd_pool)
    with torch.no_grad():
        counted = {k: int(v) for k, v in analysis.by_operator().items() if v}
    return counted, dict(sorted(analysis.unsupported_ops().items()))


def _shape(value: Any) -> list[int]:
    """Sizes of a tensor in a traced graph."""
    return value.type().sizes()


def _attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Both products of fused attention, which fvcore counts where they are written out alone."""
    queries, width = _shape(inputs[0])[:-1], _shape(inputs[0])[-1]
    keys, value_width = _shape(inputs[2])[-2:]
    return Counter({"attention": _product(queries) * keys * (width + value_width)})


def _mkd_convolution(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Multiply-adds of a convolution, and one operation per output element for its bias."""
    weight, result = _shape(inputs[1]), _shape(outputs[0])
    elements = _product(result)
    bias = elements if inputs[2].type().isSubtypeOf(torch._C.TensorType.get()) else 0
    return Counter({"conv": elements * _product(weight[1:]), "bias": bias})


def _mkd_pool(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    return Counter({"adaptive_avg_pool2d": _product(_shape(inputs[0]))})


def _product(sizes: Iterable[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


# --- memory -----------------------------------------------------------------------------------


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels run it, which hold no matrix of queries times keys."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = args
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


class _LiveTensors(TorchDispatchMode):
    """Follows the storages that operators return until nobody refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def add(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            self.live[reference.cdata] = (reference, storage.nbytes())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        returned = result if isinstance(result, list | tuple) else (result,)
        # Dead storages go first: their address may be the new one's.
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        self.add(*(t for t in returned if isinstance(t, torch.Tensor)))
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.live.values()))
        return result


def _activation_mib(network: nn.Module, size: tuple[int, int]) -> float | None:
    """Peak of live activations, from a run on the meta device, which has shapes but no data.

    Moves `network` to the meta device: it is the caller's copy.
    """
    dtype = next(network.parameters()).dtype
    network.to("meta")
    lr = torch.empty(1, 3, *size, dtype=dtype, device="meta")
    tracker = _LiveTensors()
    tracker.add(lr)
    try:
        with torch.no_grad(), tracker, _FusedAttention():
            network(lr)
    except (NotImplementedError, RuntimeError):
        if isinstance(network, Network):
            raise
        return None
    return tracker.peak / MIB
