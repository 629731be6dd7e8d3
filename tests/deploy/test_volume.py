"""How large a graph's tensors become is read from the graph, and it is what a run of it makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from deploy.emulation import open_session, run
from deploy.sizes import LARGEST_INDEX, Sizes, parse_sizes
from deploy.volume import check_countable, largest_side, largest_tensor
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from tests.deploy.conftest import _Exports


@pytest.mark.parametrize("name", ["edsr_tiny", "swinir_small"])
def test_the_largest_tensor_of_a_run(name: str, exported: _Exports) -> None:
    graph = onnx.load(exported(name).graph.path)
    tensors = [name for node in graph.graph.node for name in node.output]
    known = {value.name for value in graph.graph.output}
    graph.graph.output.extend(onnx.ValueInfoProto(name=n) for n in tensors if n not in known)
    session = open_session(graph, threads=1)
    for h, w in ((16, 33), (27, 8)):
        found = run(session, tensors, np.zeros((1, 3, h, w), np.float32))
        assert largest_tensor(graph, h, w) == max(tensor.size for tensor in found)


@pytest.mark.parametrize(
    ("name", "per_pixel", "side"),
    [
        ("edsr_tiny", 16 * 2**2, 5792),  # the feature at full resolution
        # Logits of 64 tokens with each other in 6 heads; sides are padded to the window of 8.
        ("swinir_small", 6 * 64, 2360),
    ],
)
def test_sizes_that_a_32_bit_index_can_count(
    name: str, per_pixel: int, side: int, exported: _Exports
) -> None:
    graph = onnx.load(exported(name).graph.path)
    assert largest_side(graph) == side
    assert per_pixel * side**2 <= LARGEST_INDEX < per_pixel * (side + 8) ** 2
    check_countable(graph, Sizes((8, 8), (8, 8), (side, side)), name)
    wide = parse_sizes(f"8x8:8x8:{side // 2}x{3 * side}")
    with pytest.raises(SrkdError, match=rf"a tensor inside {name} .* \(at most {side}x{side}\)"):
        check_countable(graph, wide, name)


def test_a_size_that_is_not_understood(exported: _Exports) -> None:
    graph = onnx.load(exported("edsr_tiny").graph.path)
    graph.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "sqrt(height)"
    with pytest.raises(SrkdError, match=r"declares a size 'sqrt\(height\)'"):
        largest_tensor(graph, 8, 8)
