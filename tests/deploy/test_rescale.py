"""Dividing a network by a power of two changes no bit of its output, and the audit says when it is needed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploy import audit as command
from deploy.float16 import HALF_MAX
from deploy.half_audit import HalfParity
from deploy.inputs import Input, patterns
from deploy.ranges import BlockRange, audit, block_names, table
from deploy.rescale import (
    ALLOWED,
    RESCALERS,
    WHY_NOT,
    check_rescale,
    choose_k,
    recentred,
    rescaled,
)
from deploy.torch_engines import TorchEngine
from deploy.verdict import read_gates
from srkd.errors import SrkdError
from srkd.images import write_png
from srkd.models import save_model
from srkd.networks import FAMILIES, build_family
from srkd.networks.swinir import SwinLayer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from srkd.networks.base import Network

E0 = read_gates()["E0"]
SMALL: dict[str, dict[str, Any]] = {
    "edsr": {"channels": 4, "blocks": 2, "residual_scale": 0.1},
    "rcan": {"channels": 8, "blocks": 1, "group_count": 2, "reduction": 4},
    "rdn": {"channels": 4, "blocks": 2, "layers": 2, "growth": 4},
    "rlfn": {"channels": 8, "mid_channels": 6, "blocks": 2, "esa_channels": 4},
    "smfanet": {"channels": 8, "blocks": 2},
    "swinir": {"channels": 12, "depths": (2, 1), "heads": 2},
    "bsrn": {"channels": 16, "blocks": 1},
    "san": {"channels": 8, "blocks": 1, "group_count": 1, "reduction": 4},
    "han": {"channels": 8, "blocks": 1, "group_count": 1, "reduction": 4},
}


@dataclass(frozen=True)
class Case:
    """A network whose features are made `factor` times larger than fresh weights make them.

    grown    ends of the names of weights that write features from what has a fixed range
    shrunk   of those that read features into a fixed range: the image, a gate
    """

    family: str
    factor: float
    grown: tuple[str, ...]
    shrunk: tuple[str, ...]
    more: tuple[tuple[str, Any], ...] = ()


HEAD = ("head.conv.weight",)
CASES = {
    "edsr": Case(
        "edsr", 30, ("conv1.weight", "conv2.weight"), ("tail.last.weight", "tail.upsample.0.weight")
    ),
    "edsr mobile": Case(
        "edsr", 1e4, HEAD, ("tail.conv.weight",), (("tail", "one_step"), ("mean_shift", False))
    ),
    "rcan": Case("rcan", 1e4, HEAD, ("tail.last.weight", "excite.weight")),
    "rdn": Case("rdn", 3e3, (*HEAD, "enter.weight"), ("tail.upsample.2.weight",)),
    "rlfn": Case("rlfn", 1e4, HEAD, ("tail.conv.weight", "excite.weight")),
    "smfanet": Case("smfanet", 1e6, ("merge.weight", "narrow.weight"), ("tail.conv.weight",)),
    "swinir": Case("swinir", 1e6, ("0.norm.weight", "proj.weight", "fc2.weight"), ()),
    "swinir one step": Case(
        "swinir", 1e6, ("0.norm.weight", "proj.weight", "fc2.weight"), (), (("tail", "one_step"),)
    ),
}


def fresh(family: str, **more: Any) -> Network:
    torch.manual_seed(0)
    network = build_family(family, {**SMALL[family], **more, "scale": 2}).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(
                "bias"
            ):  # fresh biases are small or zero, and are what a rule must not forget
                parameter.uniform_(-1, 1)
    return network


def huge(case: Case) -> Network:
    network = fresh(case.family, **dict(case.more))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(case.grown):
                parameter.mul_(case.factor)
            if name.endswith(case.shrunk):
                parameter.div_(case.factor)
    return network


def pictures() -> list[Input]:
    noise = np.random.default_rng(0).random((2, 3, 17, 18), dtype=np.float32)
    made = [Input(name, "pattern", lr) for name, lr in patterns(19, 16).items() if name[0] in "ca"]
    return [Input("photograph", "photograph", noise), *made]


def engines(*networks: nn.Module) -> tuple[TorchEngine, ...]:
    return tuple(TorchEngine(network, 2) for network in networks)


def top(ranges: Sequence[BlockRange]) -> float:
    return max(r.largest for r in ranges)


# --- the same output ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_not_one_bit_changes(name: str) -> None:
    network = huge(CASES[name])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert top(audit(network, pictures())) > 65504
    for k in (2, 16, 256):
        divided = rescaled(network, k)
        found = check_rescale(*engines(network, divided), pictures(), E0)
        assert (found.status, found.reason) == ("PASS", "bit-identical on 3 pictures")
        assert len(found.rows) == 3
    assert top(audit(divided, pictures())) < 65504
    strided = torch.from_numpy(pictures()[0].lr).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(network(strided), divided(strided))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_layer_norms_must_shrink_their_eps() -> None:
    network = fresh("swinir")
    divided = rescaled(network, 256)
    layers = [m for m in divided.modules() if isinstance(m, SwinLayer)]
    assert [layer.norm1.eps for layer in layers] == [1e-5 / 65536] * 3
    for layer in layers:
        layer.norm1.eps = layer.norm2.eps = 1e-5
    found = check_rescale(*engines(network, divided), pictures(), E0)
    assert found.status == "FAIL" and "need at most 1e-05" in found.reason


@pytest.mark.parametrize(
    ("family", "forgotten"),
    [
        ("edsr", "groups.1.conv2.bias"),
        ("rcan", "groups.0.blocks.0.attention.excite.weight"),
        ("rdn", "groups.2.mix.bias"),
        ("swinir", "groups.0.conv.bias"),
    ],
)
def test_one_forgotten_parameter_fails(family: str, forgotten: str) -> None:
    network = fresh(family)
    divided = rescaled(network, 16)
    divided.get_parameter(forgotten).data.copy_(network.get_parameter(forgotten).data)
    assert check_rescale(*engines(network, divided), pictures(), E0).status == "FAIL"


@dataclass
class Fixed:
    """An engine that gives a constant, or refuses."""

    value: float | None
    scale: int = 2

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        if self.value is None:
            raise SrkdError("no picture today.")
        n, c, h, w = lr.shape
        return np.full((n, c, self.scale * h, self.scale * w), self.value, np.float32)


@pytest.mark.parametrize(
    ("deployed", "status", "said"),
    [
        (Fixed(0.5), "PASS", "bit-identical on 3 pictures"),
        (Fixed(0.5 + 2**-20), "INCONCLUSIVE", "max abs 9.5e-07 (need at most 0)"),
        (Fixed(0.75), "FAIL", "max abs 0.25 (need at most 1e-05)"),
        (Fixed(math.nan), "FAIL", "NaN or infinite"),
        (Fixed(None), "FAIL", "photograph: no picture today."),
        (Fixed(0.5, scale=3), "FAIL", "the output is (2, 3, 51, 54), that of the trained network"),
    ],
)
def test_verdicts(deployed: Fixed, status: str, said: str) -> None:
    found = check_rescale(Fixed(0.5), deployed, pictures(), E0)
    assert found.edge == "E0" and found.status == status and said in found.reason


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 0, -2])
def test_only_powers_of_two(k: int) -> None:
    with pytest.raises(SrkdError, match=f"k = {k} is no power of two.*give 1, 2, 4"):
        rescaled(nn.Identity(), k)


def test_every_family_has_a_rule_or_a_reason() -> None:
    assert sorted([*RESCALERS, *WHY_NOT]) == sorted(FAMILIES)


@pytest.mark.parametrize(
    ("family", "why"), [("bsrn", "GELU"), ("han", "softmax"), ("san", "floor")]
)
def test_families_without_a_rule_say_why(family: str, why: str) -> None:
    network = fresh(family)
    with pytest.raises(SrkdError, match=f"family '{family}' cannot be rescaled exactly: .*{why}"):
        rescaled(network, 2)
    assert rescaled(network, 1) is not network


def test_foreign_networks_say_why() -> None:
    with pytest.raises(SrkdError, match=r"family 'Identity'.*not known.*k = 1"):
        rescaled(nn.Identity(), 2)


# --- the audit ------------------------------------------------------------------------------------


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class ByHand(nn.Module):
    """head 2x; groups.0: x - 1000 x; then, outside every block, times 1e-12."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 3, 1, bias=False)
        self.groups = nn.ModuleList([Unit()])
        eye = torch.eye(3)[:, :, None, None]
        self.head.weight.data = 2 * eye
        self.head.weight.data[0, 1] = (
            2.0**-15
        )  # beside three twos the only one a half stores with fewer bits
        self.groups[0].conv.weight.data = -1000 * eye

    def forward(self, x: Tensor) -> Tensor:
        return self.groups[0](self.head(x)) * 1e-12


def ones(value: float, kind: Any = "pattern") -> Input:
    return Input("bright" if value else "dark", kind, np.full((1, 3, 2, 2), value, np.float32))


def test_ranges_by_hand() -> None:
    found = audit(ByHand(), [ones(0.0), ones(1.0), ones(1e6, "noise")])
    by_name = {r.block: r for r in found}
    assert list(by_name) == ["head", "groups.0", "forward"]
    head, group, outside = found
    assert head == BlockRange("head", 2 + 2.0**-15, "convolution", "bright", 0.0, 0.25)
    assert group.operation == "convolution" and group.weights_subnormal == 0
    assert group.largest == pytest.approx(2000, rel=1e-4)
    assert group.share == pytest.approx(2000 / 65504, rel=1e-4)
    assert (outside.operation, outside.flushed) == ("mul", 1.0)
    assert outside.largest == pytest.approx(1998e-12, rel=1e-4)


def test_weights_count_as_stored() -> None:
    (head, *_) = audit(ByHand(), [ones(0.25)])
    assert (head.largest, head.operation, head.picture) == (2, "weights", "")


def test_logits_of_an_attention_count() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(2).transpose(1, 2)
            return F.scaled_dot_product_attention(rows, rows, rows, scale=1.0)

    (found,) = audit(nn.Sequential(Attention()), [ones(100.0)])
    assert (found.block, found.largest) == ("0", 3e4)


def test_a_mask_of_minus_infinity_does_not_count() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(2).transpose(1, 2)
            mask = torch.eye(rows.shape[1], dtype=torch.bool)
            return F.scaled_dot_product_attention(rows, rows, rows, attn_mask=mask, scale=1.0)

    (found,) = audit(nn.Sequential(Masked()), [ones(100.0)])
    assert (found.block, found.largest) == ("0", 3e4)


def test_values_that_are_not_finite_are_infinite() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 1).sqrt()

    found = audit(Root(), [ones(0.5)])
    assert found[0].largest == math.inf and table(found)[0]["largest"] is None
    with pytest.raises(SrkdError, match=r"block forward computes values that are not finite.*sqrt"):
        choose_k(found)


def test_an_audit_needs_pictures() -> None:
    with pytest.raises(SrkdError, match="no photograph and no pattern"):
        audit(ByHand(), [ones(0.5, "noise")])


def test_blocks_are_units_not_layers() -> None:
    assert block_names(fresh("rcan")) == (
        "head",
        "groups.0",
        "groups.0.blocks.0",
        "groups.1",
        "groups.1.blocks.0",
        "groups.2",
        "tail",
    )


def test_table_is_plain() -> None:
    row = BlockRange("tail", 16376.0, "mul", "white", 0.5, 0.25)
    assert json.loads(json.dumps(table([row]))) == [
        {
            "block": "tail",
            "largest": 16376.0,
            "operation": "mul",
            "picture": "white",
            "flushed": 0.5,
            "weights_subnormal": 0.25,
            "share": 0.25,
        }
    ]


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("largest", "k"),
    [
        ([1.0, 511.75], 1),
        ([1.0, 512.0], 2),
        ([1.0, HALF_MAX], 128),
        ([1.0, 1e6], 1024),  # 2048 would bring 1e6 within 511.75, but 1 below 2^-10
        ([0.0, 1e6], 2048),  # a block of zeros has no range to lose
        ([2.0**-10, 1e6], 1),
    ],
)
def test_k_by_hand(largest: list[float], k: int) -> None:
    assert choose_k([BlockRange(str(i), v, "mul", "", 0, 0) for i, v in enumerate(largest)]) == k


def test_recentring() -> None:
    network = huge(CASES["edsr"])
    found = recentred(network, pictures())
    assert found.k >= 128 and f"divided by {found.k}" in found.reason
    assert top(found.before) > 65504 and top(found.after) <= ALLOWED
    assert check_rescale(*engines(network, found.network), pictures(), E0).status == "PASS"
    lr = torch.from_numpy(pictures()[0].lr).half()
    with torch.no_grad():
        assert found.network.half()(lr).isfinite().all()
        assert not network.half()(lr).isfinite().all()


def test_nothing_to_do() -> None:
    found = recentred(fresh("rdn"), pictures())
    assert found.k == 1 and "within 511.75" in found.reason and found.after == found.before


def test_no_rule_keeps_the_network_and_says_why() -> None:
    network = fresh("bsrn")
    network.get_parameter("head.conv.pointwise.weight").data.mul_(1e6)
    found = recentred(network, pictures())
    assert found.k == 1 and "reaches" in found.reason and "GELU" in found.reason
    assert top(found.after) > ALLOWED


def test_a_floor_that_leaves_no_room_is_named() -> None:
    toy = ByHand()
    toy.family = "edsr"  # type: ignore[assignment]
    found = recentred(toy, [ones(1.0)])
    assert found.k == 1 and "forward, which reaches 2e-09, would fall below 0.00098" in found.reason


def test_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "run", huge(CASES["edsr"]), {})
    photo = np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)
    (tmp_path / "photos").mkdir()
    write_png(tmp_path / "photos" / "one.png", photo)
    words = [str(tmp_path / "run"), "--data", str(tmp_path / "photos")]
    assert command.main(words) == 0
    out = capsys.readouterr().out
    assert "after division by" in out and "E0 PASS: bit-identical" in out and "groups.1" in out
    # Beyond 65504 the trained network is lost in float16; divided, it is a picture.
    lost, kept = (line for line in out.splitlines() if line.startswith("fp16 "))
    assert lost.startswith("fp16 as trained: ") and "photograph" not in lost
    assert "worst photograph " in kept and kept.endswith(", 0 values not finite")

    # The exporter takes seconds: what it is for is seen above.
    measured = HalfParity(math.inf, None, 0)
    monkeypatch.setattr("deploy.half_audit.half_parity", lambda *_: measured)
    save_model(tmp_path / "calm", fresh("edsr"), {})
    words[0] = str(tmp_path / "calm")
    assert command.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["k"] == 1 and told["edge"]["reason"] == "the network stays as it is"
    assert told["before"] == told["after"] and max(row["share"] for row in told["before"]) < 1
    assert told["fp16"] == {"as trained": {"psnr_db": None, "task_delta_db": None, "nonfinite": 0}}
