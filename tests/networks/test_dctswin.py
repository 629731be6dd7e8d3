"""DCTSwin: sizes, the transform, a layer against its definition, what the missing mask changes, any size."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.networks import swinir
from srkd.networks.base import DIV2K_MEAN
from srkd.networks.dctswin import (
    DctLayer,
    DctSwin,
    DctSwinConfig,
    MixerLayer,
    dct_matrix,
    mean_image,
    token_hidden,
    transform,
)
from srkd.networks.swinir import SwinIRConfig, SwinLayer, WindowAttention

SMALL = {"teachers": 2, "scale": 2, "channels": 12, "depths": (2, 2), "heads": 2, "window": 4}


def small(seed: int = 0, **changes) -> DctSwin:
    """A small network with weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    network = DctSwin(DctSwinConfig(**{**SMALL, **changes})).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ({}, (86_316, 99_291, 117_456)),
        ({"tail": "classical"}, (247_043, 441_403, 418_083)),
        (
            {"tail": "classical", "channels": 96, "depths": (4, 4)},
            (1_094_579, 1_318_099, 1_335_603),
        ),
    ],
)
def test_parameters_equal_the_papers(sizes, counts):
    networks = [DctSwin(DctSwinConfig(scale=scale, **sizes)) for scale in (2, 3, 4)]
    assert tuple(parameters(network) for network in networks) == counts


def test_layers_of_all_kinds_have_about_the_same_size():
    counts = {
        kind: {parameters(layer) for group in network.groups[:-1] for layer in group.layers}
        for kind in ("dct", "swin", "mixer")
        for network in [DctSwin(DctSwinConfig(layer=kind))]
    }
    # Two norms of 48, attention 2400 + 6 * 15^2, MLP 24 -> 48 -> 24: 1200 + 1176.
    assert counts["dct"] == counts["swin"] == {96 + 2400 + 1350 + 1200 + 1176} == {6222}
    # In place of attention the token MLP 64 -> 29 -> 64: 29 * 65 + 64 * 30.
    assert token_hidden(24, 6, 8) == 29
    assert counts["mixer"] == {96 + 1885 + 1920 + 1200 + 1176} == {6277}


def test_transform_of_a_hand_worked_window():
    # D = [[1, 1], [1, -1]] / sqrt(2), so [[1, 2], [3, 8]] becomes [[14, -6], [-8, 4]] / 2.
    windows = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [3.0, 1.0], [8.0, 0.0]]])
    found = transform(windows, dct_matrix(2))
    torch.testing.assert_close(found[0, :, 0], torch.tensor([7.0, -3.0, -4.0, 2.0]))
    # The other channel has only the lower left pixel; it does not mix with the first.
    torch.testing.assert_close(found[0, :, 1], torch.tensor([0.5, 0.5, -0.5, -0.5]))


def test_matrix_by_its_formula():
    d = dct_matrix(4)
    assert d[0].tolist() == [0.5] * 4
    # sqrt(1/2) cos(pi/8 * 1, 3, 5, 7)
    assert d[1].tolist() == pytest.approx([0.653281, 0.270598, -0.270598, -0.653281], abs=1e-6)


def test_transform_keeps_energy_and_has_an_inverse():
    x, d = torch.randn(5, 64, 3), dct_matrix(8)
    y = transform(x, d)
    torch.testing.assert_close(y.square().sum((0, 1)), x.square().sum((0, 1)), rtol=1e-5, atol=0)
    torch.testing.assert_close(transform(y, d.T), x, rtol=0, atol=1e-5)
    flat = transform(torch.ones(1, 64, 1), d)[0, :, 0]
    assert flat[0] == pytest.approx(8) and flat[1:].abs().max() < 1e-5


def test_transform_is_float32_under_autocast():
    x, d = torch.randn(3, 16, 2), dct_matrix(4)
    with torch.autocast("cpu", torch.bfloat16):
        found = transform(x, d)
        halved = transform(x.bfloat16(), d)
    assert torch.equal(found, transform(x, d)) and halved.dtype == torch.float32


def attention_by_definition(attn: WindowAttention, tokens: Tensor, window: int) -> Tensor:
    """(W*W, C) -> same, head by head and pair by pair."""
    n, c = tokens.shape
    d = c // attn.heads
    q, k, v = attn.qkv(tokens).split(c, dim=1)
    heads = []
    for head in range(attn.heads):
        at = slice(head * d, (head + 1) * d)
        logits = q[:, at] @ k[:, at].T / math.sqrt(d)
        for i, j in product(range(n), repeat=2):
            dy, dx = i // window - j // window, i % window - j % window
            row = (dy + window - 1) * (2 * window - 1) + dx + window - 1
            logits[i, j] += attn.relative_position_bias_table[row, head]
        heads.append(logits.softmax(1) @ v[:, at])
    return attn.proj(torch.cat(heads, 1))


def layer_by_definition(layer: DctLayer, x: Tensor, window: int, z: int) -> Tensor:
    """The order of the paper on one image (h, w, C): norm, roll, window, DCT, attention, and all back."""
    h, w, c = x.shape
    basis = torch.tensor(
        [
            [
                math.sqrt((1 if u == 0 else 2) / window)
                * math.cos(math.pi * (2 * i + 1) * u / (2 * window))
                for i in range(window)
            ]
            for u in range(window)
        ],
        dtype=x.dtype,
    )
    y = torch.roll(layer.norm1(x), (-z, -z), (0, 1))
    result = torch.zeros_like(y)
    for top, left in product(range(0, h, window), range(0, w, window)):
        cut = y[top : top + window, left : left + window]
        coefficients = torch.stack([basis @ cut[..., i] @ basis.T for i in range(c)], -1)
        mixed = attention_by_definition(layer.attn, coefficients.reshape(-1, c), window)
        mixed = mixed.view(window, window, c)
        back = torch.stack([basis.T @ mixed[..., i] @ basis for i in range(c)], -1)
        result[top : top + window, left : left + window] = back
    x = x + torch.roll(result, (z, z), (0, 1))
    return x + layer.mlp(layer.norm2(x))


@pytest.mark.parametrize("shifted", [False, True])
def test_layer_equals_its_definition(shifted):
    torch.manual_seed(1)
    layer = DctLayer(SwinIRConfig(channels=6, heads=2, window=4), shifted, 0.0).double().eval()
    layer.matrix = dct_matrix(4).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    x = torch.randn(2, 8, 12, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = [layer_by_definition(layer, image, 4, 2 if shifted else 0) for image in x]
        # The matrix is rounded to float32.
        torch.testing.assert_close(layer(x, None), torch.stack(expected), atol=1e-5, rtol=0)


def test_mixer_layer_equals_its_definition():
    torch.manual_seed(1)
    layer = MixerLayer(SwinIRConfig(channels=6, heads=2, window=2), 0.0).eval()
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        y, mixed = layer.norm1(x), torch.zeros_like(x)
        for top, left, channel in product(range(0, 4, 2), range(0, 6, 2), range(6)):
            cut = y[0, top : top + 2, left : left + 2, channel]
            own = layer.token_mlp(cut.reshape(4)).view(2, 2)
            mixed[0, top : top + 2, left : left + 2, channel] = own
        z = x + mixed
        torch.testing.assert_close(layer(x, None), z + layer.mlp(layer.norm2(z)))


def test_layers_alternate_and_drop_more_and_more():
    network = DctSwin(DctSwinConfig())
    layers = [layer for group in network.groups[:-1] for layer in group.layers]
    assert [layer.shift for layer in layers] == [0, 4] * 4
    rates = [layer.drop_path.probability for layer in layers]
    assert rates == pytest.approx([0.1 * i / 7 for i in range(8)])


def as_swin(network: DctSwin, **changes) -> DctSwin:
    """The ablation without the transform, with the same weights."""
    twin = small(layer="swin", **changes)
    twin.load_state_dict(network.state_dict())
    return twin


def test_without_the_transform_it_is_swin_but_for_the_mask(monkeypatch):
    network, stack = small(), torch.rand(1, 6, 16, 24)
    twin = as_swin(network)
    assert all(type(layer) is SwinLayer for layer in twin.groups[0].layers)
    with torch.no_grad():
        assert not torch.allclose(network(stack), twin(stack), atol=1e-3)
        for group in network.groups[:-1]:
            for layer in group.layers:
                layer.matrix = torch.eye(4)
        assert not torch.allclose(network(stack), twin(stack), atol=1e-3)  # the mask is left
        monkeypatch.setattr(swinir, "MASKED", 0.0)
        torch.testing.assert_close(network(stack), twin(stack))


def test_frequencies_have_no_mask_so_opposite_borders_meet():
    network = small().double()
    stack = torch.rand(1, 6, 16, 80, dtype=torch.float64)
    changed = stack.clone()
    changed[..., -1] += 1
    assert network.facts.receptive_field_px is None and not network.facts.exact_tiling
    for other, meets in ((network, True), (as_swin(network).double(), False)):
        with torch.no_grad():
            left = (other(changed) - other(stack))[..., :8].abs().max()
        assert bool(left > 1e-6) is meets


@pytest.mark.parametrize(
    "changes",
    [
        {"layer": "swin"},
        {"layer": "swin", "tail": "classical", "depths": (3,)},
        {"layer": "mixer"},
        {"layer": "dct", "depths": (1, 1)},  # nothing is shifted, so nothing wraps
    ],
)
def test_receptive_field_is_exact(changes):
    network = small(**changes).double()
    radius = network.facts.receptive_field_px
    assert radius is not None and network.facts.exact_tiling
    stack = torch.rand(1, 6, 128, 8, dtype=torch.float64, requires_grad=True)
    furthest = 0
    for at in range(32, 36):  # every position on the grid, in LR pixels
        for sub in range(2):
            (gradient,) = torch.autograd.grad(network(stack)[:, :, 2 * at + sub].sum(), stack)
            rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten() // 2
            furthest = max(furthest, at - int(rows[0]), int(rows[-1]) - at)
    assert furthest == radius


def test_data_flow_of_the_paper():
    network = small(teachers=3).double()
    stack = torch.rand(2, 9, 16, 24, dtype=torch.float64)
    mu = torch.tensor(DIV2K_MEAN).double().view(1, 3, 1, 1)
    with torch.no_grad():
        head = network.head.conv(F.pixel_unshuffle(stack - mu.repeat(1, 3, 1, 1), 2))
        feature = head
        for group in network.groups:
            feature = group(feature)
        expected = F.pixel_shuffle(network.tail.conv(feature + head), 2) + mu
        torch.testing.assert_close(network(stack), expected)


@pytest.mark.parametrize("layer", ["dct", "swin", "mixer"])
@pytest.mark.parametrize(("scale", "size"), [(2, (6, 17)), (3, (20, 9)), (4, (33, 47))])
def test_any_size_is_padded_by_mirroring(layer, scale, size):
    network = small(scale=scale, layer=layer)
    stack = torch.rand(2, 6, *size)
    bottom, right = (-side % (4 * scale) for side in size)
    with torch.no_grad():
        sr = network(stack)
        whole = network(F.pad(stack, (0, right, 0, bottom), mode="reflect"))
    assert sr.shape == (2, 3, *size)
    torch.testing.assert_close(sr, whole[..., : size[0], : size[1]])


def test_the_smallest_size_is_said():
    network = small(scale=2)
    assert network.facts.minimum_px == 3
    assert network(torch.rand(1, 6, 6, 6)).shape == (1, 3, 6, 6)
    with pytest.raises(SrkdError, match=r"images are 8x4, but .* LR images of 3 px or more a side"):
        network(torch.rand(1, 6, 4, 8))


@pytest.mark.parametrize("shape", [(1, 9, 16, 16), (1, 3, 16, 16), (6, 16, 16)])
def test_wrong_number_of_channels_is_refused(shape):
    with pytest.raises(SrkdError, match=r"aggregates 2 teachers: .* on the channels, .B, 6, H, W."):
        small()(torch.rand(shape))


@pytest.mark.parametrize("layer", ["dct", "swin", "mixer"])
@pytest.mark.parametrize("tail", ["one_step", "classical"])
def test_gradient_reaches_every_parameter(layer, tail):
    network = small(layer=layer, tail=tail).train()
    stack = torch.rand(2, 6, 16, 16, requires_grad=True)
    network(stack).square().mean().backward()
    assert {name for name, p in network.named_parameters() if not p.grad.any()} == set()
    assert stack.grad is not None and stack.grad.any((0, 2, 3)).all()


@pytest.mark.parametrize("tail", ["one_step", "classical"])
def test_image_skip_starts_at_the_mean(tail):
    network = DctSwin(DctSwinConfig(**SMALL, image_skip="mean", tail=tail))
    stack = torch.rand(1, 6, 10, 12)
    mean = (stack[:, :3] + stack[:, 3:]) / 2
    assert torch.equal(mean_image(stack), mean)
    torch.testing.assert_close(network(stack), mean)
    network(stack).sum().backward()
    reached = {name for name, p in network.named_parameters() if p.grad.any()}
    last = "tail.last" if tail == "classical" else "tail.conv"
    assert reached == {f"{last}.weight", f"{last}.bias"}
    without = DctSwin(DctSwinConfig(**SMALL, tail=tail))
    assert not torch.allclose(without(stack), mean, atol=0.01)


def test_arguments_rebuild_the_network():
    network = small(layer="mixer", tail="classical", image_skip="mean")
    again = DctSwin(DctSwinConfig(**network.arguments)).eval()
    again.load_state_dict(network.state_dict())
    stack = torch.rand(1, 6, 8, 8)
    assert again.config == network.config and torch.equal(again(stack), network(stack))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teachers": 0}, "of 0 teachers was asked for; give at least 1"),
        ({"channels": 20}, "20 channels cannot split them over 6 attention heads"),
        ({"layer": "dtc"}, "layer = 'dtc'; did you mean 'dct'"),
        ({"tail": "onestep"}, "tail = 'onestep'; did you mean 'one_step'"),
        ({"image_skip": "average"}, "image_skip = 'average'; .*Valid: mean, none"),
    ],
)
def test_impossible_configurations_are_refused(values, message):
    with pytest.raises(SrkdError, match=message):
        DctSwinConfig(**values)
