"""Checkpoints of every layout that we read, and files that must be refused with one sentence."""

import json
import os
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from srkd import checkpoint
from srkd.checkpoint import Foreign, read_checkpoint, read_tensors
from srkd.errors import SrkdError
from srkd.networks import build_family
from srkd.networks.base import DIV2K_MEAN
from srkd.networks.layouts import LAYOUTS, Layout

EDSR = {"channels": 16, "blocks": 4}
RCAN = {"channels": 32, "blocks": 2, "group_count": 3, "rgb_range": 255.0}
SWINIR = {"channels": 12, "depths": (2, 3), "heads": 2}
MLPERF = {"channels": 8, "blocks": 2, "mean_shift": False, "tail": "one_step"}

CASES = {
    "EDSR-PyTorch": EDSR,
    "BasicSR EDSR": EDSR,
    "MLPerf Mobile": MLPERF,
    "RCAN official": RCAN,
    "BasicSR RCAN": RCAN,
    "SwinIR classical": SWINIR,
    "SwinIR one-step": {**SWINIR, "tail": "one_step"},
}


def layout_named(name: str) -> Layout:
    return next(layout for layout in LAYOUTS if layout.name == name)


def network_of(name: str, scale: int = 2) -> nn.Module:
    torch.manual_seed(scale)
    network = build_family(layout_named(name).family, {"scale": scale, **CASES[name]}).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def official(network: nn.Module, name: str) -> dict[str, Tensor]:
    """The network's weights under the keys of a layout, by inverting its table."""
    layout = layout_named(name)
    n = len(network.groups) - 1
    blocks = getattr(network.config, "blocks", 0)
    # The body convolution first: `groups.{i}` would match it too.
    table = sorted(layout.keys.items(), key=lambda row: "{n}" not in row[1])
    state = {}
    for key, value in network.state_dict().items():
        module, _, leaf = key.rpartition(".")
        for theirs, ours in table:
            pattern = re.sub(
                r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(ours.replace("{n}", str(n)))
            )
            found = re.fullmatch(pattern, module)
            if found:
                state[theirs.format(blocks=blocks, **found.groupdict()) + f".{leaf}"] = value
                break
        else:
            raise AssertionError(f"no row of {name} gives {key}")
    return state


def mean_shift_constants(rgb_range: float = 255.0) -> dict[str, Tensor]:
    eye = torch.eye(3).view(3, 3, 1, 1)
    mean = torch.tensor(DIV2K_MEAN) * rgb_range
    return {
        "sub_mean.weight": eye,
        "sub_mean.bias": -mean,
        "add_mean.weight": eye,
        "add_mean.bias": mean,
    }


def assert_same_output(loaded, network: nn.Module) -> None:
    lr = torch.rand(1, 3, 9, 10)
    assert not loaded.network.training
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(lr), network(lr), atol=0, rtol=0)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_layout_reads_back(name, scale, tmp_path):
    network = network_of(name, scale)
    state = official(network, name)
    assert not state.keys() & network.state_dict().keys()
    if name in ("EDSR-PyTorch", "RCAN official"):
        state |= mean_shift_constants()
        content = state  # flat
    else:
        content = {"params": state}
    if name.startswith("SwinIR"):  # buffers of the training size
        layer = "layers.0.residual_group.blocks.1"
        state[f"{layer}.attn_mask"] = torch.zeros(36, 64, 64)
        state[f"{layer}.attn.relative_position_index"] = torch.zeros(64, 64, dtype=torch.long)
    path = tmp_path / "official.pth"
    torch.save(content, path)
    loaded = read_checkpoint(path, scale)
    assert loaded.scale == scale and loaded.is_ours
    assert loaded.network.config == network.config
    assert loaded.notes[0].startswith(f"layout {name}")
    assert_same_output(loaded, network)


# Written from the published files, not from our table.
PUBLISHED = {
    "EDSR-PyTorch": [
        "head.0.weight",
        "body.0.body.0.weight",
        "body.3.body.2.bias",
        "body.4.weight",
        "tail.0.0.weight",
        "tail.0.2.bias",
        "tail.1.weight",
    ],
    "BasicSR EDSR": [
        "conv_first.weight",
        "body.0.conv1.weight",
        "body.3.conv2.bias",
        "conv_after_body.weight",
        "upsample.0.weight",
        "upsample.2.bias",
        "conv_last.weight",
    ],
    "RCAN official": [
        "head.0.weight",
        "body.0.body.0.body.0.weight",
        "body.2.body.1.body.2.bias",
        "body.0.body.1.body.3.conv_du.0.weight",
        "body.0.body.1.body.3.conv_du.2.weight",
        "body.1.body.2.weight",
        "body.3.weight",
        "tail.0.0.weight",
        "tail.0.2.weight",
        "tail.1.bias",
    ],
    "BasicSR RCAN": [
        "conv_first.weight",
        "body.0.residual_group.0.rcab.0.weight",
        "body.2.residual_group.1.rcab.2.bias",
        "body.0.residual_group.1.rcab.3.attention.1.weight",
        "body.0.residual_group.1.rcab.3.attention.3.weight",
        "body.1.conv.weight",
        "conv_after_body.weight",
        "upsample.2.weight",
        "conv_last.bias",
    ],
    "SwinIR classical": [
        "conv_first.weight",
        "patch_embed.norm.weight",
        "layers.0.residual_group.blocks.0.norm1.weight",
        "layers.1.residual_group.blocks.2.attn.relative_position_bias_table",
        "layers.1.residual_group.blocks.2.attn.qkv.bias",
        "layers.1.residual_group.blocks.2.attn.proj.weight",
        "layers.1.residual_group.blocks.2.norm2.bias",
        "layers.1.residual_group.blocks.2.mlp.fc1.weight",
        "layers.1.residual_group.blocks.2.mlp.fc2.weight",
        "layers.1.conv.weight",
        "norm.weight",
        "conv_after_body.weight",
        "conv_before_upsample.0.weight",
        "upsample.0.weight",
        "upsample.2.weight",
        "conv_last.weight",
    ],
    "SwinIR one-step": [
        "conv_first.weight",
        "norm.bias",
        "conv_after_body.bias",
        "upsample.0.bias",
    ],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_tables_have_the_published_names(name):
    assert set(PUBLISHED[name]) <= official(network_of(name, 4), name).keys()


@pytest.mark.parametrize(
    ("channels", "blocks", "residual_scale"),
    [(64, 16, 1.0), (64, 32, 0.1), (16, 32, 0.1), (16, 4, 1.0), (256, 2, 0.1), (48, 3, 1.0)],
)
def test_residual_scale_comes_from_width_and_depth(channels, blocks, residual_scale, tmp_path):
    network = build_family("edsr", {"scale": 2, "channels": channels, "blocks": blocks})
    path = tmp_path / "edsr.safetensors"
    save_file(official(network, "EDSR-PyTorch"), path)
    loaded = read_checkpoint(path)
    assert loaded.network.config.residual_scale == residual_scale
    assumed = blocks in (2, 3)
    assert ("ASSUMED" in loaded.notes[1]) == assumed
    assert ("table by width and depth" in loaded.notes[1]) != assumed


def test_sidecar_tells_what_tensors_cannot(tmp_path):
    network = build_family("edsr", {"scale": 2, **EDSR, "residual_scale": 0.25, "rgb_range": 1.0})
    save_file(official(network, "EDSR-PyTorch"), tmp_path / "e.safetensors")
    hyper = {"res_scale": 0.25, "rgb_range": 1, "mean_shift": False}
    (tmp_path / "e.json").write_text(json.dumps({"scale": 2, "hyper_parameters": hyper}))
    config = read_checkpoint(tmp_path / "e.safetensors").network.config
    assert (config.residual_scale, config.rgb_range, config.mean_shift) == (0.25, 1.0, False)

    (tmp_path / "e.json").write_text(
        json.dumps({"io": "RGB, range 0..1 in and out, no mean shift"})
    )
    loaded = read_checkpoint(tmp_path / "e.safetensors")
    config = loaded.network.config
    assert (config.residual_scale, config.rgb_range, config.mean_shift) == (1.0, 1.0, False)
    assert loaded.notes[2:] == (
        "internal range 0..1 (sidecar e.json)",
        "no mean shift (sidecar e.json)",
    )


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ('{"scale": 3}', "is a x2 network, but x3 its sidecar e.json says"),
        ('{"hyper_parameters": {"res_scale": "big"}}', "res_scale 'big', where a positive number"),
        ('{"hyper_parameters": {"mean_shift": 1}}', "mean_shift 1, where true or false"),
        ("{", "cannot read .*e.json"),
    ],
)
def test_bad_sidecars_are_named(sidecar, message, tmp_path):
    save_file(official(network_of("EDSR-PyTorch"), "EDSR-PyTorch"), tmp_path / "e.safetensors")
    (tmp_path / "e.json").write_text(sidecar)
    with pytest.raises(SrkdError, match=message):
        read_checkpoint(tmp_path / "e.safetensors")


def test_sidecar_that_the_family_cannot_follow(tmp_path):
    save_file(
        official(network_of("SwinIR classical"), "SwinIR classical"), tmp_path / "s.safetensors"
    )
    (tmp_path / "s.json").write_text('{"hyper_parameters": {"rgb_range": 255}}')
    with pytest.raises(
        SrkdError, match=r"rgb_range 255\.0 by its sidecar s\.json, but swinir networks have 1"
    ):
        read_checkpoint(tmp_path / "s.safetensors")


def test_mean_shift_constants_tell_the_range(tmp_path):
    network = build_family("edsr", {"scale": 2, **EDSR, "rgb_range": 1.0}).eval()
    state = official(network, "EDSR-PyTorch") | mean_shift_constants(1.0)
    torch.save(state, tmp_path / "e.pt")
    loaded = read_checkpoint(tmp_path / "e.pt")
    assert loaded.network.config.rgb_range == 1.0
    assert "internal range 0..1 (constants of the file)" in loaded.notes
    assert_same_output(loaded, network)


@pytest.mark.parametrize("key", ["sub_mean.bias", "add_mean.bias", "add_mean.weight"])
def test_another_mean_is_refused(key, tmp_path):
    state = official(network_of("EDSR-PyTorch"), "EDSR-PyTorch") | mean_shift_constants()
    state[key] = state[key] * 1.01
    torch.save(state, tmp_path / "e.pt")
    with pytest.raises(SrkdError, match=r"does not subtract and add the DIV2K mean.*114\.444"):
        read_checkpoint(tmp_path / "e.pt")


def test_one_step_edsr_without_sidecar_has_no_mean_shift(tmp_path):
    network = network_of("MLPerf Mobile")
    save_file(official(network, "MLPerf Mobile"), tmp_path / "m.safetensors")
    loaded = read_checkpoint(tmp_path / "m.safetensors")
    assert loaded.notes[-1] == "no mean shift (as MLPerf Mobile networks have it)"
    assert_same_output(loaded, network)


@pytest.mark.parametrize("name", ["EDSR-PyTorch", "RCAN official", "SwinIR classical"])
def test_bare_weights_of_ours(name, tmp_path):
    network = network_of(name, 3)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    loaded = read_checkpoint(tmp_path / "weights.safetensors")
    assert loaded.notes[0].startswith("layout srkd")
    assert loaded.network.config == network.config
    assert_same_output(loaded, network)


def test_data_parallel_prefix_and_averaged_weights(tmp_path):
    network, other = network_of("BasicSR EDSR", 2), network_of("BasicSR EDSR", 3)
    averaged = {f"module.{k}": v for k, v in official(network, "BasicSR EDSR").items()}
    torch.save(
        {"params": official(other, "BasicSR EDSR"), "params_ema": averaged}, tmp_path / "e.pth"
    )
    assert_same_output(read_checkpoint(tmp_path / "e.pth"), network)


def test_half_precision_files_are_widened(tmp_path):
    network = network_of("EDSR-PyTorch")
    half = {k: v.half() for k, v in official(network, "EDSR-PyTorch").items()}
    torch.save(half, tmp_path / "e.pt")
    loaded = read_checkpoint(tmp_path / "e.pt").network
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.head.conv.weight, network.head.conv.weight.half().float())


def test_another_scale_is_refused(tmp_path):
    torch.save(official(network_of("EDSR-PyTorch", 4), "EDSR-PyTorch"), tmp_path / "e.pt")
    with pytest.raises(SrkdError, match="is a x4 network, but x2 was asked for"):
        read_checkpoint(tmp_path / "e.pt", scale=2)


def test_scale_eight_is_refused(tmp_path):
    state = official(network_of("EDSR-PyTorch", 4), "EDSR-PyTorch")
    state["tail.0.4.weight"], state["tail.0.4.bias"] = (
        state["tail.0.2.weight"],
        state["tail.0.2.bias"],
    )
    torch.save(state, tmp_path / "e.pt")
    with pytest.raises(SrkdError, match="is a x8 network; this version has x2, x3 and x4"):
        read_checkpoint(tmp_path / "e.pt")


@pytest.fixture
def without_spandrel(monkeypatch):
    """The extra is optional: these tests are about a machine without it."""

    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(checkpoint, "import_module", absent)


@pytest.mark.usefixtures("without_spandrel")
def test_unknown_layout_names_the_known_ones(tmp_path):
    torch.save({"params": {"c1.weight": torch.zeros(3)}}, tmp_path / "x.pth")
    with pytest.raises(SrkdError) as caught:
        read_checkpoint(tmp_path / "x.pth")
    message = str(caught.value)
    assert all(layout.name in message for layout in LAYOUTS)
    assert "c1.weight" in message and "pip install srkd[spandrel]" in message
    assert caught.value.exit_code == 2


@pytest.mark.usefixtures("without_spandrel")
def test_variant_names_its_leftover(tmp_path):
    state = official(network_of("SwinIR classical"), "SwinIR classical")
    state["absolute_pos_embed"] = torch.zeros(1, 64, 12)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(SrkdError, match=r"looks like SwinIR classical, but 1 .*absolute_pos_embed"):
        read_checkpoint(tmp_path / "x.pth")


def test_missing_tensor_is_named(tmp_path):
    state = official(network_of("EDSR-PyTorch"), "EDSR-PyTorch")
    del state["body.2.body.2.bias"]
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(SrkdError, match=r"1 missing \(first: groups\.2\.conv2\.bias\)"):
        read_checkpoint(tmp_path / "x.pt")
    del state["tail.0.0.weight"]
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(SrkdError, match=r"sizes cannot be told .*upsampling tail is missing"):
        read_checkpoint(tmp_path / "x.pt")


class Attack:
    """Pickles to a command that would create a file."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "inside", "plain"])
def test_pickled_code_is_never_run(how, tmp_path):
    target = tmp_path / "owned"
    path = tmp_path / "evil.pth"
    attack = Attack(str(target))
    if how == "plain":
        path.write_bytes(pickle.dumps(attack, protocol=2))
    elif how == "inside":
        state = official(network_of("EDSR-PyTorch"), "EDSR-PyTorch")
        torch.save({"params": state, "note": attack}, path)
    else:
        torch.save(attack, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(SrkdError, match=r"would run or import 'posix\.system'; it was refused"):
        read_checkpoint(path)
    assert not target.exists()
    # The file is a working attack: unpickled without protection it does create the file.
    if how == "plain":
        pickle.loads(path.read_bytes())
        assert target.exists()


def test_pickled_module_is_refused(tmp_path):
    torch.save(nn.Conv2d(3, 3, 3), tmp_path / "module.pt")
    with pytest.raises(SrkdError, match=r"would run or import 'torch\.nn\.modules\.conv\.Conv2d'"):
        read_checkpoint(tmp_path / "module.pt")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "image"])
def test_damaged_files_get_one_sentence(damage, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    state = official(network_of("EDSR-PyTorch"), "EDSR-PyTorch")
    (torch.save if suffix == ".pth" else save_file)(state, path)
    data = path.read_bytes()
    content = {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "text": b"<html>404: not found</html>\n" * 40,
        "image": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4,
    }
    path.write_bytes(content[damage])
    with pytest.raises(
        SrkdError, match=r"not a readable (weights|safetensors) file.*Copy it again"
    ) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds Tensor, not named tensors"),
        ({}, "holds nothing, not named tensors"),
        ({"epoch": 3, "a": torch.zeros(1)}, "holds int under 'epoch'"),
        ({"params": {"a.weight": torch.tensor([1.0, float("nan")])}}, "'a.weight' .* not finite"),
    ],
)
def test_files_without_named_tensors(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(SrkdError, match=message):
        read_tensors(tmp_path / "x.pt")


def test_large_missing_and_foreign_names(tmp_path):
    huge = tmp_path / "huge.pth"
    with huge.open("wb") as file:
        file.truncate(checkpoint.MAX_BYTES + 2**30)  # sparse: takes no space
    with pytest.raises(SrkdError, match=r"has 5\.0 GiB, more than the 4 GiB"):
        read_checkpoint(huge)
    with pytest.raises(SrkdError, match="there is no weights file"):
        read_checkpoint(tmp_path / "none.pth")
    (tmp_path / "photo.png").write_bytes(b"x")
    with pytest.raises(SrkdError, match=r"no weights file by its name; give a \.safetensors"):
        read_checkpoint(tmp_path / "photo.png")


class ScalesInPlace(nn.Module):
    """Nearest x2 that changes its input, as some public networks do, and asks for sizes."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] % 4 == 0 and x.shape[-2] % 4 == 0 and min(x.shape[-2:]) >= 8
        x *= 255
        return nn.functional.interpolate(x / 255, scale_factor=2)


@pytest.mark.parametrize("size", [(3, 5), (8, 8), (9, 12)])
def test_foreign_network_is_padded_and_leaves_its_input(size):
    network = Foreign(ScalesInPlace(), scale=2, multiple=4, minimum=8)
    lr = torch.rand(1, 3, *size)
    kept = lr.clone()
    torch.testing.assert_close(network(lr), nn.functional.interpolate(kept, scale_factor=2))
    assert torch.equal(lr, kept)


def test_spandrel_reads_what_we_do_not(tmp_path):
    """SwinIR with the nearest+conv tail of the real-world models: spandrel has it, we do not."""
    pytest.importorskip("spandrel", reason="needs spandrel: pip install srkd[spandrel]")
    from spandrel.architectures.SwinIR import SwinIR

    sizes = {"upscale": 4, "window_size": 8, "depths": [2], "embed_dim": 24, "num_heads": [6]}
    reference = SwinIR(**sizes, mlp_ratio=2, upsampler="nearest+conv").eval()
    torch.save({"params_ema": reference.state_dict()}, tmp_path / "real.pth")
    loaded = read_checkpoint(tmp_path / "real.pth", 4)
    assert not loaded.is_ours and loaded.facts.receptive_field_px is None
    lr = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(lr), reference(lr))


@pytest.mark.parametrize(("name", "parameters"), [("f64b5", 414_924), ("f32b5", 106_092)])
def test_real_mlperf_weights(name, parameters, shared_data):
    loaded = read_checkpoint(shared_data / "weights" / f"edsr_{name}_x2_mlperf.safetensors", 2)
    assert loaded.info["network"] == f"edsr_mlperf_{name}"
    assert loaded.info["parameters"] == parameters
    beside = f"(sidecar edsr_{name}_x2_mlperf.json)"
    assert loaded.notes[1:] == (
        f"residual scale 1 {beside}",
        f"internal range 0..255 {beside}",
        f"no mean shift {beside}",
    )
    # A trained network keeps a soft ramp; with a wrong range or residual scale it would not.
    ramp = torch.linspace(0.2, 0.8, 32).expand(1, 3, 32, 32)
    with torch.no_grad():
        sr = loaded.network(ramp)
    expected = nn.functional.interpolate(ramp, scale_factor=2, mode="bilinear")
    assert float((sr - expected)[..., 8:-8, 8:-8].abs().max()) < 0.02


def test_real_file_of_another_network_is_refused(shared_data, without_spandrel):
    with pytest.raises(SrkdError, match="fits no layout"):
        read_checkpoint(shared_data / "weights" / "hit_srf_x4_ntire2025.safetensors")
