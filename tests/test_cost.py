"""Costs equal the papers' tables, by both counting rules; the estimate equals hand-counted memory."""

import json
import subprocess
import sys
import time

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from scripts.cost import main
from srkd.console import run_command
from srkd.cost import cost, macs_by_size
from srkd.errors import SrkdError
from srkd.networks import build, build_family
from srkd.types import Facts


# DUKD Table 1 and MiPKD Table 1, x4 at 256x256: what is printed, and its parts in G.
@pytest.mark.parametrize(
    ("name", "printed", "parts"),
    [
        ("edsr", 3293.35, {"conv": 3293.351}),
        ("edsr_c64b32", 207.28, {"conv": 207.278}),
        ("edsr_baseline", 129.97, {"conv": 129.969}),
        pytest.param(
            "rcan",
            1044.03,
            {"conv": 1043.186, "adaptive_avg_pool2d": 0.839},
            marks=pytest.mark.slow,
        ),
        ("rcan_lightweight", 366.98, {"conv": 366.729, "adaptive_avg_pool2d": 0.252}),
    ],
)
def test_multiply_adds_equal_dukd_and_mipkd(name, printed, parts):
    result = cost(build(name, 4))
    assert round(result.macs_g, 2) == printed
    assert {k: round(v / 1e9, 3) for k, v in result.by_operator.items()} == parts


@pytest.mark.parametrize(
    ("name", "printed", "products", "norm"),
    [
        pytest.param("swinir", 861.27, 856.903, 4.365, marks=pytest.mark.slow),
        ("swinir_c60", 121.48, 120.496, 0.983),
    ],
)
def test_multiply_adds_of_swinir(name, printed, products, norm):
    result = cost(build(name, 4))
    assert round(result.macs_g, 2) == printed
    counted = dict(result.by_operator)
    assert round(counted.pop("layer_norm") / 1e9, 3) == norm
    assert round(sum(counted.values()) / 1e9, 3) == products
    # Both attention products: 2 * 64 tokens of a window * channels, at every pixel of every layer.
    channels, layers = (180, 36) if name == "swinir" else (60, 24)
    assert counted["matmul"] == 2 * 64 * channels * layers * 256 * 256


# MKD's table, x4 at 512x512.
@pytest.mark.parametrize(
    ("name", "printed"),
    [
        pytest.param("rcan", 4183.36, marks=pytest.mark.slow),
        ("rcan_a", 22.03),
        ("rcan_b", 36.68),
        ("rcan_c", 142.19),
        pytest.param("edsr", 13179.19, marks=pytest.mark.slow),
        ("edsr_tiny", 19.58),
        pytest.param("rdn", 5961.20, marks=pytest.mark.slow),
        ("rdn_tiny", 41.18),
        pytest.param("san", 4268.24, marks=pytest.mark.slow),
        ("san_tiny", 21.48),
        pytest.param("han", 4309.49, marks=pytest.mark.slow),
        ("han_tiny", 41.03),
    ],
)
def test_multiply_adds_equal_mkd(name, printed):
    assert cost(build(name, 4), (512, 512), "mkd").macs_g == pytest.approx(printed, abs=0.01)


def test_mkd_rule_by_hand():
    network = build_family("rcan", {"scale": 2, "channels": 16, "blocks": 1, "group_count": 1})
    result = cost(network, (8, 8), "mkd")
    # At 64 pixels: head 3 -> 16; two block convolutions, group and body 16 -> 16; x2 stage 16 -> 64.
    # At 256 pixels: last 16 -> 3. Once: squeeze 16 -> 1, excite 1 -> 16.
    conv = 64 * 9 * (3 * 16 + 4 * 256 + 16 * 64) + 256 * 9 * 48 + 32
    bias = 64 * (16 + 4 * 16 + 64) + 256 * 3 + 17
    assert dict(result.by_operator) == {"conv": conv, "bias": bias, "adaptive_avg_pool2d": 64 * 16}


def test_fused_attention_is_counted_as_its_two_products():
    sizes = {"channels": 8, "blocks": 1, "group_count": 1, "reduction": 4}
    result = cost(build_family("san", {"scale": 2, **sizes}), (6, 8))
    counted = dict(result.by_operator)
    # Two layers, four quadrants of 3 x 4 pixels, one channel: similarities and the means.
    assert counted["attention"] == 2 * 4 * 12 * 12 * (1 + 1)
    # One group: its covariance 8 x 8 over all pixels, and five steps of three products of 8 x 8, but for
    # the last Z, which nothing reads.
    assert counted["matmul"] == 8 * 8 * 48 + (5 * 3 - 1) * 8**3
    assert "aten::scaled_dot_product_attention" not in result.uncounted


def test_memory_of_fused_attention_holds_no_matrix_of_pixels():
    sizes = {"channels": 8, "blocks": 1, "group_count": 1, "reduction": 4}
    result = cost(build_family("san", {"scale": 2, **sizes}), (128, 128), "mkd")
    # The pixels of one quadrant times themselves alone would be 64 MiB; all of 8 channels are 0.5 MiB.
    assert result.activation_mib is not None and 2 < result.activation_mib < 10


def test_mkd_rule_counts_no_bias_that_is_not_there():
    network = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    facts = Facts(scale=1, receptive_field_px=1, exact_tiling=True)
    assert cost(network, (8, 8), "mkd", facts).by_operator == {"conv": 64 * 9 * 9}


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("edsr", {"scale": 3, "channels": 8, "blocks": 2}),
        ("rcan", {"scale": 4, "channels": 16, "blocks": 1, "group_count": 2}),
        ("swinir", {"scale": 2, "channels": 12, "depths": (2,), "heads": 2}),
    ],
)
def test_line_equals_a_run_at_the_real_size(family, arguments):
    network = build_family(family, arguments).eval()
    lr = torch.zeros(1, 3, 100, 77)
    analysis = FlopCountAnalysis(network, lr)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    result = cost(network, (100, 77))
    assert dict(result.by_operator) == {k: int(v) for k, v in analysis.by_operator().items()}
    assert result.macs == int(analysis.total())
    assert dict(result.uncounted) == dict(analysis.unsupported_ops())
    by_size = macs_by_size(network)
    assert by_size is not None and by_size((100, 77)) == result.macs


class Strided(nn.Module):
    """Counts that are on no line: inner sizes are rounded down."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=3)
        self.again = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.conv(x))


def test_network_that_is_on_no_line_is_run_at_its_size():
    facts = Facts(scale=1, receptive_field_px=None, exact_tiling=False)
    result = cost(Strided(), (100, 77), facts=facts)
    inner = 33 * 25
    assert result.macs == inner * (3 * 9 * 4 + 4 * 4)
    assert macs_by_size(Strided(), facts=facts) is None


class NeedsData(nn.Module):
    """Looks at pixel values, so it cannot run without them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.max().item() < 2 else x


def test_memory_that_cannot_be_estimated_is_none():
    facts = Facts(scale=1, receptive_field_px=None, exact_tiling=False)
    result = cost(NeedsData(), (8, 8), facts=facts)
    assert result.activation_mib is None and result.macs == 64 * 9


def test_activation_memory_by_hand():
    # Peak of edsr_tiny x4 at the second shuffle. In units of 512 x 512 floats = 1 MiB:
    # lr 3, head 16, body 16, second stage before (64 * 4) and after (16 * 16) the shuffle.
    result = cost(build("edsr_tiny", 4), (512, 512))
    assert result.activation_mib == 3 + 16 + 16 + 256 + 256
    assert result.weights_mib == pytest.approx((40_323 + 3) * 4 / 2**20)


def test_cost_says_what_it_does_not_count_and_changes_nothing():
    network = build("rcan_a", 4).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    result = cost(network, (16, 24))
    assert result.uncounted["aten::sigmoid"] == 4 and result.uncounted["aten::pixel_shuffle"] == 2
    assert result.receptive_field_px is None and result.parameters == 49_799
    assert network.training
    after = network.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert cost(build("edsr_tiny", 4), (8, 8)).receptive_field_px == 12


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: cost(build("rcan_a", 4), rule="thop"),
            "unknown counting rule 'thop'; use one of fvcore, mkd",
        ),
        (lambda: cost(build("swinir_lightweight", 4), (4, 64)), "4x64 is too small.*5 px or more"),
        (lambda: cost(nn.Conv2d(3, 3, 3)), "Conv2d is no network of srkd; give its facts"),
        (lambda: cost(build("rcan_a", 4).to("meta")), "without weights; build it on the CPU"),
    ],
)
def test_bad_requests_are_named(ask, message):
    with pytest.raises(SrkdError, match=message):
        ask()


def test_command_prints_a_table(capsys):
    assert main(["rcan_a", "--rule", "mkd", "--size", "512x512"]) == 0
    out = capsys.readouterr().out
    assert "rcan_a, x4" in out and "49,799" in out and "22.03 G (mkd rule)" in out
    assert "output 3 x 2048 x 2048" in out and "the whole image" in out
    assert "sigmoid x4" in out


def test_command_prints_json_of_a_run_folder(capsys, tmp_path):
    from srkd.models import save_model

    save_model(tmp_path / "run", build("edsr_tiny", 3), {})
    assert main([str(tmp_path / "run"), "--size", "32x48", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["name"] == "run" and result["scale"] == 3 and result["size"] == [32, 48]
    assert result["macs"] == 32 * 48 * 9 * (48 + 9 * 256 + 16 * 144) + 32 * 48 * 9 * 9 * 48


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rcan_aa"], "shipped model 'rcan_aa'.*Networks of the zoo: did you mean 'rcan_a'"),
        (["rcan_a", "--size", "256"], "--size '256' is no height and width"),
        (["edsr_mlperf_f64b5", "--scale", "4"], "exists at x2, not x4"),
    ],
)
def test_command_refuses_with_one_line(argv, message, capsys):
    import re

    assert run_command(main, argv) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(message, error) and "\n" not in error


def test_help_is_instant_and_loads_no_torch():
    code = (
        "import sys, scripts.cost\n"
        "try: scripts.cost.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    start = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "NETWORK_OR_MODEL" in done.stdout
    assert time.process_time() - start < 1
