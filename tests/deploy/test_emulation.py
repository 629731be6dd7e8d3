"""The emulation rounds every float16 tensor, and carries infinity on."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from small_graph import Residual, model, node

from deploy.emulation import HalfEmulation
from deploy.engines import EngineRunError
from deploy.half import to_half
from srkd.errors import SrkdError

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def picture(*values: float) -> np.ndarray:
    """(1, 3, 1, n) with the values in every channel."""
    return np.broadcast_to(np.array(values, np.float32), (1, 3, 1, len(values))).copy()


def in_half(op: str, *inputs: str) -> onnx.ModelProto:
    """lr -> float16 -> op(x, ...) -> float32, with float16 constants c3 = 3 and c4096 = 4096."""
    nodes = [
        node("Cast", "", ["lr"], "x", to=HALF),
        node(op, "", inputs, "y"),
        node("Cast", "", ["y"], "sr", to=FLOAT),
    ]
    constants = {"c3": np.array(3, np.float16), "c4096": np.array(4096, np.float16)}
    return model(nodes, constants)


def test_what_float16_stores() -> None:
    # 11 bits: integers to 2048, then every second, ties to even; 65520 is the first that rounds to infinity;
    # the smallest is 2^-24.
    lr = picture(2049, 2051, 65519, 65520, 7e4, -7e4, 1e-8, 2.0**-24)
    sr = HalfEmulation(in_half("Abs", "x"), 1, threads=1)(lr)
    want = picture(2048, 2052, 65504, np.inf, np.inf, np.inf, 0, 2.0**-24)
    assert np.array_equal(sr, want)


def test_results_are_rounded_where_inputs_are_exact() -> None:
    emulation = HalfEmulation(in_half("Mul", "x", "c3"), 1, threads=1)
    # 3 * 683 = 2049 -> 2048; 3 * 21845.33... -> beyond.
    assert np.array_equal(emulation(picture(683, 21856)), picture(2048, np.inf))
    # An infinite factor and a subtraction: inf * 0 and inf - inf are not numbers.
    nan = HalfEmulation(in_half("Sub", "x", "x"), 1, threads=1)(picture(7e4, 1))
    assert np.isnan(nan[..., 0]).all() and (nan[..., 1] == 0).all()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("op", ["Add", "Mul", "Sub", "Div"])
def test_equals_the_reference_evaluator(op: str) -> None:
    graph = in_half(op, "x", "c4096")
    lr = picture(*np.random.default_rng(0).normal(0, 100, 200))
    (want,) = ReferenceEvaluator(graph).run(None, {"lr": lr})
    exact = {"Add": lr + 4096, "Mul": lr * 4096, "Sub": lr - 4096, "Div": lr / 4096}[op]
    found = HalfEmulation(graph, 1, threads=1)(lr)
    assert np.array_equal(found, np.asarray(want)) and not np.array_equal(found, exact)


def test_agrees_with_torch_in_half() -> None:
    """Two 3 x 3 convolutions. Sums are float32 in both, added in another order: now and then a value rounds
    to the neighbour. Without rounding the distance is many times that."""
    torch.manual_seed(0)
    weights = [torch.randn(8, 3, 3, 3) / 5, torch.randn(3, 8, 3, 3) / 8]
    nodes = [
        node("Conv", "a", ["lr", "w0"], "features", pads=[1] * 4),
        node("Relu", "", ["features"], "relu"),
        node("Conv", "b", ["relu", "w1"], "sr", pads=[1] * 4),
    ]
    graph = model(nodes, {f"w{k}": w.numpy() for k, w in enumerate(weights)})
    lr = torch.rand(1, 3, 16, 16)
    small = [w.half() for w in weights]
    want = F.conv2d(F.relu(F.conv2d(lr.half(), small[0], padding=1)), small[1], padding=1)
    found = HalfEmulation(to_half(graph), 1, threads=1)(lr.numpy())
    wide = HalfEmulation(graph, 1, threads=1)(lr.numpy())
    one_step = 2.0**-11  # between float16 numbers in [0.5, 1)
    near = np.abs(found - want.float().numpy())
    assert near.max() <= 4 * one_step and (near == 0).mean() > 0.8
    assert (wide == want.float().numpy()).mean() < 0.01


def test_tensors_of_an_island_are_not_rounded() -> None:
    graph = Residual(1, gain={0: 1000}).model()
    lr = picture(0.25, 1)
    lost = HalfEmulation(to_half(graph), 1, threads=1)(lr)
    kept = HalfEmulation(to_half(graph, ["groups.0"]), 1, threads=1)(lr)
    assert np.isfinite(lost[..., 0]).all() and not np.isfinite(lost[..., 1]).any()
    assert np.allclose(kept, lr, atol=1e-3)


def test_refusals() -> None:
    emulation = HalfEmulation(in_half("Abs", "x"), 1, threads=1)
    with pytest.raises(SrkdError, match=r"float32 \(N, 3, h, w\)"):
        emulation(np.zeros((3, 4, 4), np.float32))
    shaped = model([node("Reshape", "", ["lr", "shape"], "sr")], {"shape": np.array([1, 3, 2, 2])})
    with pytest.raises(EngineRunError, match=r"could not run an input of \(1, 3, 1, 3\)"):
        HalfEmulation(shaped, 1, threads=1)(picture(1, 2, 3))
