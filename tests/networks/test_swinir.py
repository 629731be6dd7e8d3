"""SwinIR: sizes of the papers, attention against its definition, exact tiles, export."""

import io

import pytest
import torch
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.networks import build
from srkd.networks.swinir import (
    DropPath,
    SwinIR,
    SwinIRConfig,
    SwinLayer,
    WindowAttention,
    relative_position_index,
    shift_mask,
)


def small(scale: int = 2, seed: int = 0, **changes) -> SwinIR:
    """A small network with weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    sizes = {"channels": 12, "depths": (2, 3), "heads": 2, "window": 4}
    network = SwinIR(SwinIRConfig(scale, **{**sizes, **changes})).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def parameters(name: str, scale: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(name, scale).parameters())


@pytest.mark.parametrize(
    ("name", "x2", "x3", "x4"),
    [
        ("swinir", 11_752_487, 11_937_127, 11_900_199),
        ("swinir_lightweight", 910_152, 918_267, 929_628),
        ("swinir_c60", 1_087_727, 1_272_367, 1_235_439),
    ],
)
def test_parameters_equal_the_papers(name, x2, x3, x4):
    assert [parameters(name, s) for s in (2, 3, 4)] == [x2, x3, x4]


def test_relative_position_index_of_window_two():
    # Tokens (0,0) (0,1) (1,0) (1,1); row (dy + 1) * 3 + dx + 1.
    expected = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert relative_position_index(2).tolist() == expected


def test_shift_mask_of_window_two():
    mask = shift_mask(4, 4, 2, like=torch.zeros((), dtype=torch.float64))
    assert mask.shape == (4, 4, 4) and mask.dtype == torch.float64
    apart = -100.0
    assert mask[0].abs().sum() == 0  # inside the image nothing was joined
    right = [[0, apart, 0, apart], [apart, 0, apart, 0], [0, apart, 0, apart], [apart, 0, apart, 0]]
    assert mask[1].tolist() == right  # left and right edge of the image
    below = [[0, 0, apart, apart], [0, 0, apart, apart], [apart, apart, 0, 0], [apart, apart, 0, 0]]
    assert mask[2].tolist() == below
    assert torch.equal(mask[3], apart * (1 - torch.eye(4, dtype=torch.float64)))  # four corners


def attention_by_definition(attn: WindowAttention, x: Tensor, window: int, shift: int) -> Tensor:
    """One token at a time: it attends to the tokens of its cell of the shifted grid, never around the edge."""
    _, h, w, c = x.shape
    d = c // attn.heads
    qkv = attn.qkv(x[0])
    table = attn.relative_position_bias_table
    result = torch.zeros_like(x)
    places = [(i, j) for i in range(h) for j in range(w)]
    cell = {p: ((p[0] - shift) // window, (p[1] - shift) // window) for p in places}
    for p in places:
        others = [o for o in places if cell[o] == cell[p]]
        heads = []
        for head in range(attn.heads):
            at = slice(head * d, (head + 1) * d)
            q = qkv[p][:c][at]
            logits = []
            for o in others:
                row = (p[0] - o[0] + window - 1) * (2 * window - 1) + p[1] - o[1] + window - 1
                logits.append(q @ qkv[o][c : 2 * c][at] / d**0.5 + table[row, head])
            weights = torch.stack(logits).softmax(0)
            values = torch.stack([qkv[o][2 * c :][at] for o in others])
            heads.append(weights @ values)
        result[0][p] = attn.proj(torch.cat(heads))
    return result


@pytest.mark.parametrize("shifted", [False, True])
def test_layer_equals_its_definition(shifted):
    torch.manual_seed(1)
    config = SwinIRConfig(channels=6, heads=2, window=4)
    layer = SwinLayer(config, shifted=shifted, drop_path=0.0).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    x = torch.randn(1, 8, 12, 6, dtype=torch.float64)
    with torch.no_grad():
        attended = attention_by_definition(layer.attn, layer.norm1(x), 4, 2 if shifted else 0)
        z = x + attended
        expected = z + layer.mlp(layer.norm2(z))
        found = layer(x, shift_mask(8, 12, 4, like=x))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_first_group_normalises_once_and_skip_is_the_raw_head():
    network = small()
    assert network.groups[0].norm is not None
    assert network.groups[1].norm is None
    lr = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        for group in network.groups[:-1]:
            for layer in group.layers:
                for last in (layer.attn.proj, layer.mlp.fc2):
                    nn.init.zeros_(last.weight)
                    nn.init.zeros_(last.bias)
            nn.init.zeros_(group.conv.weight)
            nn.init.zeros_(group.conv.bias)
        # Empty groups leave norm(head); so the output is tail(body(norm(head)), head).
        head = network.head(lr)
        x = network.groups[0].norm(head.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(network(lr), network.tail(network.groups[-1](x), head))


@pytest.mark.parametrize("size", [(5, 5), (8, 8), (21, 13)])
def test_any_size_from_the_minimum(size):
    network = build("swinir_lightweight", 3).eval()
    assert network.facts.minimum_px == 5
    with torch.no_grad():
        sr = network(torch.rand(2, 3, *size))
    assert sr.shape == (2, 3, 3 * size[0], 3 * size[1])
    assert torch.isfinite(sr).all()


def test_padding_reflects():
    network = small()
    lr = torch.rand(1, 3, 6, 7)
    padded = network.pad(lr)
    assert padded.shape == (1, 3, 8, 8)
    assert torch.equal(padded[..., 6, :7], lr[..., 4, :])  # mirrored at the last row
    assert torch.equal(padded[..., :6, 7], lr[..., :, 5])
    with torch.no_grad():
        torch.testing.assert_close(network(lr), network(padded)[..., :12, :14])


def test_tile_on_the_grid_equals_whole_image():
    network = small().double()
    facts = network.facts
    assert facts.exact_tiling and facts.size_multiple == 4 and facts.receptive_field_px == 17
    halo = 20  # 17 rounded up to the grid
    lr = torch.rand(1, 3, 90, 83, dtype=torch.float64)
    top, bottom, left, right = 44, 52, 40, 48

    def gap(margin: int) -> float:
        tile = lr[..., top - margin : bottom + margin, left - margin : right + margin]
        inner = network(tile)[..., 2 * margin : -2 * margin, 2 * margin : -2 * margin]
        return float((inner - whole[..., 2 * top : 2 * bottom, 2 * left : 2 * right]).abs().max())

    with torch.no_grad():
        whole = network(lr)
        assert float(whole.abs().max()) > 0.1
        assert gap(halo) <= 1e-9
        assert gap(halo - 4) > 1e-9  # and less is not enough
        # A tile that reaches the border of the image keeps that border, padding included.
        corner = network(lr[..., 40 - halo :, 48 - halo :])[..., 2 * halo :, 2 * halo :]
        assert float((corner - whole[..., 80:, 96:]).abs().max()) <= 1e-9


@pytest.mark.parametrize("tail", ["classical", "one_step"])
def test_receptive_field_is_exact(tail):
    network = small(tail=tail).double()
    radius = network.facts.receptive_field_px
    assert radius is not None
    lr = torch.rand(1, 3, 80, 4, dtype=torch.float64, requires_grad=True)
    furthest = 0
    for at in range(40, 44):  # every position on the grid
        for sub in range(2):
            (gradient,) = torch.autograd.grad(network(lr)[:, :, 2 * at + sub].sum(), lr)
            rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
            furthest = max(furthest, at - int(rows[0]), int(rows[-1]) - at)
    assert furthest == radius


def test_drop_path_drops_whole_samples_in_training_only():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    x = torch.ones(4000, 1, 2, 1)
    y = drop(x)
    kept = y[:, 0, 0, 0] != 0
    torch.testing.assert_close(y, kept.view(-1, 1, 1, 1).expand_as(y) * (4 / 3))
    assert 0.72 < float(kept.double().mean()) < 0.78
    assert torch.equal(drop.eval()(x), x)
    rates = [layer.drop_path.probability for g in small().groups[:-1] for layer in g.layers]
    assert rates == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])


def test_heads_must_divide_channels():
    with pytest.raises(SrkdError, match="64 channels cannot split them over 6"):
        SwinIRConfig(channels=64)


@pytest.mark.slow
def test_exported_graph_has_dynamic_size():
    """The graph equals the network at sizes, windows and batches that the export never saw."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (extra 'cpu')")
    network = small(depths=(2,))
    batch, h, w = (torch.export.Dim(name, min=1, max=4096) for name in ("batch", "height", "width"))
    program = torch.onnx.export(
        network,
        (torch.rand(2, 3, 8, 12),),
        dynamo=True,
        dynamic_shapes=({0: batch, 2: h, 3: w},),
        verbose=False,
    )
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 9, 22), (3, 3, 3, 16)):
        lr = torch.rand(shape)
        with torch.no_grad():
            expected = network(lr)
        (found,) = session.run(None, {session.get_inputs()[0].name: lr.numpy()})
        # float32 rounding, against outputs far outside [0, 1] because the weights are large
        assert float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()) < 1e-5
