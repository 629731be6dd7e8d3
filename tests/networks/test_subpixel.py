"""The upsampling of two layouts is one: values, gradients, and what the shuffle does to the layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from srkd.devices import place
from srkd.networks import build, subpixel
from srkd.networks.subpixel import (
    SubPixel,
    collapse,
    collapsed,
    enlarge,
    finish,
    folded,
    in_turn,
    linear_stages,
)


def layer(channels: int, r: int, kernel: int = 3) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(5, channels * r * r, kernel, padding=kernel // 2).double()


@pytest.mark.parametrize(("channels", "r", "kernel"), [(1, 2, 3), (3, 4, 3), (7, 3, 1)])
def test_channels_last_gives_the_values_and_gradients_of_the_definition(channels, r, kernel):
    conv = layer(channels, r, kernel)
    x = torch.rand(2, 5, 6, 4, dtype=torch.double)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    plain = x.clone().requires_grad_()
    expected = F.pixel_shuffle(conv(plain), r)
    found = enlarge(conv, nn.PixelShuffle(r), last)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    weight = torch.rand_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), [plain, *conv.parameters()])
    given = torch.autograd.grad((found * weight).sum(), [last, *conv.parameters()])
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("r", [2, 3])
@pytest.mark.parametrize(("h", "w"), [(6, 4), (1, 2)])
def test_a_last_convolution_is_folded_exactly(r, h, w):
    """Borders included: what lies beyond the image is zero at either size."""
    conv, shuffle = layer(7, r), nn.PixelShuffle(r)
    last = nn.Conv2d(7, 3, 3, padding=1).double()
    x = torch.rand(2, 5, h, w, dtype=torch.double)
    plain = x.clone().requires_grad_()
    other = x.to(memory_format=torch.channels_last).requires_grad_()
    expected, found = last(shuffle(conv(plain))), finish(conv, shuffle, last, other)
    torch.testing.assert_close(found, expected)
    weight, parameters = torch.rand_like(expected), [*conv.parameters(), *last.parameters()]
    wanted = torch.autograd.grad((expected * weight).sum(), [plain, *parameters])
    given = torch.autograd.grad((found * weight).sum(), [other, *parameters])
    for one, two in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, two)


def test_folded_weights_by_hand():
    """The middle weight connects a place with itself; the one above it with the row before, or the square before."""
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1], weight[0, 0, 0, 1] = 5.0, 7.0
    whole = folded(weight, 2).view(2, 2, 2, 2, 3, 3)  # (I, J, i, j, Q, P)
    expected = torch.zeros_like(whole)
    for column in (0, 1):
        for row in (0, 1):
            expected[row, column, row, column, 1, 1] = 5.0
        expected[1, column, 0, column, 1, 1] = 7.0
        expected[0, column, 1, column, 0, 1] = 7.0
    assert torch.equal(whole, expected)


def tail(*factors: int, channels: int = 5) -> list[nn.Module]:
    """Convolution and shuffle for every factor, then a convolution to three channels."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for r in factors:
        layers += [nn.Conv2d(channels, channels * r * r, 3, padding=1), nn.PixelShuffle(r)]
    return [layer.double() for layer in (*layers, nn.Conv2d(channels, 3, 3, padding=1))]


@pytest.mark.parametrize("factors", [(2,), (3,), (4,), (2, 2), (3, 2), (2, 2, 2)])
def test_a_whole_tail_is_one_convolution(factors):
    """Values and gradients, with the border, where every stage has zeros of its own beyond the image."""
    layers = tail(*factors)
    x = torch.rand(2, 5, 7, 9, dtype=torch.double)
    plain = x.clone().requires_grad_()
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    stages = linear_stages(layers)
    assert stages is not None
    expected, found = nn.Sequential(*layers)(plain), collapse(*stages, last)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    weight, parameters = torch.rand_like(expected), list(nn.Sequential(*layers).parameters())
    wanted = torch.autograd.grad((expected * weight).sum(), [plain, *parameters])
    given = torch.autograd.grad((found * weight).sum(), [last, *parameters])
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_collapsed_weights_by_hand():
    """One channel, weights in the middle alone: each of the 16 places is w1[i, j] * w2[k, l] * w3 of its own pixel."""
    one, two, last = (nn.Conv2d(1, n, 3, padding=1) for n in (4, 4, 1))
    shuffle = nn.PixelShuffle(2)
    for conv, value in (
        (one, [1.0, 2.0, 3.0, 4.0]),
        (two, [10.0, 20.0, 30.0, 40.0]),
        (last, [5.0]),
    ):
        conv.weight.data.zero_()
        conv.weight.data[:, 0, 1, 1] = torch.tensor(value)
        assert conv.bias is not None
        nn.init.ones_(conv.bias)
    weight, bias = collapsed([(one, shuffle), (two, shuffle)], last)
    places = weight[:, 0, 2, 2].view(4, 4)
    # Row 0: first square row (1, 2), second (10, 20): 1 * 10, 1 * 20, 2 * 10, 2 * 20, times 5.
    assert places[0].tolist() == [50.0, 100.0, 100.0, 200.0]
    assert places[3].tolist() == [3 * 30 * 5, 3 * 40 * 5, 4 * 30 * 5, 4 * 40 * 5]
    weight.data[:, 0, 2, 2] = 0
    assert weight.abs().max() == 0
    assert bias.view(4, 4)[0].tolist() == [(10 + 1) * 5 + 1, (20 + 1) * 5 + 1] * 2


@pytest.mark.parametrize(
    ("change", "used"),
    [
        ({}, True),
        ({"side": subpixel.LEAST_SIDE - 1}, False),
        ({"factors": (2,)}, False),
        ({"channels": 40}, False),  # 1,600 pixels are few for it
        ({"between": nn.ReLU()}, False),
        ({"last": nn.Conv2d(5, 3, 1)}, False),
        ({"last": nn.Conv2d(5, 3, 3, padding=1, padding_mode="reflect")}, False),
        ({"last": nn.Conv2d(5, 3, 3)}, False),
        ({"layout": torch.contiguous_format}, False),
    ],
    ids=str,
)
def test_when_a_tail_is_collapsed(monkeypatch, change, used):
    seen = []
    monkeypatch.setattr(subpixel, "collapse", lambda *a: seen.append(1) or collapse(*a))
    layers = tail(*change.get("factors", (2, 2)), channels=change.get("channels", 5))
    if "between" in change:
        layers.insert(2, change["between"])
    if "last" in change:
        layers[-1] = change["last"].double()
    side, layout = (
        change.get("side", subpixel.LEAST_SIDE),
        change.get("layout", torch.channels_last),
    )
    x = torch.rand(1, change.get("channels", 5), side, side, dtype=torch.double)
    expected = nn.Sequential(*layers)(x)
    found = in_turn(layers, x.contiguous(memory_format=layout))
    torch.testing.assert_close(found, expected)
    assert bool(seen) == used


def test_the_weights_of_a_collapsed_tail_are_made_in_full_precision():
    """Half precision rounds them once, not once for every stage."""
    layers = [layer.float() for layer in tail(2, 2, channels=16)]
    stages = linear_stages(layers)
    assert stages is not None
    with torch.autocast("cpu", torch.bfloat16):
        lowered = collapsed(*stages)
    exact = collapsed(*stages)
    assert lowered[0].dtype == torch.float32
    for one, other in zip(lowered, exact, strict=True):
        assert torch.equal(one, other)


def test_only_a_convolution_at_the_end_is_folded(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "srkd.networks.subpixel.folded", lambda w, r: seen.append(r) or folded(w, r)
    )
    x = torch.rand(1, 5, 4, 3, dtype=torch.double).to(memory_format=torch.channels_last)
    conv, shuffle = layer(5, 2), nn.PixelShuffle(2)
    middle, last = nn.Conv2d(5, 20, 3, padding=1).double(), nn.Conv2d(5, 3, 3, padding=1).double()
    two = in_turn([conv, shuffle, middle, shuffle, last], x)
    assert len(seen) == 1
    torch.testing.assert_close(two, last(shuffle(middle(shuffle(conv(x.contiguous()))))))
    in_turn([conv, shuffle, nn.ReLU(), last], x)
    in_turn([conv, shuffle, last, nn.ReLU()], x)
    in_turn([conv, shuffle, last], x.contiguous())
    assert len(seen) == 1


def test_the_plain_layout_is_the_definition_bit_for_bit():
    conv, x = layer(3, 2).float(), torch.rand(2, 5, 6, 4)
    assert torch.equal(enlarge(conv, nn.PixelShuffle(2), x), F.pixel_shuffle(conv(x), 2))


def test_second_gradients_pass_through():
    conv = layer(2, 2)
    network = SubPixel(conv, nn.PixelShuffle(2))
    x = torch.rand(1, 5, 3, 3, dtype=torch.double).to(memory_format=torch.channels_last)
    assert torch.autograd.gradgradcheck(
        lambda weight: functional_call(network, {"0.weight": weight}, (x,)) ** 2,
        conv.weight.detach().requires_grad_(),
    )


class Collapsed(nn.Sequential):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        stages = linear_stages(list(self))
        assert stages is not None
        return collapse(*stages, input)


def test_second_gradients_pass_through_a_collapsed_tail():
    network = Collapsed(*tail(2, channels=2))
    x = torch.rand(1, 2, 6, 6, dtype=torch.double).to(memory_format=torch.channels_last)
    weight = dict(network.named_parameters())["0.weight"].detach().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda weight: functional_call(network, {"0.weight": weight}, (x,)) ** 2, weight
    )


def test_a_sequence_keeps_what_stands_between_and_behind():
    torch.manual_seed(0)
    layers = [layer(4, 2), nn.PixelShuffle(2), nn.LeakyReLU(), nn.Conv2d(4, 3, 1).double()]
    x = torch.rand(1, 5, 4, 4, dtype=torch.double)
    expected = nn.Sequential(*layers)(x)
    found = SubPixel(*layers)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["edsr_tiny", "rdn_tiny", "rlfn", "rcan_a"])
def test_networks_agree_in_both_layouts(name):
    torch.manual_seed(0)
    network = build(name, 4).eval()
    lr = torch.rand(1, 3, 44, 52)
    with torch.no_grad():
        plain = network(lr)
        place(network, torch.device("cpu"), channels_last=True)
        last = network(lr.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)
