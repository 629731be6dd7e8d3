"""The gate lets sound exports through and stops every seeded fault, on the right edge."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import srkd.tiling
from deploy import parity
from deploy.difference import difference
from deploy.graph import Graph, export_graph
from deploy.inputs import build_inputs
from deploy.making import PrecisionPlan
from deploy.ort_engine import OrtEngine
from deploy.parity import Chain, verify
from deploy.proof import Proof
from deploy.report import render, worst_picture
from deploy.sizes import DEFAULT_SIZES, parse_sizes
from deploy.torch_engines import TorchEngine
from deploy.verdict import Gate, judge, read_gates
from srkd.errors import SrkdError
from srkd.models import load_model, shipped_models
from srkd.networks import build_family
from srkd.types import Limits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deploy.inputs import Photo
    from deploy.parity import Parity
    from srkd.loaded import LoadedModel
    from srkd.networks.base import Network
    from tests.deploy.conftest import _Exports

SMALL = parse_sizes("16x16:40x44:64x64")
Photos = dict[int, list["Photo"]]


@dataclass(frozen=True)
class Exported:
    model: LoadedModel
    graph: Graph


def check(
    made: Exported, photos: list[Photo], graph: Path | None = None, sizes: Any = SMALL
) -> Parity:
    model = made.model
    engine = OrtEngine(graph or made.graph.path, model.scale, threads=1)
    inputs = build_inputs(photos, sizes, model.facts)
    chain = Chain(TorchEngine(model.network, model.scale), engine, engine)
    return verify(chain, model.facts, inputs, photos)


# --- sound networks -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["edsr_tiny", "rcan_a", "edsr_mlperf", "swinir_small"])
def test_sound_networks_pass(name: str, exported: _Exports, photographs: Photos) -> None:
    made = exported(name)
    found = check(made, photographs[made.model.scale])
    exact = made.model.facts.exact_tiling
    assert found.verdict == "PASS" and found.blame is None
    status = {e.edge: e.status for e in found.edges}
    ran = {"E1": "PASS", "E4": "PASS" if exact else "NOT RUN", "E5": "PASS"}
    assert status == {**dict.fromkeys(("E0", "E2", "E3"), "NOT RUN"), **ran}
    assert all(e.reason for e in found.edges)

    e1 = found.edge("E1")
    assert e1.numbers is not None and 0 < e1.numbers.max_abs < 5e-6
    shapes = {row["input"].rsplit(" ", 1)[-1] for row in e1.rows}
    assert {"16x16", "40x44", "64x64"} < shapes
    assert any(row["input"].startswith("batch of 2") for row in e1.rows)
    assert found.task is not None and found.task.photographs == 8
    assert abs(found.task.delta_db) < 1e-3


def test_tiles_are_really_cut(exported: _Exports, photographs: Photos) -> None:
    """Tiles of a network that sees the whole picture cannot be exact, or E5 checked nothing."""
    made = exported("rcan_a")
    e5 = check(made, photographs[3]).edge("E5")
    assert e5.numbers is not None and e5.numbers.max_abs > 1e-5
    assert e5.seam is not None and 0 < e5.seam < 0.25


# --- seeded faults --------------------------------------------------------------------------------


def edit(made: Exported, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    proto = onnx.load(made.graph.path)
    change(proto)
    path = folder / "faulty.onnx"
    onnx.save(proto, path)
    return path


def edit_weight(name: str, change: Callable[[np.ndarray], None]) -> Callable[..., None]:
    def edit_proto(proto: onnx.ModelProto) -> None:
        (tensor,) = [t for t in proto.graph.initializer if t.name == name]
        value = numpy_helper.to_array(tensor).copy()
        before = value.copy()
        change(value)
        assert not np.array_equal(value, before)
        tensor.CopyFrom(numpy_helper.from_array(value, name))

    return edit_proto


def wrong_shuffle(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        if node.op_type == "DepthToSpace":
            next(a for a in node.attribute if a.name == "mode").s = b"DCR"


def baked_size(proto: onnx.ModelProto) -> None:
    for dim, size in zip(
        proto.graph.input[0].type.tensor_type.shape.dim, (1, 3, 40, 44), strict=True
    ):
        dim.dim_value = size


def swap_channels(weight: np.ndarray) -> None:
    weight[:] = weight[:, ::-1].copy()


def one_per_cent(weight: np.ndarray) -> None:
    middle = np.argsort(np.abs(weight).ravel())[weight.size // 2]
    weight.ravel()[middle] *= 1.01


def drop(bias: np.ndarray) -> None:
    bias[:] = 0


FAULTS = {
    "pixel shuffle in DCR order": wrong_shuffle,
    "swapped input channels": edit_weight("head.conv.weight", swap_channels),
    "dropped bias, first layer": edit_weight("head.conv.bias", drop),
    "dropped bias, deep layer": edit_weight("groups.2.conv2.bias", drop),
    "dropped bias, last layer": edit_weight("tail.last.bias", drop),
    "one weight off by 1 %, first layer": edit_weight("head.conv.weight", one_per_cent),
    "one weight off by 1 %, last layer": edit_weight("tail.last.weight", one_per_cent),
    "not a number": edit_weight("groups.1.conv1.bias", lambda b: b.fill(np.nan)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_the_graph_fail_e1(
    fault: str, exported: _Exports, photographs: Photos, tmp_path: Path
) -> None:
    made = exported("edsr_tiny")
    found = check(made, photographs[2], edit(made, tmp_path, FAULTS[fault]))
    assert found.verdict == "FAIL" and found.blame == "E1"
    if fault != "not a number":
        # A wrong graph still agrees with itself: shapes and tiles are not to blame.
        assert found.edge("E4").status == found.edge("E5").status == "PASS"


def test_baked_size_fails_with_the_input_named(
    exported: _Exports, photographs: Photos, tmp_path: Path
) -> None:
    made = exported("edsr_tiny")
    found = check(made, photographs[2], edit(made, tmp_path, baked_size))
    assert (found.verdict, found.blame) == ("FAIL", "E1")
    assert "16x16" in found.edge("E1").reason  # the first input of another size
    assert found.edge("E4").status == "FAIL"


class WrongAtOtherWidths:
    """An engine tuned for one shape: at any other width a column is shifted."""

    def __init__(self, engine: Any, width: int) -> None:
        self.engine, self.width, self.scale = engine, width, engine.scale

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        sr = self.engine(lr)
        return sr if lr.shape[-1] == self.width else sr + np.float32(2e-5)


def test_an_engine_that_depends_on_the_shape_fails_e4(
    exported: _Exports, photographs: Photos
) -> None:
    made = exported("edsr_tiny")
    facts, photos = made.model.facts, photographs[2]
    sound = OrtEngine(made.graph.path, 2, threads=1)
    gate = read_gates()["E4"]
    good = parity.check_shapes(sound, facts, photos, gate)
    (row,) = good.rows
    width = int(row["input"].split()[1].split("x")[1])
    bad = parity.check_shapes(WrongAtOtherWidths(sound, width), facts, photos, gate)
    assert (good.status, bad.status) == ("PASS", "FAIL")
    # The receptive field is tight enough that claiming less shows.
    liar = replace(facts, receptive_field_px=facts.receptive_field_px - 9)
    assert parity.check_shapes(sound, liar, photos, gate).status == "FAIL"


def far_sighted() -> Network:
    """A network whose output depends strongly on the very edge of its receptive field.

    Random weights fade towards that edge; here every 3x3 kernel is a shift by one pixel, so the output is
    the image moved by one pixel per layer.
    """
    network = build_family("edsr", {"scale": 2, "channels": 3, "blocks": 1, "mean_shift": False})
    with torch.no_grad():
        for value in network.parameters():
            value.zero_()
            if value.ndim == 4:
                for i in range(value.shape[0]):
                    value[i, i * 3 // value.shape[0], 2, 2] = 1.0
    return network.eval()


@pytest.mark.parametrize(
    ("sizes", "e4", "e5"),
    [
        ("16x16:64x64:512x512", "PASS", "PASS"),
        ("64x64:64x64:64x64", "NOT RUN", "PASS"),  # tiles against the network in torch
        ("24x24:24x24:24x24", "NOT RUN", "NOT RUN"),  # the halo alone is as large
        ("170x180:170x180:400x420", "PASS", "PASS"),
    ],
)
def test_an_engine_built_for_a_range_of_sizes_sees_no_other(
    sizes: str, e4: str, e5: str, exported: _Exports, photographs: Photos
) -> None:
    """As TensorRT engines are; every picture of the check lies in the range."""
    made, wanted = exported("edsr_tiny"), parse_sizes(sizes)
    low, high = wanted.smallest, wanted.largest

    class Built(OrtEngine):
        def __call__(self, lr: np.ndarray) -> np.ndarray:
            h, w = lr.shape[2:]
            if not (low[0] <= h <= high[0] and low[1] <= w <= high[1]):
                raise SrkdError(f"built for {sizes}, got {h}x{w}")
            return super().__call__(lr)

    model, photos = made.model, photographs[2]
    engine = Built(made.graph.path, model.scale, threads=1)
    chain = Chain(TorchEngine(model.network, model.scale), engine, engine, limits=Limits(low, high))
    inputs = build_inputs(photos, wanted, model.facts, built=True)
    found = verify(chain, model.facts, inputs, photos)
    statuses = {edge.edge: edge.status for edge in found.edges}
    assert found.verdict == "PASS" and (statuses["E4"], statuses["E5"]) == (e4, e5)


def test_halo_off_by_one_fails_e5(photographs: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(TorchEngine):
        def proof(self, lr: np.ndarray) -> Proof:
            return Proof({"fp32": 1}, "cpu", {"cpu": 1})

    network, photos = far_sighted(), photographs[2]
    engine = Told(network, 2)
    chain = Chain(engine, engine, engine)
    inputs = build_inputs(photos, SMALL, network.facts)

    def verdict() -> tuple[Any, ...]:
        found = verify(chain, network.facts, inputs, photos)
        return found.verdict, found.blame, found.edge("E4").status

    assert verdict() == ("PASS", None, "PASS")
    halo = srkd.tiling.halo_px
    monkeypatch.setattr(srkd.tiling, "halo_px", lambda facts: halo(facts) - 1)
    assert verdict() == ("FAIL", "E5", "PASS")


def test_tiles_without_halo_show_a_seam(
    exported: _Exports, photographs: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("rcan_a")
    monkeypatch.setattr(srkd.tiling, "GLOBAL_HALO_PX", 0)
    monkeypatch.setattr(srkd.tiling, "OVERLAP_PX", 0)
    found = check(made, photographs[3])
    assert (found.verdict, found.blame) == ("FAIL", "E5")
    assert "seam score" in found.edge("E5").reason


# --- trained networks -----------------------------------------------------------------------------


def test_one_weight_of_a_trained_network(
    shared_data: Path, photographs: Photos, tmp_path: Path
) -> None:
    """The weight of median size in any layer, off by 1 %, never passes; the network itself does."""
    model = load_model(shared_data / "weights" / "edsr_f32b5_x2_mlperf.safetensors")
    made = Exported(model, export_graph(model, tmp_path / "sound.onnx"))
    found = check(made, photographs[2])
    assert found.verdict == "PASS"
    assert found.task is not None and found.task.torch_db > 30 and abs(found.task.delta_db) < 1e-3
    for name in ("head.conv.weight", "groups.0.conv2.weight", "tail.conv.weight"):
        path = edit(made, tmp_path, edit_weight(name, one_per_cent))
        # The smallest of these, 101 dB, is stopped as INCONCLUSIVE; both words exit 1.
        assert check(made, photographs[2], path).verdict in ("FAIL", "INCONCLUSIVE"), name


def test_a_trained_network_with_channel_attention_tiles_well(photographs: Photos) -> None:
    if "rcan_c_x4" not in shipped_models():
        pytest.skip("weights/rcan_c_x4 is not there; train it with scripts/distill.py")
    model = load_model("rcan_c_x4")
    engine = TorchEngine(model.network, 4)
    gate = read_gates()["E5_approximate"]
    found = parity.check_tiles(engine, model.facts, photographs[2], gate)
    assert found.status == "PASS"
    assert found.numbers is not None and found.numbers.psnr_db > 60


# --- verdicts -------------------------------------------------------------------------------------


def test_too_few_photographs_are_inconclusive(exported: _Exports, photographs: Photos) -> None:
    made = exported("edsr_tiny")
    found = check(made, photographs[2][:7])
    assert found.verdict == "INCONCLUSIVE" and found.blame is None
    assert "only 7 real photographs" in found.edge("E1").reason
    none = check(made, [])
    assert none.verdict == "INCONCLUSIVE" and none.edge("E5").status == "INCONCLUSIVE"


def test_noise_is_reported_and_gates_nothing(exported: _Exports, photographs: Photos) -> None:
    made = exported("edsr_tiny")
    reference = TorchEngine(made.model.network, 2)

    class WrongOnNoise:
        scale = 2

        def __call__(self, lr: np.ndarray) -> np.ndarray:
            return reference(lr) + np.float32(lr.std() > 0.28 and lr.shape[0] == 1)

    inputs = build_inputs(photographs[2], SMALL, made.model.facts)
    noise = inputs[-1]
    quiet = [i for i in inputs[:-1] if i.lr.std() <= 0.28]
    facts, gate = made.model.facts, read_gates()["E1"]
    result, _, _ = parity.check_export(reference, WrongOnNoise(), facts, [*quiet, noise], 8, gate)
    assert result.status == "PASS"
    assert result.rows[-1]["input"] == "noise" and result.rows[-1]["max_abs"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("error", "status"), [(0.0, "PASS"), (5e-5, "INCONCLUSIVE"), (0.05, "FAIL"), (np.nan, "FAIL")]
)
def test_three_outcomes(error: float, status: str) -> None:
    x = np.zeros((1, 3, 32, 32), np.float32)
    y = x.copy()
    y[0, 0, 0, 0] = error
    gate = Gate(pass_max_abs=1e-5, fail_max_abs=1e-3, pass_psnr_db=100, fail_psnr_db=60)
    got, reason = judge(difference(x, y), gate)
    assert got == status and reason


def test_psnr_alone_can_fail() -> None:
    x = np.zeros((1, 3, 8, 8), np.float32)
    gate = Gate(pass_max_abs=1.0, fail_max_abs=1.0, pass_psnr_db=60, fail_psnr_db=40)
    assert judge(difference(x, x + np.float32(0.0005)), gate)[0] == "PASS"
    status, reason = judge(difference(x, x + np.float32(0.005)), gate)  # 46 dB
    assert status == "INCONCLUSIVE" and "PSNR 46.0 dB (need 60 dB)" in reason
    status, reason = judge(difference(x, x + np.float32(0.05)), gate)  # 26 dB
    assert status == "FAIL" and "PSNR 26.0 dB (need 40 dB)" in reason


def test_gates_file_is_complete_and_ordered(tmp_path: Path) -> None:
    gates = read_gates()
    assert set(gates) == {
        *("E0", "E1", "E2", "E3", "E3_fp16", "E3_bf16", "E4", "E4_reduced"),
        *("E5_exact", "E5_torch", "E5_approximate"),
    }
    for gate in gates.values():
        if gate.pass_max_abs is not None:
            assert gate.fail_max_abs is not None and gate.pass_max_abs <= gate.fail_max_abs
        if gate.pass_psnr_db is not None:
            assert gate.fail_psnr_db is not None and gate.pass_psnr_db >= gate.fail_psnr_db
    assert gates["E5_exact"].pass_max_abs == 1e-6  # a promise of the design, not a choice
    broken = tmp_path / "gates.toml"
    broken.write_text("[E1]\npass_max = 1\n")
    with pytest.raises(SrkdError, match="cannot read the gates"):
        read_gates(broken)


def test_report_shows_the_failure(exported: _Exports, photographs: Photos, tmp_path: Path) -> None:
    made = exported("edsr_tiny")
    found = check(made, photographs[2], edit(made, tmp_path, wrong_shuffle))
    assert found.worst is not None
    pixels, gain = worst_picture(found.worst)
    assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    third = pixels.shape[1] // 3
    assert pixels[:, -third + 4 :].max() > 120 and gain >= 1  # the difference is in view
    record = {
        "model": "edsr_tiny",
        "engine": "ort",
        "precision": "fp32",
        "reference": "torch",
        "data": "builtin",
        "sizes": str(DEFAULT_SIZES),
        "worst_picture": {"file": "w.png", "edge": "E1", "input": found.worst.name, "gain": gain},
        "plan": PrecisionPlan().to_json(),
        **found.to_json(),
    }
    page = render({"x_fp32.onnx": record})
    head, table = page.split("| edge |", 1)
    assert "## x_fp32.onnx: **FAIL**, first failing edge: E1" in head
    assert all(f"| {name} |" in table for name in ("E0", "E1", "E2", "E3", "E4", "E5"))
    assert "![worst crop](w.png)" in page
    columns = {line.count("|") for line in page.splitlines() if line.startswith("| E")}
    assert columns == {5, 10}  # no text breaks the tables


class Wild(TorchEngine):
    """A network whose answer to the checkerboard is enlarged, with an error `by` on it."""

    def __init__(self, network: torch.nn.Module, scale: int, enlarge: float, by: float) -> None:
        super().__init__(network, scale)
        self.enlarge, self.by = enlarge, by

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        sr = super().__call__(lr)
        first = lr[..., 0, 0] != lr[..., 0, 1]
        checkerboard = bool(first.all()) and lr.min() == 0 and lr.max() == 1
        if not checkerboard:
            return sr
        sr = (sr - sr.min()) / (sr.max() - sr.min()) * np.float32(self.enlarge)
        sr[..., 0, 0] += np.float32(self.by)
        return sr


@pytest.mark.parametrize(("enlarge", "status"), [(1.0, "INCONCLUSIVE"), (5.0, "PASS")])
def test_errors_count_relative_to_the_range_of_the_output(
    exported: _Exports, photographs: Photos, enlarge: float, status: str
) -> None:
    """An error of 5e-5 is too much for a picture in [0, 1], and rounding for one that spans 5."""
    model = exported("edsr_tiny").model
    inputs = list(build_inputs(photographs[model.scale], SMALL, model.facts))
    engines = [Wild(model.network, model.scale, enlarge, by) for by in (0.0, 5e-5)]
    gate = read_gates()["E1"]
    result, _, _ = parity.check_export(*engines, model.facts, inputs, 8, gate)
    assert result.status == status, result.reason
    assert result.numbers is not None and result.numbers.max_abs == pytest.approx(5e-5, rel=0.05)
