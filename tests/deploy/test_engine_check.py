"""Edge E3: pictures within the gate of their precision, from an engine that says it runs as asked."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploy.engine_check import check_engine, gate_name
from deploy.engines import CPU_PROVIDER, CUDA_PROVIDER
from deploy.inputs import Input
from deploy.ort_engine import OrtEngine
from deploy.proof import Proof
from deploy.verdict import EdgeResult, read_gates
from srkd.errors import SrkdError
from srkd.types import Facts

if TYPE_CHECKING:
    from tests.deploy.conftest import _Exports

FACTS = Facts(
    scale=2,
    size_multiple=1,
    minimum_px=1,
    receptive_field_px=1,
    exact_tiling=True,
)
HR = np.random.default_rng(0).random((1, 3, 32, 32), dtype=np.float32)
LR = np.ascontiguousarray(HR[..., ::2, ::2])
PHOTO = Input("photo", "photograph", LR, HR)
PATTERN = Input("checkerboard", "pattern", LR[..., ::-1, :].copy())


def enlarge(lr: np.ndarray) -> np.ndarray:
    return lr.repeat(2, -1).repeat(2, -2)


class Graph:
    """Repeats every pixel: PSNR-Y 9 to 10 dB on noise."""

    scale = 2

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        return enlarge(lr)


class Altered:
    """The same and `offset` on top, on patterns `pattern_offset`; it says what `layers` says."""

    scale = 2

    def __init__(
        self, offset: float, layers: dict[str, int], pattern_offset: float = 0.0, place: str = "CPU"
    ) -> None:
        self.offset, self.pattern_offset = np.float32(offset), np.float32(pattern_offset)
        self.layers, self.place = layers, place

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        return enlarge(lr) + (self.offset if np.array_equal(lr, LR) else self.pattern_offset)

    def proof(self, lr: np.ndarray) -> Proof:
        return Proof(self.layers, "CPU", {self.place: sum(self.layers.values())})


def check(engine: Altered, precision: str, inputs: list[Input] | None = None) -> EdgeResult:
    gate = read_gates()[gate_name(precision)]
    return check_engine(Graph(), engine, FACTS, inputs or [PHOTO, PATTERN], gate, precision)


@pytest.mark.parametrize(
    ("precision", "offset", "status"),
    [
        # An offset of 10^(-p/20) is a parity of p dB.
        ("fp32", 5e-6, "PASS"),  # 106 dB
        ("fp32", 1e-5, "INCONCLUSIVE"),  # 100 dB
        ("fp32", 2e-5, "FAIL"),  # 94 dB
        ("fp16", 5e-4, "PASS"),  # 66 dB
        ("fp16", 2e-3, "INCONCLUSIVE"),  # 54 dB
        ("fp16", 5e-3, "FAIL"),  # 46 dB
        ("bf16", 2e-3, "PASS"),
        ("bf16", float("nan"), "FAIL"),
        ("fp16", float("inf"), "FAIL"),
    ],
)
def test_gates(precision: str, offset: float, status: str) -> None:
    result = check(Altered(offset, {precision: 9}), precision)
    assert (result.edge, result.status) == ("E3", status), result.reason
    if not np.isfinite(offset):
        assert "3072 of 6144 values are NaN or infinite" in result.reason


def test_the_bound_rises_with_the_network() -> None:
    # A picture that the graph already gets right to 46 dB: 71 dB are needed, 66 are there.
    near = replace(PHOTO, hr=enlarge(LR) + np.float32(5e-3))
    result = check(Altered(-5e-4, {"fp16": 9}), "fp16", [near])
    # 20 log10(5.5 / 5) = 0.83 dB
    assert result.status == "FAIL" and "task PSNR -0.8" in result.reason
    result = check(Altered(5e-4, {"fp16": 9}), "fp16", [near])  # towards the original
    assert result.status == "INCONCLUSIVE" and "(need 7" in result.reason
    assert "task PSNR +0.9" in result.reason


def test_what_it_costs_is_judged_in_bf16() -> None:
    near = replace(PHOTO, hr=enlarge(LR) + np.float32(5e-3))
    costly = check(Altered(-5e-4, {"bf16": 9}), "bf16", [near])
    assert costly.status == "FAIL" and "task PSNR -0.8" in costly.reason
    assert check(Altered(5e-4, {"bf16": 9}), "bf16", [near]).status == "PASS"


def test_without_an_original_the_cost_is_unknown() -> None:
    plain = replace(PHOTO, hr=None)
    for precision in ("fp16", "bf16"):
        result = check(Altered(1e-5, {precision: 9}), precision, [plain])
        assert result.status == "INCONCLUSIVE" and "came with its original" in result.reason
    assert check(Altered(1e-6, {"fp32": 9}), "fp32", [plain]).status == "PASS"


def test_patterns_have_a_bound_of_their_own() -> None:
    assert check(Altered(0, {"fp16": 9}, pattern_offset=5e-3), "fp16").status == "PASS"  # 46 dB
    result = check(Altered(0, {"fp16": 9}, pattern_offset=2e-2), "fp16")  # 34 dB
    assert result.status == "FAIL" and "checkerboard: PSNR 34.0 dB (need 40 dB)" in result.reason


@pytest.mark.parametrize(
    ("precision", "layers", "said"),
    [
        ("fp32", {"bf16": 9}, "0 of 9 convolutions and matrix products run in fp32 (9 in bf16)"),
        ("fp32", {"fp32": 8, "bf16": 1}, "8 of 9"),
        ("fp16", {"fp32": 9}, "0 of 9"),
        ("fp16", {"fp32": 6, "fp16": 3}, "at least 50% must"),
    ],
)
def test_another_precision_fails_however_close_the_pictures_are(
    precision: str, layers: dict[str, int], said: str
) -> None:
    result = check(Altered(0, layers), precision)
    assert result.status == "FAIL" and said in result.reason


def test_islands_another_place_and_silence() -> None:
    assert check(Altered(0, {"fp32": 2, "fp16": 7}), "fp16").status == "PASS"
    result = check(Altered(0, {"fp32": 9}, place="elsewhere"), "fp32")
    assert result.status == "FAIL" and "asked for on CPU, run 9 on elsewhere" in result.reason
    result = check(Altered(0, {}), "fp32")
    assert result.status == "INCONCLUSIVE" and "does not say in which precision" in result.reason
    assert check(Altered(1, {}), "fp32").status == "FAIL"


def test_an_engine_that_refuses_a_picture_fails() -> None:
    class Refuses(Altered):
        def __call__(self, lr: np.ndarray) -> np.ndarray:
            raise SrkdError("too small")

    result = check(Refuses(0, {"fp32": 9}), "fp32")
    assert result.status == "FAIL" and result.reason == "photo: too small"


def test_onnx_runtime_on_the_cpu_is_not_compared_with_itself(exported: _Exports) -> None:
    engine = OrtEngine(exported("edsr_tiny").graph.path, 2, threads=1)
    gates = read_gates()
    result = check_engine(engine, engine, FACTS, [PHOTO], gates["E3"])
    assert result.status == "NOT RUN" and "E1 covers it" in result.reason
    result = check_engine(engine, engine, FACTS, [PHOTO], gates["E3_fp16"], "fp16")
    assert result.status == "NOT RUN" and "computes float16 in float32" in result.reason
    assert engine.provider == CPU_PROVIDER != CUDA_PROVIDER
