"""SMFANet: published sizes, cells as in adaptive pooling, blocks by definition, taps, published scores."""

import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from srkd.cost import cost
from srkd.data.sets import open_set
from srkd.evaluate import score
from srkd.models import load_model
from srkd.networks import build
from srkd.networks.smfanet import (
    ModulationBlock,
    PartialFeedForward,
    Smfanet,
    SmfanetConfig,
    cell_index,
    cell_maximum,
    repeat_cells,
)
from srkd.types import Facts


def small(scale: int = 2, blocks: int = 2) -> Smfanet:
    torch.manual_seed(0)
    network = Smfanet(SmfanetConfig(scale, channels=8, blocks=blocks)).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize(
    ("name", "scale", "parameters"),
    [
        ("smfanet", 4, 197_328),
        ("smfanet_plus", 2, 480_300),
        ("smfanet_plus", 3, 486_795),
        ("smfanet_plus", 4, 495_888),
    ],
)
def test_parameters_equal_the_published_files(name, scale, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name, scale).parameters()) == parameters


def test_cells_of_an_axis_by_hand():
    # 17 px are two cells of 8.5: pixels 0..8 and 8..16, the last one repeated up to 15.
    first = [*range(9), *[8] * 6]
    assert cell_index(17, torch.device("cpu")).tolist() == [first, [8 + i for i in first]]
    assert cell_index(15, torch.device("cpu")).tolist() == [list(range(15))]


@pytest.mark.parametrize("size", [(8, 15), (16, 23), (17, 31), (64, 80), (101, 47), (333, 9)])
def test_cells_equal_adaptive_pooling_and_nearest(size):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size)
    pooled = F.adaptive_max_pool2d(x, (size[0] // 8, size[1] // 8))
    assert torch.equal(cell_maximum(x), pooled)
    assert torch.equal(repeat_cells(pooled, *size), F.interpolate(pooled, size, mode="nearest"))


def test_gradient_of_the_maximum_goes_to_its_pixel():
    x = torch.zeros(1, 1, 9, 8)
    x[0, 0, 8, 3] = 1.0  # the last row, which fills up the index
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(cell_maximum(x).sum(), x)
    assert float(gradient[0, 0, 8, 3]) == 1.0 and float(gradient.sum()) == 1.0


def test_block_equals_its_definition():
    torch.manual_seed(1)
    block = ModulationBlock(4, 8).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 4, 19, 26, dtype=torch.float64)
    smfa, pcfn = block.smfa, block.pcfn
    with torch.no_grad():
        unit = x / x.square().sum(1, keepdim=True).sqrt()
        a, b = smfa.split(unit)[:, :4], smfa.split(unit)[:, 4:]
        coarse = smfa.depthwise(F.adaptive_max_pool2d(b, (2, 3))) * smfa.alpha
        deviation = b - b.mean((2, 3), keepdim=True)
        coarse = coarse + smfa.beta * deviation.square().sum((2, 3), keepdim=True) / (19 * 26 - 1)
        gate = F.interpolate(F.gelu(smfa.modulate(coarse)), (19, 26))
        detail = smfa.local.pointwise(smfa.local.depthwise(a))
        z = x + smfa.merge(b * gate + smfa.local.project(F.gelu(detail)))
        unit = z / z.square().sum(1, keepdim=True).sqrt()
        wide = F.gelu(pcfn.widen(unit))
        wide = torch.cat([F.gelu(pcfn.conv(wide[:, :2])), wide[:, 2:]], 1)
        torch.testing.assert_close(block(x), z + pcfn.narrow(wide))


def test_feed_forward_convolves_a_quarter():
    part = PartialFeedForward(channels=4, hidden=8)
    assert part.conv.weight.shape == (2, 2, 3, 3)
    for parameter in part.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        part.widen.bias.fill_(100.0)  # GELU is the identity there
        part.narrow.weight.fill_(1.0)
    x = torch.rand(1, 4, 3, 3)
    torch.testing.assert_close(part(x), torch.full_like(x, 600.0))  # 6 of 8 channels pass by


def test_rest_of_every_tap_equals_the_forward_pass():
    network = small(blocks=2)
    lr = torch.rand(2, 3, 18, 21)
    assert network.tap_names == ("block1", "block2", "body")
    with torch.no_grad():
        result = network.run(lr, network.tap_names)
        assert torch.equal(result.sr, network(lr))
        assert tuple(result.taps) == network.tap_names and result.head is not None
        for tap, feature in result.taps.items():
            assert feature.shape == result.head.shape == (2, network.channels, 18, 21)
            assert torch.equal(network.rest(feature, tap, result.head, (18, 21)), result.sr)
            foreign = feature + torch.rand_like(feature)
            other = network.rest(foreign, tap, result.head, (18, 21))
            assert float((other - result.sr).abs().max()) > 1e-4
        between = network.between(result.taps["block1"], "block1", "body")
        assert torch.equal(between, result.taps["body"])
        assert torch.equal(result.taps["block2"], result.taps["body"])  # no body convolution


def test_facts_and_smallest_image():
    network = small()
    assert network.facts == Facts(2, receptive_field_px=None, exact_tiling=False, minimum_px=8)
    assert network(torch.rand(1, 3, 8, 9)).shape == (1, 3, 16, 18)
    # The variance: the far corner of the image is seen.
    lr = torch.rand(1, 3, 60, 60, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network.double()(lr)[..., 0, 0].sum(), lr)
    assert float(gradient[..., -1, -1].abs().sum()) > 0


def test_multiply_adds_follow_from_the_weights():
    """Every convolution runs at every pixel, but the coarse branch once per cell of 8x8."""
    network = small()
    convs = {n: m.weight.numel() for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    coarse = sum(v for n, v in convs.items() if n.endswith(("smfa.depthwise", "smfa.modulate")))
    expected = 40 * 48 * (sum(convs.values()) - coarse) + 5 * 6 * coarse
    assert cost(network, (40, 48)).by_operator["conv"] == expected


# Set5 x4 as the file's sidecar has it, an independent implementation's score; butterfly x2 measured here.
def test_published_weights_on_set5(shared_data):
    loaded = load_model(shared_data / "weights/smfanet_x4_df2k.safetensors", 4)
    assert loaded.info["network"] == "smfanet"
    result, known = score(loaded.network, open_set("Set5", 4)), loaded.info["sidecar"]["measured"]
    assert result.psnr == pytest.approx(known["Set5"]["psnr_y"], abs=0.0007)
    assert result.ssim == pytest.approx(known["Set5"]["ssim_y"], abs=0.00007)


def test_published_weights_on_butterfly(shared_data):
    loaded = load_model(shared_data / "weights/smfanet_plus_x2_df2k.safetensors", 2)
    assert loaded.info["network"] == "smfanet_plus"
    whole = open_set("Set5", 2)
    result = score(loaded.network, replace(whole, readers=whole.readers[2:3]))
    assert [image.name for image in result.images] == ["butterfly"]
    assert result.psnr == pytest.approx(35.8234, abs=0.0007)
    assert result.ssim == pytest.approx(0.97951, abs=0.00007)


@pytest.mark.slow
def test_exported_graph_has_dynamic_size():
    """The graph equals the network at sizes and batches that the export never saw."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (extra 'cpu')")
    network = small(blocks=2)
    low = network.facts.minimum_px
    batch, h, w = (torch.export.Dim(n, min=m) for n, m in (("n", 1), ("h", low), ("w", low)))
    program = torch.onnx.export(
        network,
        (torch.rand(2, 3, 18, 21),),
        dynamo=True,
        dynamic_shapes=({0: batch, 2: h, 3: w},),
        verbose=False,
    )
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, low, 40), (3, 3, 31, 16)):
        lr = torch.rand(shape)
        with torch.no_grad():
            expected = network(lr)
        (found,) = session.run(None, {session.get_inputs()[0].name: lr.numpy()})
        assert float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()) < 1e-5
