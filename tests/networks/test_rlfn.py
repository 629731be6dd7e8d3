"""RLFN: published sizes and cost, its attention by hand, taps, published scores."""

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
from srkd.networks.rlfn import LocalFeatureBlock, Rlfn, RlfnConfig, SpatialAttention
from srkd.types import Facts


def small(scale: int = 2, blocks: int = 2, rgb_range: float = 255.0) -> Rlfn:
    torch.manual_seed(0)
    config = RlfnConfig(scale, 6, 8, blocks, esa_channels=4, rgb_range=rgb_range)
    network = Rlfn(config).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize(
    ("name", "scale", "parameters"),
    [("rlfn", 2, 526_856), ("rlfn", 4, 543_740), ("rlfn_ntire", 4, 317_218)],
)
def test_parameters_equal_the_published_files(name, scale, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name, scale).parameters()) == parameters


def test_cost_equals_the_published_table():
    """README of the public code: 19.70 G operations and 80.05 M outputs of convolutions at 256x256.

    Its counter adds one operation per element that a LeakyReLU passes, and knows no interpolation.
    """
    network = build("rlfn_ntire", 4)
    convolutions = cost(network).by_operator["conv"]
    before_relu = {c for b in network.groups[:-1] for c in (b.conv1, b.conv2, b.conv3)}
    outputs: list[int] = []
    passed: list[int] = []

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        outputs.append(output.numel())
        passed.append(output.numel() if module in before_relu else 0)

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    network.to("meta")(torch.empty(1, 3, 256, 256, device="meta"))
    assert round((convolutions + sum(passed)) / 1e9, 2) == 19.70
    assert round(sum(outputs) / 1e6, 2) == 80.05


def test_attention_by_hand():
    """An image of the smallest size: one coarse cell, so one offset of the gate everywhere."""
    torch.manual_seed(2)
    attention = SpatialAttention(1, 1)
    for parameter in attention.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        for conv in (attention.squeeze, attention.excite):
            conv.weight.fill_(1.0)
        attention.down.weight.fill_(1 / 9)
        attention.conv.weight[..., 1, 1] = 2.0
    x = torch.rand(1, 1, 15, 15)
    means = [
        x[0, 0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].mean() for i in range(7) for j in range(7)
    ]
    torch.testing.assert_close(attention(x), x * torch.sigmoid(2 * max(means)))
    with torch.no_grad():
        attention.keep.weight.fill_(3.0)
    torch.testing.assert_close(attention(x), x * torch.sigmoid(2 * max(means) + 3 * x))


def test_block_by_hand():
    block = LocalFeatureBlock(RlfnConfig(channels=1, mid_channels=1, esa_channels=1))
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        for conv, factor in ((block.conv1, -1.0), (block.conv2, 2.0), (block.conv3, 3.0)):
            conv.weight[..., 1, 1] = factor
        block.mix.weight.fill_(4.0)
    x = torch.ones(1, 1, 15, 15)
    # -1 -> -0.05 -> -0.1 -> -0.005 -> -0.015 -> -0.00075; plus 1, times 4, gate 0.5
    torch.testing.assert_close(block(x), torch.full_like(x, 0.5 * 4 * (1 - 0.00075)))


def test_range_is_255_without_mean():
    network = small()
    lr = torch.rand(1, 3, 15, 15)
    with torch.no_grad():
        expected = F.conv2d(255 * lr, network.head.conv.weight, network.head.conv.bias, padding=1)
        torch.testing.assert_close(network.head(lr), expected)
        head = network.head(lr)
        expected = F.pixel_shuffle(network.tail.conv(2 * head), 2) / 255
        torch.testing.assert_close(network.tail(head, head), expected)


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


def test_facts_and_smallest_image():
    network = small()
    assert network.facts == Facts(2, receptive_field_px=None, exact_tiling=False, minimum_px=15)
    assert network(torch.rand(1, 3, 15, 17)).shape == (1, 3, 30, 34)
    with pytest.raises(RuntimeError):
        network(torch.rand(1, 3, 14, 17))


def test_every_pixel_depends_on_the_size_of_the_image():
    """The attention looks 28 px far, but a picture cut 150 px away shifts where: tiles cannot be exact."""
    torch.manual_seed(0)
    attention = SpatialAttention(4, 4).double()
    lr = torch.rand(1, 4, 240, 15, dtype=torch.float64, requires_grad=True)
    gate = attention(lr)
    furthest = 0
    for row in (0, 120, 200, 239):
        (gradient,) = torch.autograd.grad(gate[:, :, row].sum(), lr, retain_graph=True)
        rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
        furthest = max(furthest, row - int(rows[0]), int(rows[-1]) - row)
    assert 20 <= furthest <= 28
    cut = attention(lr[:, :, :200])
    moved = (gate[:, :, 10:50] - cut[:, :, 10:50]).detach().abs().max()
    assert float(moved) > 1e-6


# Set5 x4 as the file's sidecar has it, an independent implementation's score; butterfly x2 measured here.
def test_published_weights_on_set5(shared_data):
    loaded = load_model(shared_data / "weights/rlfn_x4_bytedance.safetensors", 4)
    assert loaded.info["network"] == "rlfn"
    result, known = score(loaded.network, open_set("Set5", 4)), loaded.info["sidecar"]["measured"]
    assert result.psnr == pytest.approx(known["Set5"]["psnr_y"], abs=0.0007)
    assert result.ssim == pytest.approx(known["Set5"]["ssim_y"], abs=0.00007)


def test_published_weights_on_butterfly(shared_data):
    loaded = load_model(shared_data / "weights/rlfn_x2_bytedance.safetensors", 2)
    assert loaded.info["network"] == "rlfn"
    whole = open_set("Set5", 2)
    result = score(loaded.network, replace(whole, readers=whole.readers[2:3]))
    assert [image.name for image in result.images] == ["butterfly"]
    assert result.psnr == pytest.approx(35.5797, abs=0.0007)
    assert result.ssim == pytest.approx(0.97908, abs=0.00007)


@pytest.mark.slow
def test_exported_graph_has_dynamic_size():
    """The graph equals the network at sizes and batches that the export never saw."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (extra 'cpu')")
    # In the range 0..255 the gates of random weights are steps, which multiply rounding errors.
    network = small(blocks=2, rgb_range=1.0)
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
