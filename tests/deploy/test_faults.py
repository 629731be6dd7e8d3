"""Seeded faults fail on their edge, sound chains pass, and no edge is blamed for what float32 itself loses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from benchmarks.faults.chain import Other, Sound, edited
from benchmarks.faults.seeded import FAULTS, SIZES, check
from deploy.comparison import Float32
from deploy.engine_check import check_engine, gate_name
from deploy.half import spoiled_constants, to_half
from deploy.inputs import Input, build_inputs
from deploy.parity import check_export, verify
from deploy.proof import Proof
from deploy.torch_engines import DoubleTorchEngine, TorchEngine
from deploy.verdict import EDGES, read_gates
from srkd.types import Facts

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploy.inputs import Photo
    from deploy.verdict import EdgeResult
    from tests.deploy.conftest import _Exports

SHARED = {"edsr": "edsr_tiny", "rcan": "rcan_a"}


@pytest.fixture(scope="module")
def sound(
    exported: _Exports,
    photographs: dict[int, list[Photo]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Sound]:
    """`sound("edsr")`: the chain of a network that all tests share."""
    made: dict[str, Sound] = {}

    def get(family: str) -> Sound:
        if family not in made:
            shared = exported(SHARED[family])
            network: Any = shared.model.network
            photos = photographs[shared.model.scale]
            folder = tmp_path_factory.mktemp(family)
            made[family] = Sound(network, onnx.load(shared.graph.path), folder, photos)
        return made[family]

    return get


# --- faults and sound chains ----------------------------------------------------------------------

# The others are in test_parity.py, test_rescale.py and benchmarks/parity_faults.py.
CHOSEN = (
    "range of the output left as it was",
    "gates of channel attention not undone",
    "rows of sub-pixels flipped",
    "overflow in one block without island",
    "island's weights rounded to float16",
    "weights rounded to bf16 before float16",
    "TF32 rounding in an fp32 engine",
    "another provider than asked",
    "result of the previous picture",
    "second image of a batch ignored",
    "last column of odd widths missing",
    "one buffer for all results",
    "a tile that failed left black",
    "a tile that failed left black, fp16",
)


@pytest.mark.parametrize("name", CHOSEN)
def test_faults_fail_on_their_edge(name: str, sound: Callable[[str], Sound]) -> None:
    fault = FAULTS[name]
    found = check(fault, sound(fault.network))
    assert (found.verdict, found.blame) == ("FAIL", fault.edge)


def test_every_edge_has_faults() -> None:
    edges = [fault.edge for fault in FAULTS.values()]
    assert all(edges.count(edge.name) >= 2 for edge in EDGES) and len(edges) >= 30


@pytest.mark.parametrize("family", SHARED)
def test_sound_chains_pass(family: str, sound: Callable[[str], Sound]) -> None:
    """The whole chain of an fp16 export: the engine that claims float16 is the emulation."""
    s = sound(family)
    half = s.halved(to_half(s.graph)).half
    assert half is not None
    engine = Other(s.scale, half, Proof({"fp16": 9}, "CPU", {"CPU": 9}))
    chain = s.chain(precision="fp16", half=half, engine=engine)
    found = verify(chain, s.facts, build_inputs(s.photos, SIZES, s.facts), s.photos)
    ran = {e.edge: e.status for e in found.edges if e.status != "NOT RUN"}
    assert found.verdict == "PASS" and {"E1", "E2", "E3", "E5"} <= set(ran)


# --- constants of a float16 graph -----------------------------------------------------------------


def test_constants_of_a_conversion(sound: Callable[[str], Sound]) -> None:
    graph = sound("edsr").graph
    half = to_half(graph, ["groups.1"])
    assert spoiled_constants(graph, half) == []
    step = edited(half, tail__last__weight_fp16=lambda w: np.nextafter(w, np.float16(9)))
    assert spoiled_constants(graph, step) == ["tail.last.weight_fp16"]
    island = edited(half, groups__1__conv1__bias=lambda b: b.astype(np.float16))
    assert spoiled_constants(graph, island) == ["groups.1.conv1.bias"]


def test_a_single_number_must_not_vanish() -> None:
    def graph(value: np.ndarray) -> onnx.ModelProto:
        tensor = onnx.numpy_helper.from_array(value, "guard")
        return onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor]))

    guard, two = np.array([1e-12], np.float32), np.array([1e-12, 1], np.float32)
    assert spoiled_constants(graph(guard), graph(guard.astype(np.float16))) == ["guard"]
    assert spoiled_constants(graph(two), graph(two.astype(np.float16))) == []  # weights may


# --- what float32 itself loses --------------------------------------------------------------------

FACTS = Facts(scale=1, receptive_field_px=1, exact_tiling=True)
LR = np.random.default_rng(0).random((1, 3, 24, 24), dtype=np.float32)
PHOTO = Input("photo", "photograph", LR, LR)
BOARD = Input("checkerboard", "pattern", np.ascontiguousarray(LR[..., ::-1]))


@dataclass
class Off:
    """The picture itself, off by `photo` on the photograph and by `board` on the checkerboard."""

    photo: float = 0.0
    board: float = 0.0
    scale: int = 1

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        return lr + np.float32(self.photo if np.array_equal(lr, LR) else self.board)


# Float32 is 0.01 from float64 on both.
LOST = Float32(Off(), Off(0.01, 0.01))


def e1(engine: Off, float32: Float32 | None = LOST) -> EdgeResult:
    inputs = [PHOTO, BOARD]
    return check_export(Off(), engine, FACTS, inputs, 8, read_gates()["E1"], float32)[0]


def e3(engine: Off, precision: str, float32: Float32 | None = LOST) -> EdgeResult:
    told = Other(1, engine, Proof({precision: 9}, "CPU", {"CPU": 9}))
    gate = read_gates()[gate_name(precision)]
    return check_engine(Off(), told, FACTS, [PHOTO, BOARD], gate, precision, float32)


@pytest.mark.parametrize(
    ("board", "status"), [(0.02, "PASS"), (0.07, "PASS"), (0.09, "FAIL"), (np.nan, "FAIL")]
)
def test_patterns_count_in_errors_of_float32(board: float, status: str) -> None:
    """Up to eight times what float32 loses; what is not finite never."""
    for result in (e1(Off(board=board)), e3(Off(board=board), "fp32")):
        assert result.status == status, result.reason
    if status == "PASS":
        times = f"; checkerboard: {100 * board:.0f} times what float32 itself loses on it"
        assert times in e1(Off(board=board)).reason


def test_photographs_and_unknown_losses_are_not_forgiven() -> None:
    assert e1(Off(photo=0.02)).status == e3(Off(photo=0.02), "fp32").status == "FAIL"
    for nothing in (None, Float32(Off(), Off())):
        assert e1(Off(board=0.02), nothing).status == "FAIL"
        assert e3(Off(board=0.02), "fp32", nothing).status == "FAIL"


def test_float16_loses_8192_times_as_much() -> None:
    small = Float32(Off(), Off(board=1e-6))  # 8 * 8192 * 1e-6 = 0.066
    assert e3(Off(board=0.06), "fp16", small).status == "PASS"  # 24 dB
    assert e3(Off(board=0.07), "fp16", small).status == "FAIL"


def test_one_spike_on_a_pattern_is_not_forgiven() -> None:
    """Max abs within the bound does not make up for rms beyond it, nor the other way round."""

    class Spike(Off):
        def __call__(self, lr: np.ndarray) -> np.ndarray:
            sr = super().__call__(lr).copy()
            sr[0, 0, 0, 0] += np.float32(self.photo)
            return sr

    spike = Float32(Off(), replace(Spike(), photo=1.0))
    # rms of a spike of 1 among 1728 values is 0.024
    assert e1(Off(board=0.15), spike).status == "PASS"  # 6.2 times
    assert e1(Off(board=0.25), spike).status == "FAIL"  # 10.4 times in rms, 0.25 in max abs


def test_a_network_in_float64() -> None:
    class Cancels(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 1e8) - 1e8

    assert np.abs(DoubleTorchEngine(Cancels(), 1)(LR) - LR).max() < 1e-7
    assert set(np.unique(TorchEngine(Cancels(), 1)(LR))) == {0.0}  # float32 has steps of 8 there


def test_a_network_that_knows_no_float64_is_not_forgiven() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.conv2d(x, torch.ones(3, 3, 1, 1))

    fixed = Float32(TorchEngine(Fixed(), 1), DoubleTorchEngine(Fixed(), 1))
    assert e1(Off(board=0.02), fixed).status == "FAIL"


def test_the_fault_of_an_ill_conditioned_network_shows_on_photographs(
    sound: Callable[[str], Sound],
) -> None:
    """A network lost on every pattern: an error there is forgiven, a wrong weight is still found."""
    s = sound("edsr")
    inputs = build_inputs(s.photos, SIZES, s.facts)
    patterns = {i.lr.tobytes() for i in inputs if i.kind == "pattern"}

    def lost(lr: np.ndarray) -> np.ndarray:
        return s.engine(lr) + np.float32(0.1 * (lr.tobytes() in patterns))

    chain = s.chain(engine=Other(s.scale, lost), exact=Other(s.scale, lost))
    assert verify(chain, s.facts, inputs, s.photos).verdict == "PASS"
    wrong = FAULTS["one weight tensor off by 1 %"].spoil(s)
    found = verify(replace(wrong, exact=chain.exact), s.facts, inputs, s.photos)
    assert (found.verdict, found.blame) == ("FAIL", "E1")
