"""Graphs in float16: types, islands, constants, and the verdict of E2."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from small_graph import FACTS, Residual, model, node

from deploy.difference import difference
from deploy.emulation import HalfEmulation
from deploy.half import HalfNumbers, check_half, judge_half, tensor_types, to_half
from deploy.inputs import Input, crop_pair, patterns
from deploy.islands import blocks, ends, fixed_islands, inside, node_paths
from deploy.ort_engine import OrtEngine
from deploy.verdict import read_gates
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from deploy.inputs import Photo
    from tests.deploy.conftest import _Exports

GATE = read_gates()["E2"]
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def constant(graph: onnx.ModelProto, name: str) -> np.ndarray:
    (tensor,) = [t for t in graph.graph.initializer if t.name == name]
    return numpy_helper.to_array(tensor)


def notes(graph: onnx.ModelProto) -> dict[str, str]:
    return {p.key: p.value for p in graph.metadata_props}


# --- exported networks ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["edsr_tiny", "rcan_a", "swinir_small"])
def test_networks_in_half(
    name: str, exported: _Exports, photographs: dict[int, list[Photo]]
) -> None:
    made = exported(name)
    graph = onnx.load(made.graph.path)
    half = to_half(graph)

    onnx.checker.check_model(half, full_check=True)
    assert (half.graph.input, half.graph.output) == (graph.graph.input, graph.graph.output)
    assert {**notes(graph), "srkd.precision": "fp16", "srkd.fp32_islands": "[]"} == notes(half)
    shuffles = [n for n in half.graph.node if n.op_type == "DepthToSpace"]
    assert shuffles and all(
        a.s == b"CRD" for n in shuffles for a in n.attribute if a.name == "mode"
    )
    types = tensor_types(half)
    sums = [n for n in half.graph.node if n.op_type in ("Conv", "MatMul", "LayerNormalization")]
    assert {types[i] for n in sums for i in n.input} == {HALF}
    casts = [sum(n.op_type == "Cast" for n in g.graph.node) for g in (graph, half)]
    last_sums = 9 if name == "rcan_a" else 1  # of a collapsed tail: inside, edges and corners
    assert casts[1] == casts[0] + 1 + last_sums

    scale, facts = made.model.scale, made.model.facts
    session = onnxruntime.InferenceSession(half.SerializeToString())
    inputs = [crop_pair(photographs[scale][0], 24, 29, scale)]
    inputs += [Input(n, "pattern", lr) for n, lr in patterns(24, 29).items()]
    assert session.run(["sr"], {"lr": inputs[0].lr})[0].shape == (1, 3, 24 * scale, 29 * scale)
    engine = OrtEngine(made.graph.path, scale, threads=1)
    e2 = check_half(engine, HalfEmulation(half, scale, threads=1), facts, inputs, GATE)
    assert e2.status == "PASS" and e2.numbers is not None
    # Rounding to 11 bits in every layer: neither nothing nor much.
    assert 60 < e2.numbers.psnr_db < 100
    assert [row["input"] for row in e2.rows] == [i.name for i in inputs]
    assert abs(e2.rows[0]["task_delta_db"]) < 0.01 and "task PSNR" in e2.reason


# --- islands --------------------------------------------------------------------------------------


def test_islands_are_float32_from_end_to_end() -> None:
    half = to_half(Residual().model(), ["groups.0", "groups.1"])
    types = tensor_types(half)
    for n, path in zip(half.graph.node, node_paths(half), strict=True):
        island = inside(path, "groups.0") or inside(path, "groups.1")
        if n.op_type != "Cast":
            want = FLOAT if island or n.output[0] in ("wide", "sr") else HALF
            assert {types[name] for name in (*n.input, *n.output)} == {want}, path
    # In and out at the ends of the graph, into the first island, out of the second: none between them.
    casts = [(n.input[0], n.output[0]) for n in half.graph.node if n.op_type == "Cast"]
    assert casts == [
        ("wide", "wide_fp16"),
        ("out_head.conv", "out_head.conv_fp32"),
        ("add_1", "add_1_fp16"),
        ("out_tail.last", "out_tail.last_fp32"),
    ]
    assert json.loads(notes(half)["srkd.fp32_islands"]) == ["groups.0", "groups.1"]


def test_a_module_without_its_submodules() -> None:
    half = to_half(Residual(1).model(), ["groups.0/"])
    types = tensor_types(half)
    assert [types[t] for t in ("out_groups.0.conv1", "out_groups.0.conv2")] == [HALF, HALF]
    assert [types[t] for t in ("relu_0", "add_0")] == [FLOAT, FLOAT]


def test_unknown_islands_are_refused() -> None:
    with pytest.raises(SrkdError, match=r"no block 'group.1' to keep in float32; .*'groups.1'"):
        to_half(Residual().model(), ["group.1"])


def test_blocks_follow_the_numbers_of_the_module_tree() -> None:
    found = {
        "head.conv/conv2d": "head",
        "groups.0.blocks.0.attention.squeeze/conv2d_3": "groups.0.blocks.0",
        "groups.0.blocks.1/add_2": "groups.0.blocks.1",
        "groups.0.conv/conv2d_5": "groups.0.conv",
        "groups.0/add_71": "groups.0/",
        "groups.1.conv1/conv2d_6": "groups.1",
        "groups.1/add_72": "groups.1",
        "tail.upsample.0/conv2d_7": "tail.upsample.0",
        "tail/add_8": "tail/",
        "/mul_9": "/",
    }
    assert blocks(list(found)) == list(found.values())
    assert not inside("groups.10/add", "groups.1") and inside("/mul_9", "/")
    assert not inside("groups.0.conv/conv2d_5", "groups.0/")


def test_steps_that_no_network_may_take_in_half() -> None:
    """x x^T, a guard of 1e-12 and a count of pixels; a window's mask (bool to float) is none of them."""
    graph = model(
        [
            node("Transpose", "gram", ["lr"], "turned", perm=[0, 1, 3, 2]),
            node("MatMul", "gram", ["lr", "turned"], "squares"),
            node("Conv", "norm.conv", ["lr", "weight"], "features"),
            node("Clip", "norm", ["features", "guard"], "clipped"),
            node("Size", "count", ["lr"], "size"),
            node("Cast", "", ["size"], "pixels", to=FLOAT),
            node("Mul", "count", ["clipped", "pixels"], "sum"),
            node("Cast", "mask", ["flag"], "masked", to=FLOAT),
            node("Mul", "mask", ["sum", "masked"], "sr"),
        ],
        {
            "weight": np.full((3, 3, 1, 1), 1e-12, np.float32),  # may vanish: there are many
            "guard": np.array(1e-12, np.float32),
            "flag": np.array(True),
        },
    )
    assert fixed_islands(graph, tensor_types(graph)) == ["gram/", "norm/", "count/"]


def test_only_the_arithmetic_at_both_ends_stays_wide() -> None:
    graph = Residual(1).model()
    kept = [graph.graph.node[k].output[0] for k in sorted(ends(graph, tensor_types(graph)))]
    assert kept == ["wide", "sr"]


# --- constants ------------------------------------------------------------------------------------


def test_constants_are_rounded_and_never_clipped() -> None:
    half = to_half(Residual(1, gain={0: 5e4}).model())
    # Between 32768 and 65536 float16 counts in steps of 32: 50000 lies halfway, even is 49984.
    assert constant(half, "groups.0.conv1.weight_fp16")[0, 0].item() == 49984
    # 0.5 / 5e4 = 1e-5: a subnormal, in steps of 2^-24.
    assert constant(half, "groups.0.conv2.weight_fp16")[0, 0].item() == 168 * 2.0**-24


def test_constants_that_do_not_fit_are_refused_or_an_island() -> None:
    graph = Residual(1, gain={0: 7e4}).model()
    message = (
        r"'groups.0.conv1.weight' holds 70000, and float16 ends at 65504. Keep 'groups.0.conv1'"
    )
    with pytest.raises(SrkdError, match=message):
        to_half(graph)
    kept = to_half(graph, ["groups.0.conv1"])
    assert constant(kept, "groups.0.conv1.weight")[0, 0].item() == 70000
    names = {t.name for t in kept.graph.initializer}
    assert "groups.0.conv1.weight_fp16" not in names and "groups.0.conv2.weight_fp16" in names


def test_half_graphs_are_not_converted_again() -> None:
    with pytest.raises(SrkdError, match="holds float16 already; convert the fp32 export"):
        to_half(to_half(Residual(1).model()))


# --- E2 -------------------------------------------------------------------------------------------


def bright(pixels: int) -> Input:
    """0.25, and 1.0 at some pixels; in a first block that multiplies by 1000 only the latter exceed 65504."""
    lr = np.full((1, 3, 4, 5), 0.25, np.float32)
    lr.reshape(3, -1)[:, :pixels] = 1.0
    return Input(f"{pixels} bright", "photograph", lr, lr - np.float32(0.02))


def test_overflow_fails_e2_and_plain_onnx_runtime_hides_it() -> None:
    graph = Residual(gain={0: 1000}).model()
    half = to_half(graph)
    sound, wide = HalfEmulation(half, 1, threads=1), HalfEmulation(graph, 1, threads=1)
    assert check_half(wide, sound, FACTS, [bright(0)], GATE).status == "PASS"
    failed = check_half(wide, sound, FACTS, [bright(0), bright(5)], GATE)
    assert failed.status == "FAIL" and failed.reason == "15 of 120 values are NaN or infinite"

    session = onnxruntime.InferenceSession(half.SerializeToString())
    (hidden,) = session.run(["sr"], {"lr": bright(5).lr})
    assert np.isfinite(hidden).all()

    mended = HalfEmulation(to_half(graph, ["groups.0"]), 1, threads=1)
    assert check_half(wide, mended, FACTS, [bright(0), bright(5)], GATE).status == "PASS"


def numbers(
    error: float, task_db: float | None = 32.0, delta_db: float | None = 0.0
) -> HalfNumbers:
    """Everywhere the same error: PSNR = -20 log10(error)."""
    x = np.zeros((1, 3, 2, 2), np.float32)
    found = (difference(x, x + np.float32(error), "flat"),)
    return HalfNumbers((), found, task_db, delta_db)


@pytest.mark.parametrize(
    ("error", "task_db", "delta_db", "status", "said"),
    [
        (0.0009, 32.0, 0.0, "PASS", "PSNR 60.9 dB; task PSNR +0.0000 dB"),
        (0.0011, 32.0, 0.0, "INCONCLUSIVE", "PSNR 59.2 dB (need 60 dB); task PSNR +0.0000 dB"),
        (0.0009, 38.0, 0.0, "INCONCLUSIVE", "PSNR 60.9 dB (need 63 dB); task PSNR +0.0000 dB"),
        (0.0040, 32.0, 0.0, "FAIL", "PSNR 48.0 dB (need 50 dB); task PSNR +0.0000 dB"),
        (0.0009, 32.0, -0.019, "PASS", "PSNR 60.9 dB; task PSNR -0.0190 dB"),
        (
            *(0.0009, 32.0, -0.03, "INCONCLUSIVE"),
            "PSNR 60.9 dB; task PSNR -0.0300 dB (need at least -0.02 dB)",
        ),
        (
            0.0009,
            32.0,
            -0.06,
            "FAIL",
            "PSNR 60.9 dB; task PSNR -0.0600 dB (need at least -0.05 dB)",
        ),
        (0.0040, 32.0, -0.03, "FAIL", "PSNR 48.0 dB (need 50 dB); task PSNR -0.0300 dB"),
        (0.0009, None, None, "INCONCLUSIVE", "PSNR 60.9 dB; the cost is unknown"),
        (0.0040, None, None, "FAIL", "PSNR 48.0 dB (need 50 dB); the cost is unknown"),
        (math.inf, 32.0, None, "FAIL", "12 of 12 values are NaN or infinite"),
    ],
)
def test_gates(
    error: float, task_db: float | None, delta_db: float | None, status: str, said: str
) -> None:
    found = judge_half(numbers(error, task_db, delta_db), task_db, GATE)
    assert found[0] == status and found[1].startswith(said)


def test_patterns_must_only_stay_finite() -> None:
    # 0.1 x 255 x 0.25 + 3000 is stored in steps of 2, which conv2 multiplies by 5.
    graph = Residual(gain={0: 0.1}, bias={0: 3000}).model()
    wide, half = (HalfEmulation(g, 1, threads=1) for g in (graph, to_half(graph)))
    photograph, pattern = bright(3), replace(bright(3), kind="pattern", hr=None)
    assert check_half(wide, half, FACTS, [photograph], GATE).status == "FAIL"
    alone = check_half(wide, half, FACTS, [pattern], GATE)
    assert (alone.status, alone.numbers) == ("INCONCLUSIVE", None)
    assert alone.reason == "no photograph was given; choose a set with --data"
    assert alone.rows[0]["psnr_db"] < 60 and not alone.rows[0]["gated"]

    broken = HalfEmulation(to_half(Residual(gain={0: 1000}).model()), 1, threads=1)
    failed = check_half(wide, broken, FACTS, [bright(0), pattern], GATE)
    assert failed.status == "FAIL" and failed.reason == "9 of 120 values are NaN or infinite"
    noise = replace(pattern, kind="noise")
    assert check_half(wide, broken, FACTS, [bright(0), noise], GATE).status == "PASS"


def test_an_engine_that_refuses_an_input_fails() -> None:
    wide = HalfEmulation(Residual(1).model(), 1, threads=1)
    odd = Input("grey", "photograph", np.zeros((1, 1, 4, 4), np.float32))
    failed = check_half(wide, wide, FACTS, [odd], GATE)
    assert failed.status == "FAIL" and "float32 (N, 3, h, w)" in failed.reason
