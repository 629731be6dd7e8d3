"""Published files of BSRN, RLFN and SMFANet: names as their authors have them, every tensor used."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from srkd.checkpoint import read_checkpoint
from srkd.errors import SrkdError
from srkd.networks import build_family

Shapes = dict[str, tuple[int, ...]]


def conv(name: str, c_out: int, c_in: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (c_out, c_in, kernel, kernel), f"{name}.bias": (c_out,)}


def separable(name: str, c_out: int, c_in: int) -> Shapes:
    return {f"{name}.pw.weight": (c_out, c_in, 1, 1), **conv(f"{name}.dw", c_out, 1, 3)}


# Written from the published files, not from our table.
def bsrn(scale: int, c: int = 32, blocks: int = 2) -> Shapes:
    shapes = separable("fea_conv", c, 12)
    for i in range(1, blocks + 1):
        for k in (1, 2, 3):
            shapes |= conv(f"B{i}.c{k}_d", c // 2, c, 1) | separable(f"B{i}.c{k}_r", c, c)
        shapes |= separable(f"B{i}.c4", c // 2, c) | conv(f"B{i}.c5", c, 2 * c, 1)
        f, esa = c // 4, f"B{i}.esa"
        shapes |= conv(f"{esa}.conv1", f, c, 1) | conv(f"{esa}.conv_f", f, f, 1)
        for name in ("conv_max", "conv2", "conv3", "conv3_"):
            shapes |= separable(f"{esa}.{name}", f, f)
        shapes |= conv(f"{esa}.conv4", c, f, 1)
        shapes |= conv(f"B{i}.cca.conv_du.0", c // 16, c, 1)
        shapes |= conv(f"B{i}.cca.conv_du.2", c, c // 16, 1)
    shapes |= conv("c1", c, blocks * c, 1) | separable("c2", c, c)
    return shapes | conv("upsampler.upsampleOneStep.0", 3 * scale**2, c, 3)


def rlfn(scale: int, c: int = 10, mid: int = 12, blocks: int = 2) -> Shapes:
    shapes = conv("conv_1", c, 3, 3)
    for i in range(1, blocks + 1):
        block, esa = f"block_{i}", f"block_{i}.esa"
        shapes |= conv(f"{block}.c1_r", mid, c, 3) | conv(f"{block}.c2_r", mid, mid, 3)
        shapes |= conv(f"{block}.c3_r", c, mid, 3) | conv(f"{block}.c5", c, c, 1)
        shapes |= conv(f"{esa}.conv1", 4, c, 1) | conv(f"{esa}.conv_f", 4, 4, 1)
        shapes |= conv(f"{esa}.conv2", 4, 4, 3) | conv(f"{esa}.conv3", 4, 4, 3)
        shapes |= conv(f"{esa}.conv4", c, 4, 1)
    return shapes | conv("conv_2", c, c, 3) | conv("upsampler.0", 3 * scale**2, c, 3)


def smfanet(scale: int, c: int = 12, blocks: int = 2) -> Shapes:
    shapes = conv("to_feat", c, 3, 3)
    for i in range(blocks):
        smfa, pcfn = f"feats.{i}.smfa", f"feats.{i}.pcfn"
        shapes |= {f"{smfa}.alpha": (1, c, 1, 1), f"{smfa}.belt": (1, c, 1, 1)}
        shapes |= conv(f"{smfa}.linear_0", 2 * c, c, 1) | conv(f"{smfa}.linear_1", c, c, 1)
        shapes |= conv(f"{smfa}.linear_2", c, c, 1) | conv(f"{smfa}.dw_conv", c, 1, 3)
        shapes |= conv(f"{smfa}.lde.conv_0.0", 2 * c, 1, 3)
        shapes |= conv(f"{smfa}.lde.conv_0.1", 2 * c, 2 * c, 1)
        shapes |= conv(f"{smfa}.lde.conv_1", c, 2 * c, 1)
        shapes |= conv(f"{pcfn}.conv_0", 3 * c, c, 1)
        shapes |= conv(f"{pcfn}.conv_1", 3 * c // 4, 3 * c // 4, 3)
        shapes |= conv(f"{pcfn}.conv_2", c, 3 * c, 1)
    return shapes | conv("to_img.0", 3 * scale**2, c, 3)


FILES = {"bsrn": bsrn, "rlfn": rlfn, "smfanet": smfanet}
ARGUMENTS = {
    "bsrn": {"channels": 32, "blocks": 2},
    "rlfn": {
        "channels": 10,
        "mid_channels": 12,
        "blocks": 2,
        "esa_channels": 4,
        "rgb_range": 255.0,
    },
    "smfanet": {"channels": 12, "blocks": 2, "growth": 3.0},
}


def state_of(family: str, scale: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in FILES[family](scale).items()}


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("family", FILES)
def test_every_tensor_finds_its_place(family, scale, tmp_path):
    state = state_of(family, scale)
    torch.save({"params": state}, tmp_path / "official.pth")
    loaded = read_checkpoint(tmp_path / "official.pth", scale)
    assert loaded.network.arguments == {"scale": scale, **ARGUMENTS[family]}
    assert loaded.notes[0].lower().startswith(f"layout {family} official")
    ranges = "255" if family == "rlfn" else "1"
    assert loaded.notes[1].startswith(f"internal range 0..{ranges} (as ")
    assert loaded.notes[2].startswith("no mean shift (as ")
    found = loaded.network.state_dict()
    # Random values are unique, so sums tell which tensor went where: each was used once.
    assert len(found) == len(state)
    assert sorted(float(v.sum()) for v in found.values()) == sorted(
        float(v.sum()) for v in state.values()
    )
    assert found["groups.1.smfa.beta" if family == "smfanet" else "tail.conv.bias"].equal(
        state["feats.1.smfa.belt" if family == "smfanet" else list(state)[-1]]
    )


@pytest.mark.parametrize("family", FILES)
def test_bare_weights_of_ours(family, tmp_path):
    network = build_family(family, {"scale": 3, **ARGUMENTS[family]})
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    loaded = read_checkpoint(tmp_path / "weights.safetensors")
    assert loaded.notes[0].startswith("layout srkd")
    assert loaded.network.config == network.config
    assert all(
        torch.equal(v, network.state_dict()[k]) for k, v in loaded.network.state_dict().items()
    )


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("bsrn", "B2.esa.conv_max.dw.bias"),
        ("rlfn", "block_2.esa.conv3.bias"),
        ("smfanet", "feats.1.smfa.belt"),
    ],
)
def test_a_missing_tensor_is_refused(family, key, tmp_path):
    state = state_of(family)
    del state[key]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(SrkdError, match=r"tensors 1 missing \(first: groups\.1\."):
        read_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("family", FILES)
def test_a_leftover_is_refused(family, tmp_path):
    state = state_of(family) | {"extra.weight": torch.zeros(1)}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(SrkdError, match=r"official, but 1 .*extra\.weight"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_sidecar_gives_the_range_of_rlfn_alone(tmp_path):
    beside = json.dumps({"hyper_parameters": {"rgb_range": 1}})
    for family in ("rlfn", "smfanet"):
        save_file(state_of(family), tmp_path / f"{family}.safetensors")
        (tmp_path / f"{family}.json").write_text(beside)
    assert read_checkpoint(tmp_path / "rlfn.safetensors").network.config.rgb_range == 1.0
    read_checkpoint(tmp_path / "smfanet.safetensors")
    (tmp_path / "smfanet.json").write_text('{"io": "range 0..255 in and out"}')
    with pytest.raises(SrkdError, match=r"rgb_range 255\.0 .* but smfanet networks have 1\.0"):
        read_checkpoint(tmp_path / "smfanet.safetensors")
    (tmp_path / "rlfn.json").write_text('{"hyper_parameters": {"mean_shift": true}}')
    with pytest.raises(SrkdError, match=r"mean_shift True .* but rlfn networks have False"):
        read_checkpoint(tmp_path / "rlfn.safetensors")


def test_every_published_file_is_the_zoo_network_of_its_sidecar(shared_data):
    names = {"BSRN": "bsrn", "RLFN": "rlfn", "SMFANet": "smfanet", "SMFANet+": "smfanet_plus"}
    sidecars = [json.loads(p.read_text()) for p in sorted((shared_data / "weights").glob("*.json"))]
    read = 0
    for sidecar in sidecars:
        if sidecar["arch"] in names:
            path = shared_data / "weights" / sidecar["file"]
            loaded = read_checkpoint(path, sidecar["scale"])
            ntire = "_ntire" if sidecar["hyper_parameters"].get("mid_channels") == 48 else ""
            assert loaded.info["network"] == names[sidecar["arch"]] + ntire
            assert loaded.info["parameters"] == sidecar["parameters"]
            assert all("sidecar" in note for note in loaded.notes[1:])
            read += 1
    assert read == 10


def test_checkpoint_exactly_as_published(shared_data):
    weights = shared_data / "weights"
    published = read_checkpoint(weights / "fixtures" / "net_g_BSRN_x4.pth", 4)
    assert published.info["network"] == "bsrn"
    packed = read_checkpoint(weights / "bsrn_x4_official.safetensors").network.state_dict()
    found = published.network.state_dict()
    assert all(torch.equal(found[key], packed[key]) for key in packed)
