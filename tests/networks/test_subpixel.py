"""The upsampling of two layouts is one: values, gradients, and what the shuffle does to the layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from srkd.networks import build
from srkd.networks.subpixel import SubPixel, enlarge, finish, folded, in_turn


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


def test_a_sequence_keeps_what_stands_between_and_behind():
    torch.manual_seed(0)
    layers = [layer(4, 2), nn.PixelShuffle(2), nn.LeakyReLU(), nn.Conv2d(4, 3, 1).double()]
    x = torch.rand(1, 5, 4, 4, dtype=torch.double)
    expected = nn.Sequential(*layers)(x)
    found = SubPixel(*layers)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["edsr_tiny", "rdn_tiny", "rlfn"])
def test_networks_agree_in_both_layouts(name):
    torch.manual_seed(0)
    network = build(name, 4).eval()
    lr = torch.rand(1, 3, 24, 20)
    with torch.no_grad():
        plain = network(lr)
        last = network.to(memory_format=torch.channels_last)(
            lr.to(memory_format=torch.channels_last)
        )
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)
