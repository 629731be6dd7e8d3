"""A collapsed tail is the chain that it comes of, to the outermost pixel, in the network and in the exported file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest
import torch
from torch import nn

import deploy.graph
from deploy.collapse import LEAST_PX, CollapsedTail, collapse_tail, export_facts
from deploy.export import export, main
from deploy.graph import export_graph
from srkd.networks import build, build_family

if TYPE_CHECKING:
    from tests.deploy.conftest import _Exports


def chain(*factors: int, channels: int = 4) -> list[nn.Module]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for r in factors:
        layers += [nn.Conv2d(channels, channels * r * r, 3, padding=1), nn.PixelShuffle(r)]
    return [*layers, nn.Conv2d(channels, 3, 3, padding=1)]


@pytest.mark.parametrize("factors", [(2,), (3,), (4,), (2, 2), (3, 2)])
def test_nine_convolutions_give_what_the_chain_gives(factors: tuple[int, ...]) -> None:
    layers = chain(*factors)
    whole = CollapsedTail(layers)
    for h, w in ((3, 3), (3, 8), (4, 3), (5, 6), (9, 7)):
        x = torch.randn(2, 4, h, w)
        torch.testing.assert_close(whole(x), nn.Sequential(*layers)(x), rtol=1e-4, atol=1e-5)


def test_weights_by_hand() -> None:
    """One channel, 1 everywhere, x2: at the top left the chain sees less of the image, and zeros beyond it."""
    layers = chain(2, channels=1)
    layers[-1] = nn.Conv2d(1, 1, 3, padding=1)
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.ones_(parameter)
    whole = CollapsedTail(layers)
    corner, middle = whole.get_submodule("top_left"), whole.get_submodule("middle_middle")
    assert isinstance(corner, nn.Conv2d) and isinstance(middle, nn.Conv2d)
    # Output (0, 0) sums the places (0, 0), (0, 1), (1, 0), (1, 1) of pixel (0, 0), each the sum of its 2x2 pixels.
    assert corner.weight[0, 0].tolist() == [[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
    assert corner.bias is not None and corner.bias[0] == 4 + 1
    # Inside it also sums a row and column of the pixels above and to the left.
    assert middle.weight[0, 0, 2].tolist() == [3.0, 9.0, 9.0, 6.0, 0.0]
    assert middle.bias is not None and middle.bias[0] == 9 + 1


NETWORKS = {
    "edsr_tiny": lambda: build("edsr_tiny", 4),
    "edsr x3": lambda: build("edsr_tiny", 3),
    "rcan_a": lambda: build("rcan_a", 4),
    "rdn_tiny": lambda: build("rdn_tiny", 4),
    "han_tiny": lambda: build("han_tiny", 4),
    "san_tiny": lambda: build("san_tiny", 4),
    "swinir": lambda: build_family("swinir", {"scale": 4, "channels": 12, "depths": (2,)}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_stay_the_same(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    whole = collapse_tail(network)
    assert whole is not None and not whole.training
    assert sum(isinstance(m, CollapsedTail) for m in whole.modules()) == 1
    lr = torch.rand(1, 3, 13, 18)
    with torch.no_grad():
        torch.testing.assert_close(whole(lr), network(lr), rtol=1e-4, atol=1e-5)
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize(
    ("name", "scale"),
    [("edsr_tiny", 2), ("rlfn", 4), ("smfanet", 4), ("bsrn", 4), ("swinir_lightweight", 4)],
)
def test_other_tails_are_left_alone(name: str, scale: int) -> None:
    """x2 gains nothing; the others have one convolution before the shuffle and none behind."""
    assert collapse_tail(build(name, scale)) is None


def test_what_is_exported(exported: _Exports, tmp_path: Path) -> None:
    """rcan_a is x3 here; a picture of `LEAST_PX` is the smallest."""
    made = exported("rcan_a")
    assert made.graph.collapsed
    names = {i.name for i in onnx.load(made.graph.path).graph.initializer}
    assert "tail.upsample.collapsed.middle_middle.weight" in names
    assert not any(name.startswith("tail.last") for name in names)
    assert export_facts(made.model, staged=False).minimum_px == LEAST_PX
    assert export_facts(made.model, staged=True) == made.model.facts
    assert not exported("edsr_tiny").graph.collapsed

    staged = export_graph(made.model, tmp_path / "staged.onnx", staged=True)
    assert not staged.collapsed
    names = {i.name for i in onnx.load(staged.path).graph.initializer}
    assert {"tail.upsample.0.weight", "tail.last.weight"} <= names


def test_the_command(
    run_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sidecar names the smallest picture, what was done, and how to have it otherwise."""
    words = [str(run_folders["rcan_a"]), "--engine", "onnx", "--size", "24x24", "--out"]
    assert main([*words, str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    sidecar = json.loads(Path(result["sidecar"]).read_text())
    assert result["verdict"] == "PASS"
    assert sidecar["model"]["upsampling"] == "collapsed"
    assert sidecar["facts"]["minimum_px"] == LEAST_PX
    assert "--staged" not in sidecar["rebuild"]
    assert main([*words, str(tmp_path), "--staged", "--overwrite", "--no-parity", "--quiet"]) == 0
    sidecar = json.loads(Path(result["sidecar"]).read_text())
    assert sidecar["model"]["upsampling"] == "as trained"
    assert sidecar["facts"]["minimum_px"] == 1 and "--staged" in sidecar["rebuild"]


def test_a_wrong_corner_is_caught(
    run_folders: dict[str, Path],
    exported: _Exports,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The parity check compares with the network as it was trained."""
    graph = onnx.load(exported("rcan_a").graph.path)
    (bias,) = (i for i in graph.graph.initializer if i.name.endswith("bottom_left.bias"))
    values = onnx.numpy_helper.to_array(bias) + 5.0  # of 255
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))

    def faulty(model: object, path: Path, *_: object, **__: object) -> deploy.graph.Graph:
        onnx.save(graph, path)
        return replace(exported("rcan_a").graph, path=path)

    monkeypatch.setattr(deploy.graph, "export_graph", faulty)
    found = export(run_folders["rcan_a"], "onnx", out=tmp_path, quiet=True)
    assert found.verdict == "FAIL" and found.record is not None
    assert found.record["blame"] == "E1"
