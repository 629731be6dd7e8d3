"""RDN: sizes of the papers, a dense block by hand, the fusion of all blocks, taps, its receptive field."""

import pytest
import torch
import torch.nn.functional as F
from tiny_pair import images, student_of, teacher_of, training_of
from torch import nn

from srkd.errors import SrkdError
from srkd.networks import build
from srkd.networks.rdn import DenseBlock, Rdn, RdnConfig
from srkd.step import loss_terms


def small(scale: int = 2, blocks: int = 3, rgb_range: float = 1.0) -> Rdn:
    torch.manual_seed(0)
    config = RdnConfig(scale, channels=5, blocks=blocks, layers=2, growth=3, rgb_range=rgb_range)
    network = Rdn(config).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize(
    ("name", "x2", "x3", "x4"),
    [
        # By hand beside the paper's x4: the stages are one of 64 -> 256 less, or one of 64 -> 576.
        ("rdn", 22_271_107 - 147_712, 22_271_107 - 2 * 147_712 + 332_352, 22_271_107),
        ("rdn_tiny", 122_723 - 9_280, 122_723 - 2 * 9_280 + 20_880, 122_723),
    ],
)
def test_parameters_equal_mkd(name, x2, x3, x4):
    for scale, parameters in ((2, x2), (3, x3), (4, x4)):
        with torch.device("meta"):
            assert sum(p.numel() for p in build(name, scale).parameters()) == parameters


def test_dense_block_by_hand():
    block = DenseBlock(channels=1, layers=2, growth=1, first=False)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        block.layers[0].weight[0, :, 1, 1] = torch.tensor([2.0])
        block.layers[1].weight[0, :, 1, 1] = torch.tensor([1.0, -3.0])
        block.layers[1].bias.fill_(30.0)
        block.fuse.weight[0, :, 0, 0] = torch.tensor([1.0, 10.0, 100.0])
    x = torch.tensor([[[[4.0, -1.0]]]])
    # At 4: y1 = 8, y2 = 4 - 24 + 30 = 10, so 4 + 80 + 1000, plus 4. At -1: y1 = 0, y2 = 29.
    torch.testing.assert_close(block(x), torch.tensor([[[[1088.0, 2898.0]]]]))


def test_fusion_and_both_skips():
    network = small(scale=4)
    lr = torch.rand(2, 3, 5, 6)
    with torch.no_grad():
        head = network.head.conv(lr)
        first = network.groups[0].enter(head)
        one = first + network.groups[0].fuse(dense(network.groups[0], first))
        two = network.groups[1](one)
        three = network.groups[2](two)
        fusion = network.groups[3]
        y = fusion.conv(fusion.mix(torch.cat([one, two, three], 1))) + head
        up = network.tail.upsample
        assert [type(m).__name__ for m in up] == ["Conv2d", "PixelShuffle"] * 2 + ["Conv2d"]
        assert [up[i].out_channels for i in (0, 2, 4)] == [12, 12, 3]
        y = up[4](F.pixel_shuffle(up[2](F.pixel_shuffle(up[0](y), 2)), 2))
        torch.testing.assert_close(network(lr), y)


def dense(block: DenseBlock, x: torch.Tensor) -> torch.Tensor:
    for layer in block.layers:
        x = torch.cat([x, layer(x).relu()], 1)
    return x


def test_range_is_inside():
    network, wide = small(), small(rgb_range=255.0)
    lr = torch.rand(1, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(wide(lr), network(255 * lr) / 255)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_rest_of_every_tap_equals_the_forward_pass(scale):
    network = small(scale)
    lr = torch.rand(2, 3, 7, 9)
    assert network.tap_names == ("block1", "block2", "block3", "body")
    with torch.no_grad():
        result = network.run(lr, network.tap_names)
        assert torch.equal(result.sr, network(lr))
        assert result.sr.shape == (2, 3, 7 * scale, 9 * scale)
        assert tuple(result.taps) == network.tap_names and result.head is not None
        alone = network.features(lr, network.tap_names)
        for tap, feature in result.taps.items():
            assert torch.equal(alone[tap], feature)
            assert torch.equal(network.rest(feature, tap, result.head, (7, 9)), result.sr)
            other = network.rest(feature + 0.1, tap, result.head, (7, 9))
            assert float((other - result.sr).abs().max()) > 1e-3
    assert network.run(lr).taps == {}


def test_rest_takes_earlier_blocks_from_its_own_head():
    network = small()
    with torch.no_grad():
        result = network.run(torch.rand(1, 3, 6, 6), ["block1"])
        head, foreign = result.head, torch.rand(1, 5, 6, 6)
        # By hand: block 1 is this network's own, block 2 the foreign feature, block 3 follows from it.
        three = network.groups[2](foreign)
        body = network.groups[3]([result.taps["block1"], foreign, three])
        found = network.rest(foreign, "block2", head, (6, 6))
        torch.testing.assert_close(found, network.tail(body, head))


def test_between_runs_a_stretch_and_needs_the_head_for_the_fusion():
    network = small()
    with torch.no_grad():
        result = network.run(torch.rand(1, 3, 6, 6), network.tap_names)
        taps, head = result.taps, result.head
        found = network.between(taps["block1"], "block1", "block3")
        assert torch.equal(found, taps["block3"])
        assert torch.equal(network.between(taps["block2"], "block2", "body", head), taps["body"])
        assert network.between(taps["body"], "body", "body") is taps["body"]
    with pytest.raises(SrkdError, match="of rdn from 'block1' to 'body' need all its blocks"):
        network.between(taps["block1"], "block1", "body")


def test_gradient_reaches_every_parameter():
    network = small().train()
    network(torch.rand(1, 3, 6, 6)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


def test_receptive_field_is_what_the_gradient_says():
    # 1 and 1 of both first convolutions, 2 of a block, 1 of the fusion, 1 + 1/2 of the tail, rounded up.
    network = small(blocks=1).double()
    assert network.facts.receptive_field_px == 7 and network.facts.exact_tiling
    # Every path open, so that no product of the gradient cancels.
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.1)
    lr = torch.rand(1, 3, 19, 19, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(lr)[..., 18:20, 18:20].sum(), lr)
    seen = gradient[0].abs().sum(0).nonzero()
    # Seven on the side of each of the two output pixels' nearer half, six on the other.
    assert (seen.min().item(), seen.max().item()) == (2, 16)


@pytest.mark.parametrize("method", ["fitnet", "mipkd"])
def test_one_step_of_a_feature_method(method):
    student = student_of("rdn")
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.1)
    training = training_of(method, student, teacher_of("rdn", channels=6))
    terms = loss_terms(training, *images())
    assert len(terms) > 1
    sum(terms.values()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in student.parameters())
