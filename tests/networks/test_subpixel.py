"""The upsampling of two layouts is one: values, gradients, and what the shuffle does to the layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from srkd.networks import build
from srkd.networks.subpixel import SubPixel, enlarge


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
