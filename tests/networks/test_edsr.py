"""EDSR: sizes of the papers, hand-worked block and tail, reach."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from srkd.networks import build
from srkd.networks.base import DIV2K_MEAN
from srkd.networks.edsr import Edsr, EdsrConfig, ResidualBlock


def parameters(name: str, scale: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(name, scale).parameters())


@pytest.mark.parametrize(
    ("name", "x2", "x3", "x4"),
    [
        ("edsr", 40_729_603, 43_680_003, 43_089_923),
        ("edsr_c64b32", 2_551_555, 2_736_195, 2_699_267),
        ("edsr_baseline", 1_369_859, 1_554_499, 1_517_571),
    ],
)
def test_parameters_equal_the_papers(name, x2, x3, x4):
    assert [parameters(name, s) for s in (2, 3, 4)] == [x2, x3, x4]


def test_parameters_of_small_students():
    assert parameters("edsr_c16b32", 4) == 170_243
    assert parameters("edsr_tiny", 4) == 40_323
    assert parameters("edsr_mlperf_f64b5", 2) == 414_924
    assert parameters("edsr_mlperf_f32b5", 2) == 106_092


def centre(conv: nn.Conv2d, weights: torch.Tensor) -> None:
    """Make a 3x3 convolution a matrix (c_out, c_in) at every pixel, without bias."""
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, :, 1, 1] = weights
        assert conv.bias is not None
        conv.bias.zero_()


def test_block_by_hand():
    block = ResidualBlock(1, residual_scale=0.1)
    centre(block.conv1, torch.tensor([[2.0]]))
    centre(block.conv2, torch.tensor([[3.0]]))
    x = torch.tensor([[[[1.0, -1.0]]]])
    # 1 + 0.1 * 3 * relu(2) = 1.6, and relu(-2) = 0 leaves -1
    torch.testing.assert_close(block(x), torch.tensor([[[[1.6, -1.0]]]]))


@pytest.mark.parametrize("mean_shift", [True, False])
def test_network_of_identities_repeats_pixels(mean_shift):
    """Head picks the channels, body is zero, the tail repeats: mean shift and range must cancel."""
    config = EdsrConfig(2, channels=3, blocks=1, mean_shift=mean_shift, tail="one_step")
    network = Edsr(config).eval()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    centre(network.head.conv, torch.eye(3))
    centre(network.tail.conv, torch.eye(3).repeat_interleave(4, dim=0))
    lr = torch.rand(2, 3, 5, 4)
    expected = F.interpolate(lr, scale_factor=2, mode="nearest")
    torch.testing.assert_close(network(lr), expected, atol=1e-6, rtol=0)


def test_internal_range_and_mean():
    network = Edsr(EdsrConfig(2, channels=3, blocks=1)).eval()
    centre(network.head.conv, torch.eye(3))
    lr = torch.ones(1, 3, 1, 1)
    expected = [(1 - m) * 255 for m in DIV2K_MEAN]  # 140.556, 143.5395, 151.98
    torch.testing.assert_close(network.head(lr).flatten(), torch.tensor(expected))
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(network(lr)[0, :, 0, 0], torch.tensor(DIV2K_MEAN))


@pytest.mark.parametrize(
    ("scale", "tail"), [(2, "staged"), (3, "staged"), (4, "staged"), (2, "one_step")]
)
def test_receptive_field_is_exact(scale, tail):
    network = Edsr(EdsrConfig(scale, channels=4, blocks=2, tail=tail)).double().eval()
    for parameter in network.parameters():
        nn.init.uniform_(parameter, 0.1, 1.0)  # positive, so that nothing cancels
    radius = network.facts.receptive_field_px
    assert radius is not None
    size, at = 4 * radius + 1, 2 * radius
    furthest = 0
    for sub in range(scale):
        lr = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
        pixel = network(lr)[..., at * scale + sub, at * scale + sub].sum()
        (gradient,) = torch.autograd.grad(pixel, lr)
        rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
        furthest = max(furthest, at - int(rows[0]), int(rows[-1]) - at)
    assert furthest == radius


def test_tile_with_halo_equals_whole_image():
    torch.manual_seed(0)
    network = Edsr(EdsrConfig(3, channels=8, blocks=2)).double().eval()
    halo = network.facts.receptive_field_px
    assert halo is not None and network.facts.exact_tiling
    lr = torch.rand(1, 3, 40, 33, dtype=torch.float64)
    whole = network(lr)
    top, bottom, left = 15, 22, 16
    tile = network(lr[..., top - halo : bottom + halo, left - halo :])
    inner = tile[..., 3 * halo : 3 * (halo + bottom - top), 3 * halo :]
    expected = whole[..., 3 * top : 3 * bottom, 3 * left :]
    torch.testing.assert_close(inner, expected, atol=1e-12, rtol=0)
