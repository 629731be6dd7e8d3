"""How large the tensors of an exported graph become: the numbers that an engine must count.

The exporter notes the size of every tensor as an expression of batch, height and width, such as
`64*(height//8)`. TensorRT counts the elements of a tensor with 32 bits ("Volume Limits" of its operator
reference), so that a network's widest tensor ends the sizes that an engine can be built for.
"""

from __future__ import annotations

import ast
import math
import operator
from typing import TYPE_CHECKING

from deploy.sizes import LARGEST_INDEX
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx

    from deploy.sizes import Sizes

LARGEST_SIDE = 2**16
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_FUNCTIONS = {"Mod": operator.mod, "Max": max, "Min": min}


def largest_tensor(graph: onnx.ModelProto, h: int, w: int) -> int:
    """Elements of the graph's largest tensor for one picture of (h, w) LR pixels."""
    given = {"batch": 1, "height": h, "width": w}
    known: dict[str, int] = {}
    largest = 0
    for dims in _shapes(graph):
        for dim in dims:
            if isinstance(dim, str) and dim not in known:
                known[dim] = _value(dim, given)
        largest = max(largest, math.prod(known[d] if isinstance(d, str) else d for d in dims))
    return largest


def largest_side(graph: onnx.ModelProto) -> int:
    """Side of the largest square picture, halo included, whose tensors a 32-bit index can count."""
    low, high = 0, LARGEST_SIDE  # pictures beyond this have an output that it cannot count
    while high - low > 1:
        middle = (low + high) // 2
        if largest_tensor(graph, middle, middle) <= LARGEST_INDEX:
            low = middle
        else:
            high = middle
    return low


def check_countable(graph: onnx.ModelProto, sizes: Sizes, name: str) -> None:
    """Refuse to build `name` for pictures in which a tensor has more elements than an engine counts."""
    elements = largest_tensor(graph, *sizes.largest)
    if elements > LARGEST_INDEX:
        h, w = sizes.largest
        side = largest_side(graph)
        raise SrkdError(
            f"on {h}x{w} pixels a tensor inside {name} has {elements / 1e9:.1f} G elements, and an engine counts to "
            f"2.1 G; lower MAX in --size (at most {side}x{side}): larger pictures are cut into tiles."
        )


def _shapes(graph: onnx.ModelProto) -> set[tuple[str | int, ...]]:
    """The different shapes of the tensors that the nodes make."""
    inner = graph.graph
    made = {name for node in inner.node for name in node.output}
    tensors = (*inner.input, *(v for v in (*inner.value_info, *inner.output) if v.name in made))
    return {
        tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in tensors
    }


def _value(text: str, given: Mapping[str, int]) -> int:
    """The number that an expression of the exporter stands for."""

    def of(node: ast.AST) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if name in given:
                return given[name]
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -of(inner)
            case ast.BinOp(left=a, op=op, right=b) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](of(a), of(b))
            case ast.Call(func=ast.Name(id=name), args=args) if name in _FUNCTIONS:
                return _FUNCTIONS[name](*map(of, args))
        raise SrkdError(
            f"the graph declares a size '{text}' that this version cannot compute; export it again, or with "
            "another version of torch."
        )

    return of(ast.parse(text, mode="eval").body)
