"""RCAN: sizes of the papers, hand-worked attention, the whole image as receptive field."""

import pytest
import torch
from torch import nn

from srkd.networks import build
from srkd.networks.rcan import AttentionBlock, ChannelAttention, Rcan, RcanConfig


def parameters(name: str, scale: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(name, scale).parameters())


@pytest.mark.parametrize(
    ("name", "x2", "x3", "x4"),
    [
        ("rcan", 15_444_643, 15_629_283, 15_592_355),
        ("rcan_lightweight", 5_023_603, 5_208_243, 5_171_315),
    ],
)
def test_parameters_equal_the_papers(name, x2, x3, x4):
    assert [parameters(name, s) for s in (2, 3, 4)] == [x2, x3, x4]


def test_parameters_of_mkd_students():
    assert [parameters(f"rcan_{k}", 4) for k in "abc"] == [49_799, 106_067, 420_515]


def test_attention_by_hand():
    attention = ChannelAttention(2, reduction=2)
    with torch.no_grad():
        attention.squeeze.weight.copy_(torch.tensor([1.0, 1.0]).view(1, 2, 1, 1))
        attention.squeeze.bias.zero_()
        attention.excite.weight.copy_(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))
        attention.excite.bias.zero_()
    x = torch.tensor([[[[1.0, 3.0]], [[-1.0, 1.0]]]])
    # Means 2 and 0, squeezed to 2: gates sigmoid(0) = 0.5 and sigmoid(2) = 0.880797
    expected = torch.tensor([[[[0.5, 1.5]], [[-0.880797, 0.880797]]]])
    torch.testing.assert_close(attention(x), expected)
    negative = torch.full((1, 2, 1, 1), -5.0)  # relu between the two convolutions: gates 0.5
    torch.testing.assert_close(attention(negative), 0.5 * negative)


def test_block_adds_gated_branch():
    block = AttentionBlock(16, reduction=16)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(block.conv2.bias, 4.0)
    x = torch.rand(1, 16, 3, 3)
    torch.testing.assert_close(block(x), x + 0.5 * 4.0)


def test_every_pixel_reaches_every_pixel():
    torch.manual_seed(0)
    network = Rcan(RcanConfig(2, channels=16, blocks=1, group_count=2, reduction=4)).double().eval()
    assert network.facts.receptive_field_px is None
    assert not network.facts.exact_tiling
    lr = torch.rand(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(lr)[..., 0, 0].sum(), lr)
    assert float(gradient[..., -1, -1].abs().sum()) > 0
