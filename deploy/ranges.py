"""How close a network comes to the end of half precision, block by block.

A half holds magnitudes up to 65504. Below 2^-14 it loses bits, at 2^-25 and below everything (rounds to 0).

Blocks are named by the module tree: head, groups.0, groups.0.blocks.1, .., tail; every unit of a list that
has layers of its own is a block, and what it computes belongs to the innermost one. The result of
every operator of torch counts as stored, and so do weights. An exporter may split an operator further (a variance
into squares and a mean): what the graph itself does in half precision is edge E2's question.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from deploy.float16 import HALF_MAX, ROUNDS_TO_ZERO, SMALLEST_NORMAL
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from deploy.inputs import Input

OUTSIDE = "forward"  # operators of the network's own forward, outside every block


@dataclass(frozen=True)
class BlockRange:
    """What a half-precision graph would store of one block, over all pictures.

    largest            magnitude; infinite when a value was not finite
    operation          the operator of torch that stored it, or "weights"
    picture            the input it happened on; empty for weights
    flushed            share of the non-zero values that round to 0
    weights_subnormal  share of the non-zero weights that lose bits
    """

    block: str
    largest: float
    operation: str
    picture: str
    flushed: float
    weights_subnormal: float

    @property
    def share(self) -> float:
        """Of what half precision holds: overflow from 1 on."""
        return self.largest / HALF_MAX


def audit(network: nn.Module, inputs: Iterable[Input]) -> tuple[BlockRange, ...]:
    """Ranges of every block in fp32 on the CPU, in the order of the module tree.

    Noise among the inputs is left out, as everywhere: it invents ranges that no photograph has.
    """
    pictures = [item for item in inputs if item.gated]
    if not pictures:
        raise SrkdError(
            "a range audit got no photograph and no pattern, but it reports what it sees; "
            "give some (deploy.inputs.build_inputs)."
        )
    network = copy.deepcopy(network).float().cpu().eval()
    names = block_names(network)
    tallies = {name: _Tally() for name in (*names, OUTSIDE)}
    for name, parameter in network.named_parameters():
        tallies[_innermost(name, names)].weigh(parameter.detach())
    recorder = _Recorder(tallies, _watch(network, names))
    for item in pictures:
        lr, recorder.picture = torch.from_numpy(item.lr.copy()), item.name
        # An exported graph stores the logits of an attention, which a fused kernel never writes.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), recorder:
            network(lr)
    return tuple(tally.result(name) for name, tally in tallies.items() if tally.operation)


def table(ranges: Iterable[BlockRange]) -> list[dict[str, Any]]:
    """Rows of plain values for a report; JSON has no infinity, so that becomes null."""
    return [
        {k: None if v == math.inf else v for k, v in {**asdict(r), "share": r.share}.items()}
        for r in ranges
    ]


def block_names(network: nn.Module) -> tuple[str, ...]:
    """Direct children of the network, its lists unit by unit, and units with layers of their own below."""
    lists = (nn.ModuleList, nn.Sequential)
    names = {name for name, child in network.named_children() if not isinstance(child, lists)}
    for name, module in network.named_modules():
        if name and isinstance(module, lists):
            for key, unit in module.named_children():
                if "." not in name or next(unit.children(), None) is not None:
                    names.add(f"{name}.{key}")
    return tuple(name for name, _ in network.named_modules() if name in names)


def _innermost(path: str, names: tuple[str, ...]) -> str:
    around = [name for name in names if path.startswith(f"{name}.")]
    return max(around, key=len, default=OUTSIDE)


def _watch(network: nn.Module, names: tuple[str, ...]) -> list[str]:
    """A list that holds the blocks being run, outermost first, while `network` runs."""
    stack: list[str] = []

    def leave(*_: object) -> None:
        stack.pop()

    for name in names:
        module = network.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: stack.append(name))
        module.register_forward_hook(leave)
    return stack


class _Tally:
    """Running numbers of one block."""

    def __init__(self) -> None:
        self.largest, self.operation, self.picture = 0.0, "", ""
        self.values = self.flushed = 0
        self.weights = self.subnormal = 0

    def store(self, values: Tensor, operation: str, picture: str) -> None:
        # Minus infinity is no overflow but how attention is masked, and float16 holds it.
        size = values.masked_fill(values == -math.inf, 0).abs()
        self._extend(size, operation, picture)
        self.values += int(size.count_nonzero())
        self.flushed += int(((size > 0) & (size <= ROUNDS_TO_ZERO)).sum())

    def weigh(self, weights: Tensor) -> None:
        size = weights.abs()
        self._extend(size, "weights", "")
        self.weights += int(size.count_nonzero())
        self.subnormal += int(((size > 0) & (size < SMALLEST_NORMAL)).sum())

    def _extend(self, size: Tensor, operation: str, picture: str) -> None:
        largest = float(size.max())
        largest = math.inf if math.isnan(largest) else largest
        if largest > self.largest or not self.operation:
            self.largest, self.operation, self.picture = largest, operation, picture

    def result(self, name: str) -> BlockRange:
        return BlockRange(
            name,
            self.largest,
            self.operation,
            self.picture,
            self.flushed / max(self.values, 1),
            self.subnormal / max(self.weights, 1),
        )


class _Recorder(TorchDispatchMode):
    """Sees the result of every operator and adds it to the block that is being run."""

    def __init__(self, tallies: dict[str, _Tally], stack: list[str]) -> None:
        super().__init__()
        self.tallies, self.stack, self.picture = tallies, stack, ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: the guard is for compiled networks, and loading it costs 4 s of a processor."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Of several results the first is the value; the rest are statistics (layer norm) or indices.
        value = result[0] if isinstance(result, tuple) else result
        stored = isinstance(value, Tensor) and value.is_floating_point() and value.numel()
        if stored and not func.is_view:
            block = self.stack[-1] if self.stack else OUTSIDE
            self.tallies[block].store(value, func.overloadpacket.__name__, self.picture)
        return result
