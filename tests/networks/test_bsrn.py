"""BSRN: published sizes, its attentions by hand, the fusion of all blocks, taps, published scores."""

import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from srkd.cost import cost
from srkd.data.sets import open_set
from srkd.errors import SrkdError
from srkd.evaluate import score
from srkd.models import load_model
from srkd.networks import build
from srkd.networks.bsrn import BSConv, Bsrn, BsrnConfig, ContrastAttention, SpatialAttention
from srkd.types import Facts


def small(scale: int = 2, blocks: int = 3) -> Bsrn:
    torch.manual_seed(0)
    network = Bsrn(BsrnConfig(scale, channels=16, blocks=blocks)).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize(("scale", "parameters"), [(2, 331_628), (3, 340_283), (4, 352_400)])
def test_parameters_equal_the_published_files(scale, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build("bsrn", scale).parameters()) == parameters


def test_separable_convolution_by_hand():
    conv = BSConv(2, 1)
    with torch.no_grad():
        conv.pointwise.weight.copy_(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1))
        conv.depthwise.weight.fill_(1.0)
        assert conv.depthwise.bias is not None
        conv.depthwise.bias.fill_(0.5)
    x = torch.tensor([[[[1.0, 0.0]], [[0.0, 3.0]]]])
    # Pointwise gives 1 and 6, the depthwise sum of both is 7 at both pixels.
    torch.testing.assert_close(conv(x), torch.full((1, 1, 1, 2), 7.5))


def test_contrast_attention_by_hand():
    attention = ContrastAttention(16)
    for parameter in attention.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        attention.squeeze.weight[0, 0] = 1.0
        attention.excite.weight[1] = 1.0
    x = torch.zeros(1, 16, 1, 2)
    x[0, 0] = torch.tensor([1.0, 5.0])  # mean 3, deviation 2: 5 after the squeeze
    x[0, 1] = torch.tensor([1.0, -1.0])
    expected = 0.5 * x
    expected[0, 1] = torch.tensor([0.9933071, -0.9933071])  # sigmoid(5)
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=0)


def test_spatial_attention_equals_its_definition():
    torch.manual_seed(1)
    attention = SpatialAttention(16).double()
    x = torch.randn(2, 16, 33, 20, dtype=torch.float64)

    def separable(conv: BSConv, y: torch.Tensor, stride: int = 1, padding: int = 1) -> torch.Tensor:
        y = F.conv2d(y, conv.pointwise.weight)
        d = conv.depthwise
        return F.conv2d(y, d.weight, d.bias, stride, padding, groups=y.shape[1])

    with torch.no_grad():
        y = F.conv2d(x, attention.squeeze.weight, attention.squeeze.bias)
        z = F.max_pool2d(separable(attention.down, y, 2, 0), kernel_size=7, stride=3)
        assert z.shape == (2, 4, 4, 1)
        z = F.gelu(separable(attention.conv1, z))
        z = separable(attention.conv3, F.gelu(separable(attention.conv2, z)))
        z = F.interpolate(z, (33, 20), mode="bilinear") + attention.keep(y)
        torch.testing.assert_close(attention(x), x * torch.sigmoid(attention.excite(z)))


def test_fusion_sees_every_block_and_the_head_four_images():
    network = small()
    lr = torch.rand(1, 3, 16, 17)
    with torch.no_grad():
        head = network.head.conv(lr.repeat(1, 4, 1, 1))
        one = network.groups[0](head)
        two = network.groups[1](one)
        three = network.groups[2](two)
        mixed = F.gelu(network.groups[3].mix(torch.cat([one, two, three], 1)))
        expected = F.pixel_shuffle(network.tail.conv(network.groups[3].conv(mixed) + head), 2)
        torch.testing.assert_close(network(lr), expected)


def test_rest_of_every_tap_equals_the_forward_pass():
    network = small()
    lr = torch.rand(2, 3, 18, 21)
    assert network.tap_names == ("block1", "block2", "block3", "body")
    with torch.no_grad():
        result = network.run(lr, network.tap_names)
        assert torch.equal(result.sr, network(lr))
        assert tuple(result.taps) == network.tap_names and result.head is not None
        for tap, feature in result.taps.items():
            assert feature.shape == result.head.shape == (2, network.channels, 18, 21)
            assert torch.equal(network.rest(feature, tap, result.head, (18, 21)), result.sr)
            other = network.rest(feature + 0.1, tap, result.head, (18, 21))
            assert float((other - result.sr).abs().max()) > 1e-3
    assert network.run(lr).taps == {}


def test_rest_takes_earlier_blocks_from_its_own_head():
    network = small()
    lr = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        result = network.run(lr, ["block1"])
        foreign = torch.rand(1, 16, 16, 16)
        head = result.head
        # By hand: block 1 is this network's own, block 2 the foreign feature, block 3 follows from it.
        three = network.groups[2](foreign)
        body = network.groups[3](torch.cat([result.taps["block1"], foreign, three], 1))
        found = network.rest(foreign, "block2", head, (16, 16))
        torch.testing.assert_close(found, network.tail(body, head))


def test_between_runs_a_stretch_and_needs_the_head_for_the_fusion():
    network = small()
    with torch.no_grad():
        result = network.run(torch.rand(1, 3, 16, 16), network.tap_names)
        taps, head = result.taps, result.head
        found = network.between(taps["block1"], "block1", "block3")
        assert torch.equal(found, taps["block3"])
        assert torch.equal(network.between(taps["block2"], "block2", "body", head), taps["body"])
        assert network.between(taps["body"], "body", "body") is taps["body"]
    with pytest.raises(SrkdError, match="from 'block1' to 'body' need all its blocks"):
        network.between(taps["block1"], "block1", "body")


def test_gradient_reaches_the_feature_through_the_rest():
    network = small()
    head = network.head(torch.rand(1, 3, 16, 16)).detach()
    for tap in network.tap_names:
        feature = torch.rand(1, 16, 16, 16, requires_grad=True)
        (gradient,) = torch.autograd.grad(
            network.rest(feature, tap, head, (16, 16)).square().sum(), feature
        )
        assert float(gradient.abs().sum()) > 0


def test_flat_image_has_finite_gradients():
    network = small(blocks=1)
    with torch.no_grad():
        network.groups[0].fuse.weight.zero_()  # exactly flat channels before the contrast
    network(torch.rand(1, 3, 16, 16)).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)


def test_facts_and_smallest_image():
    network = small(blocks=1)
    assert network.facts == Facts(2, receptive_field_px=None, exact_tiling=False, minimum_px=15)
    assert network(torch.rand(1, 3, 15, 16)).shape == (1, 3, 30, 32)
    with pytest.raises(RuntimeError):
        network(torch.rand(1, 3, 14, 16))
    # Channel attention: the far corner of the image is seen.
    nn.init.constant_(network.groups[0].cca.squeeze.bias, 10.0)  # a live ReLU
    lr = torch.rand(1, 3, 60, 60, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(lr)[..., 0, 0].sum(), lr)
    assert float(gradient[..., -1, -1].abs().sum()) > 0


def test_multiply_adds_by_hand():
    network = small(blocks=1)
    counted = dict(cost(network, (32, 32)).by_operator)
    c, f, k, n = 16, 4, 8, 32 * 32
    # Head, three refinements with their distillation, the last one, fuse, ESA outside the coarse map.
    per_pixel = 12 * c + 9 * c + 3 * (c * c + 9 * c + c * k) + c * k + 9 * k + 4 * k * c
    per_pixel += c * f + f * f + f * f + f * c  # squeeze, keep, pointwise of stride 1, excite
    per_pixel += c * c + c * c + 9 * c + 9 * c * 12  # fusion of one block and the tail
    coarse = 9 * f * 15 * 15 + 3 * (f * f + 9 * f) * 3 * 3
    assert counted["conv"] == per_pixel * n + coarse + 2 * c  # and the channel attention, once
    assert counted["adaptive_avg_pool2d"] == 2 * c * n


def test_too_few_channels_are_refused():
    with pytest.raises(SrkdError, match="BSRN with 12 channels has none left"):
        BsrnConfig(channels=12)


# Set5 x4 as the file's sidecar has it, an independent implementation's score; butterfly x2 measured here.
def test_published_weights_on_set5(shared_data):
    loaded = load_model(shared_data / "weights/bsrn_x4_official.safetensors", 4)
    assert loaded.info["network"] == "bsrn"
    result, known = score(loaded.network, open_set("Set5", 4)), loaded.info["sidecar"]["measured"]
    assert result.psnr == pytest.approx(known["Set5"]["psnr_y"], abs=0.0007)
    assert result.ssim == pytest.approx(known["Set5"]["ssim_y"], abs=0.00007)


def test_published_weights_on_butterfly(shared_data):
    loaded = load_model(shared_data / "weights/bsrn_x2_official.safetensors", 2)
    assert loaded.info["network"] == "bsrn"
    whole = open_set("Set5", 2)
    result = score(loaded.network, replace(whole, readers=whole.readers[2:3]))
    assert [image.name for image in result.images] == ["butterfly"]
    assert result.psnr == pytest.approx(35.5624, abs=0.0007)
    assert result.ssim == pytest.approx(0.97884, abs=0.00007)


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
