"""Every network of the zoo builds, names its taps, and continues from any of them."""

import subprocess
import sys

import pytest
import torch

from srkd.errors import SrkdError
from srkd.networks import FAMILIES, ZOO, build, build_family, zoo_name

SMALL = {
    "edsr": {"scale": 2, "channels": 8, "blocks": 3},
    "edsr one step": {
        "scale": 3,
        "channels": 8,
        "blocks": 2,
        "mean_shift": False,
        "tail": "one_step",
    },
    "rcan": {"scale": 4, "channels": 16, "blocks": 2, "group_count": 2},
    "swinir": {"scale": 3, "channels": 12, "depths": (2, 2), "heads": 2, "window": 4},
    "swinir one step": {
        "scale": 2,
        "channels": 12,
        "depths": (1, 2),
        "heads": 2,
        "tail": "one_step",
    },
}


def small(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_family(name.split()[0], SMALL[name]).eval()


def test_the_table_loads_no_torch():
    code = "import sys, srkd.networks; assert len(srkd.networks.ZOO) > 10; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ZOO)
def test_every_entry_builds_and_resolves_its_taps(name):
    for scale in ZOO[name].scales:
        with torch.device("meta"):
            network = build(name, scale)
        assert network.scale == network.facts.scale == scale
        assert zoo_name(network.family, network.arguments) == name
        taps = network.tap_names
        assert len(taps) == len(set(taps)) == len(network.groups)
        assert taps[-1] == "body"
        assert [network.position(tap) for tap in taps] == list(range(1, len(taps) + 1))


def test_every_family_has_an_entry():
    assert {entry.family for entry in ZOO.values()} == set(FAMILIES)


def test_tap_names_of_the_families():
    assert small("edsr").tap_names == ("block1", "block2", "block3", "body")
    assert small("rcan").tap_names == ("group1", "group2", "body")
    assert small("swinir").tap_names == ("rstb1", "rstb2", "body")


@pytest.mark.parametrize("name", SMALL)
def test_taps_and_rest_give_the_same_image(name):
    network = small(name)
    lr = torch.rand(2, 3, 11, 10)
    with torch.no_grad():
        sr = network(lr)
        assert sr.shape == (2, 3, network.scale * 11, network.scale * 10)
        result = network.run(lr, network.tap_names)
        assert torch.equal(result.sr, sr)
        assert tuple(result.taps) == network.tap_names
        assert result.head is not None
        for tap, feature in result.taps.items():
            assert feature.shape == result.head.shape
            assert feature.shape[1] == network.channels
            again = network.rest(feature, tap, result.head, (11, 10))
            torch.testing.assert_close(again, sr, atol=1e-6, rtol=0)
            # The rest depends on the feature it is given.
            other = network.rest(feature + torch.rand_like(feature), tap, result.head, (11, 10))
            assert not torch.allclose(other, sr, atol=1e-4)
    assert network.run(lr).taps == {}


@pytest.mark.parametrize("name", SMALL)
def test_model_json_arguments_rebuild_the_network(name):
    import json

    network = small(name)
    arguments = json.loads(json.dumps(network.arguments))
    again = build_family(network.family, arguments)
    again.load_state_dict(network.state_dict())
    lr = torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        assert torch.equal(again.eval()(lr), network(lr))
    assert again.config == network.config


def modules(network: torch.nn.Module) -> list[str]:
    """Keys without .weight and .bias, in order, each once."""
    return list(
        dict.fromkeys(k.removesuffix(".weight").removesuffix(".bias") for k in network.state_dict())
    )


def test_keys_of_edsr_stay():
    network = build_family("edsr", {"scale": 4, "channels": 4, "blocks": 1})
    assert modules(network) == [
        "head.conv",
        "groups.0.conv1",
        "groups.0.conv2",
        "groups.1",
        "tail.upsample.0",
        "tail.upsample.2",
        "tail.last",
    ]
    one_step = build_family("edsr", {"scale": 2, "channels": 4, "blocks": 1, "tail": "one_step"})
    assert modules(one_step)[-1] == "tail.conv"


def test_keys_of_rcan_stay():
    network = build_family("rcan", {"scale": 2, "channels": 16, "blocks": 1, "group_count": 1})
    assert modules(network) == [
        "head.conv",
        "groups.0.blocks.0.conv1",
        "groups.0.blocks.0.conv2",
        "groups.0.blocks.0.attention.squeeze",
        "groups.0.blocks.0.attention.excite",
        "groups.0.conv",
        "groups.1",
        "tail.upsample.0",
        "tail.last",
    ]


def test_keys_of_swinir_stay():
    network = build_family("swinir", {"scale": 2, "channels": 6, "depths": (1,)})
    layer = "groups.0.layers.0"
    assert modules(network) == [
        "head.conv",
        "groups.0.norm",
        f"{layer}.norm1",
        f"{layer}.attn.relative_position_bias_table",
        f"{layer}.attn.qkv",
        f"{layer}.attn.proj",
        f"{layer}.norm2",
        f"{layer}.mlp.fc1",
        f"{layer}.mlp.fc2",
        "groups.0.conv",
        "groups.1.norm",
        "groups.1.conv",
        "tail.before",
        "tail.upsample.0",
        "tail.last",
    ]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: build("edsr_tyny", 4), "unknown network 'edsr_tyny'; did you mean 'edsr_tiny'"),
        (lambda: build("edsr_mlperf_f64b5", 4), "exists at x2, not x4"),
        (lambda: build_family("edrs", {}), "unknown network family 'edrs'; did you mean 'edsr'"),
        (lambda: build_family("edsr", {"block": 3}), "takes no 'block'; did you mean 'blocks'"),
        (
            lambda: build_family("edsr", {"scale": 5, "channels": 4, "blocks": 1}),
            "scale 5 is not supported",
        ),
        (lambda: small("edsr").position("block9"), "no tap 'block9'; did you mean"),
    ],
)
def test_wrong_names_are_refused_with_a_hint(ask, message):
    with pytest.raises(SrkdError, match=message):
        ask()
