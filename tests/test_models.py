"""Run folders, names, and what is said when they are damaged."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from srkd import models
from srkd.errors import SrkdError
from srkd.models import find_model, load_model, save_model, shipped_models, weights_hash
from srkd.networks import build, build_family

SWINIR = {"scale": 3, "channels": 12, "depths": (2, 2), "heads": 2, "window": 4}


@pytest.fixture
def run(tmp_path):
    """A run folder with a tiny EDSR."""
    folder = tmp_path / "run"
    save_model(folder, build("edsr_tiny", 2), {"scores": {"Set5": 30.0}})
    return folder


def change(folder, **values) -> None:
    """Rewrite keys of model.json."""
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_round_trip_gives_the_same_network(run, tmp_path):
    for folder, network in (
        (run, None),
        (tmp_path / "b", build("rcan_a", 4)),
        (tmp_path / "c", build_family("swinir", SWINIR)),
    ):
        if network is not None:
            save_model(folder, network, {})
        loaded = load_model(folder)
        assert loaded.name == folder.name and loaded.is_ours and not loaded.network.training
        assert loaded.facts == loaded.network.facts
        if network is not None:
            assert loaded.network.config == network.config
            lr = torch.rand(1, 3, 9, 8)
            with torch.no_grad():
                assert torch.equal(loaded.network(lr), network.eval()(lr))


def test_model_json_says_what_it_is(run):
    info = load_model(run).info
    assert info["network"] == "edsr_tiny" and info["family"] == "edsr"
    # head 448, 4 blocks of 2 x 2320, body 2320, upsampler 9280, last 435
    assert info["parameters"] == 448 + 8 * 2320 + 2320 + 9280 + 435
    assert info["scale"] == 2 and info["scores"] == {"Set5": 30.0}


def test_averaged_weights_replace_the_networks_own(tmp_path):
    network = build("edsr_tiny", 2)
    averaged = {k: torch.full_like(v, 0.25) for k, v in network.state_dict().items()}
    save_model(tmp_path / "run", network, {}, averaged)
    loaded = load_model(tmp_path / "run")
    assert all(torch.all(p == 0.25) for p in loaded.network.parameters())


def test_weights_file_of_a_run_means_the_run(run):
    assert find_model(run / "weights.safetensors") == run
    assert load_model(run / "weights.safetensors").info["network"] == "edsr_tiny"


def test_bare_weights_file_without_its_run(run, tmp_path):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "weights.safetensors").read_bytes())
    loaded = load_model(alone)
    assert loaded.notes[0].startswith("layout srkd")
    assert loaded.network.config == load_model(run).network.config


def test_hash_of_a_model_covers_all_its_files(run, tmp_path):
    own = hashlib.sha256((run / "weights.safetensors").read_bytes()).hexdigest()
    assert weights_hash(load_model(run)) == load_model(run).info["weights_sha256"] == own
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "weights.safetensors").read_bytes())
    assert weights_hash(load_model(alone)) == own
    sidecar = alone.with_suffix(".json")
    sidecar.write_text('{"scale": 2}')
    beside = hashlib.sha256(sidecar.read_bytes()).hexdigest()
    assert weights_hash(load_model(alone)) == f"{own}+{beside}"


def test_another_scale_is_refused(run):
    assert load_model(run, 2).scale == 2
    with pytest.raises(SrkdError, match="is a x2 network, but x4 was asked for"):
        load_model(run, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"format": None}, "has format None, this version reads 1"),
        ({"family": "edrs"}, "unknown network family 'edrs'; did you mean 'edsr'"),
        ({"arguments": {"chanels": 16}}, "takes no 'chanels'; did you mean 'channels'"),
        ({"arguments": None}, "model.json is damaged"),
        ({"arguments": {"scale": 2, "channels": "16"}}, "model.json is damaged"),
        ({"arguments": {"scale": 2, "channels": -4}}, "model.json is damaged"),
        (
            {"arguments": {"scale": 2, "channels": 24, "blocks": 4}},
            "does not fit the network it names",
        ),
        ({"weights_sha256": "0" * 64}, "is not the file that .*model.json describes"),
    ],
)
def test_wrong_model_json_is_named(values, message, run):
    change(run, **values)
    with pytest.raises(SrkdError, match=message):
        load_model(run)


def test_missing_family_is_named(run):
    description = json.loads((run / "model.json").read_text())
    del description["family"]
    (run / "model.json").write_text(json.dumps(description))
    with pytest.raises(SrkdError, match=r"model\.json is damaged \('family'\)"):
        load_model(run)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read .*model.json"),
        ("[1]", "holds list, not a JSON object"),
        ("\xff", "cannot read"),
    ],
)
def test_unreadable_model_json_is_named(content, message, run):
    (run / "model.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(SrkdError, match=message):
        load_model(run)


def test_changed_or_lost_weights_are_named(run):
    weights = run / "weights.safetensors"
    tensors = load_file(weights)
    save_file({k: v + 1 for k, v in tensors.items()}, weights)
    with pytest.raises(SrkdError, match=r"weights\.safetensors is not the file .*its hash differs"):
        load_model(run)
    weights.unlink()
    with pytest.raises(SrkdError, match="or it is gone"):
        load_model(run)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A weights/ folder with three networks."""
    folder = tmp_path / "weights"
    for name, network, scale in (
        ("edsr_tiny_x2", "edsr_tiny", 2),
        ("edsr_tiny_x4", "edsr_tiny", 4),
        ("rcan_a_x4_mtkd", "rcan_a", 4),
    ):
        save_model(folder / name, build(network, scale), {})
    (folder / "half").mkdir()  # no model.json: not a model
    monkeypatch.setattr(models, "WEIGHTS_FOLDER", folder)
    return folder


def test_bare_names_mean_shipped_models(shipped):
    assert shipped_models() == ["edsr_tiny_x2", "edsr_tiny_x4", "rcan_a_x4_mtkd"]
    assert load_model("edsr_tiny", 4).name == "edsr_tiny_x4"
    assert load_model("edsr_tiny_x2").scale == 2
    assert load_model("rcan_a_x4_mtkd").name == "rcan_a_x4_mtkd"


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        ("edsr_tiny", None, "names several models .edsr_tiny_x2, edsr_tiny_x4.; give one"),
        (
            "edsr_tiny",
            3,
            "no file, run folder or shipped model 'edsr_tiny'; .*edsr_tiny_x2, edsr_tiny_x4",
        ),
        ("edsr_tinny_x4", None, "did you mean 'edsr_tiny_x4'"),
        ("rcan_a", 4, "did you mean 'rcan_a_x4_mtkd'"),  # how it was trained is never guessed
        ("nothing.pth", None, "no file, run folder or shipped model 'nothing.pth'.*rcan_a_x4_mtkd"),
    ],
)
def test_unknown_names_list_what_exists(name, scale, message, shipped):
    with pytest.raises(SrkdError, match=message):
        load_model(name, scale)


def test_without_shipped_models_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "WEIGHTS_FOLDER", tmp_path / "none")
    with pytest.raises(SrkdError, match="holds no shipped model yet"):
        load_model("rcan_c", 4)


def test_folder_without_model_json(tmp_path):
    with pytest.raises(SrkdError, match=r"without model\.json, so it is no run folder"):
        load_model(tmp_path)


def test_failed_save_leaves_the_old_files(run, monkeypatch):
    before = {p.name: p.read_bytes() for p in run.iterdir()}

    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(SrkdError, match=r"cannot write .*No space left on device"):
        save_model(run, build("edsr_tiny", 2), {})
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
