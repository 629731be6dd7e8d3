"""HAN: sizes of the papers, layer and channel-spatial attention against loops, taps, facts."""

import pytest
import torch
from tiny_pair import images, student_of, teacher_of, training_of
from torch import nn

from srkd.errors import SrkdError
from srkd.networks import build
from srkd.networks.han import Han, HanConfig, HolisticAttention, layer_attention
from srkd.step import loss_terms
from srkd.types import Facts


def small(scale: int = 2) -> Han:
    torch.manual_seed(0)
    config = HanConfig(scale, channels=4, blocks=1, group_count=3, reduction=2, rgb_range=1.0)
    network = Han(config).eval()
    for parameter in network.parameters():  # the attentions begin with a weight of zero
        nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize(
    ("name", "x2", "x3", "x4"),
    [
        # By hand beside the paper's x4: the stages are one of 64 -> 256 less, or one of 64 -> 576.
        ("han", 16_071_745 - 147_712, 16_071_745 - 2 * 147_712 + 332_352, 16_071_745),
        ("han_tiny", 123_841 - 9_280, 123_841 - 2 * 9_280 + 20_880, 123_841),
    ],
)
def test_parameters_equal_mkd(name, x2, x3, x4):
    for scale, parameters in ((2, x2), (3, x3), (4, x4)):
        with torch.device("meta"):
            assert sum(p.numel() for p in build(name, scale).parameters()) == parameters


def test_layer_attention_by_hand():
    # Energies: of (1, 0) 1 with itself and 0 with (0, 2); of (0, 2) 4 with itself and 0 with (1, 0).
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    # Weights softmax(0, 1) of the first row and softmax(4, 0) of the second: the other layer weighs more.
    a, b = 1 / (1 + torch.e), 1 / (1 + torch.e**4)
    expected = torch.tensor([[[a, 2 * (1 - a)], [1 - b, 2 * b]]])
    torch.testing.assert_close(layer_attention(x), expected)


def test_layer_attention_against_loops():
    torch.manual_seed(1)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for n in range(2):
        for i in range(4):
            energies = torch.stack([(x[n, i] * x[n, j]).sum() for j in range(4)])
            powers = (energies.max() - energies).exp()
            for j in range(4):
                expected[n, i] += powers[j] / powers.sum() * x[n, j]
    torch.testing.assert_close(layer_attention(x), expected)


def test_attention_without_weight_is_two_convolutions():
    attention = HolisticAttention(4, group_count=2).eval()
    assert attention.layer_gamma.item() == attention.channel_gamma.item() == 0
    one, two = torch.rand(2, 1, 4, 5, 5)
    with torch.no_grad():
        body = attention.conv(two)
        layers = attention.layer_conv(torch.cat([body, two, one], 1))  # newest first
        expected = attention.merge(torch.cat([body, layers], 1))
        torch.testing.assert_close(attention([one, two]), expected)


def test_channel_spatial_attention_by_hand():
    attention = HolisticAttention(2, group_count=1)
    for parameter in attention.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        attention.conv.weight[:, :, 1, 1] = torch.eye(2)  # the body is the feature
        attention.channel_conv.weight[0, 0, 0, 1, 1] = 1.0  # looks at the channel before
        attention.channel_gamma.fill_(3.0)
        attention.merge.weight[:, :2, 1, 1] = torch.eye(2)  # of both maps the channel-spatial one
    x = torch.tensor([[[[2.0]], [[5.0]]]])
    # Gates: sigmoid(0) = 0.5 of the first channel, sigmoid(2) = 0.880797 of the second.
    expected = torch.tensor([[[[2 + 3 * 0.5 * 2]], [[5 + 3 * 0.880797 * 5]]]])
    torch.testing.assert_close(attention([x]), expected)


def test_attention_is_in_float32_under_autocast():
    attention = HolisticAttention(4, group_count=1)
    torch.manual_seed(0)
    seen: list[torch.dtype] = []
    features = [255 * torch.rand(1, 4, 6, 6)]
    original = torch.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "softmax", lambda x, dim: seen.append(x.dtype) or original(x, dim))
        with torch.autocast("cpu", torch.bfloat16):
            assert attention(features).dtype == torch.bfloat16
    assert seen == [torch.float32]


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_rest_of_every_tap_equals_the_forward_pass(scale):
    network = small(scale)
    lr = torch.rand(2, 3, 7, 5)
    assert network.tap_names == ("group1", "group2", "group3", "body")
    with torch.no_grad():
        result = network.run(lr, network.tap_names)
        assert torch.equal(result.sr, network(lr))
        assert result.sr.shape == (2, 3, 7 * scale, 5 * scale)
        alone = network.features(lr, network.tap_names)
        for tap, feature in result.taps.items():
            assert torch.equal(alone[tap], feature)
            assert torch.equal(network.rest(feature, tap, result.head, (7, 5)), result.sr)
            other = network.rest(feature + 0.1, tap, result.head, (7, 5))
            assert float((other - result.sr).abs().max()) > 1e-3
        torch.testing.assert_close(network.tail(result.taps["body"], result.head), result.sr)


def test_body_sees_the_last_feature_and_those_before():
    network = small()
    with torch.no_grad():
        result = network.run(torch.rand(1, 3, 6, 6), network.tap_names)
        one, two, three = (result.taps[f"group{i}"] for i in (1, 2, 3))
        torch.testing.assert_close(network.groups[3]([one, two, three]), result.taps["body"])
        for changed in ([one + 1, two, three], [one, two + 1, three], [one, two, three + 1]):
            gap = (network.groups[3](changed) - result.taps["body"]).abs().max()
            assert float(gap) > 1e-2
    with pytest.raises(SrkdError, match="of han from 'group1' to 'body' need all its groups"):
        network.between(one, "group1", "body")


def test_gradient_reaches_every_parameter():
    network = small().train()
    network(torch.rand(2, 3, 6, 6)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


def test_facts():
    network = small()
    assert network.facts == Facts(2, receptive_field_px=None, exact_tiling=False)
    lr = torch.rand(1, 3, 40, 40, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(lr)[..., 0, 0].sum(), lr)
    assert float(gradient[..., -1, -1].abs().sum()) > 0
    with torch.no_grad():
        assert network(torch.rand(1, 3, 1, 1)).shape == (1, 3, 2, 2)


def test_too_few_channels_are_refused():
    with pytest.raises(SrkdError, match="HAN with 8 channels has none left in its channel"):
        HanConfig(channels=8)


@pytest.mark.parametrize("method", ["fitnet", "mipkd"])
def test_one_step_of_a_feature_method(method):
    student = student_of("han")
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.1)
    training = training_of(method, student, teacher_of("han", channels=6))
    terms = loss_terms(training, *images())
    assert len(terms) > 1
    sum(terms.values()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in student.parameters())
