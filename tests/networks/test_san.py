"""SAN: sizes of the papers, the square root against eigenvalues, quadrants against slices, taps, facts."""

import io

import pytest
import torch
from tiny_pair import images, student_of, teacher_of, training_of
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.networks import build, san
from srkd.networks.san import (
    NonLocal,
    San,
    SanConfig,
    SecondOrderAttention,
    covariance,
    non_local,
    square_root,
)
from srkd.step import loss_terms
from srkd.types import Facts


def small(scale: int = 2) -> San:
    torch.manual_seed(0)
    config = SanConfig(scale, channels=8, blocks=1, group_count=3, reduction=2, rgb_range=1.0)
    network = San(config).eval()
    for parameter in network.parameters():  # the non-local parts begin with a weight of zero
        nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize(
    ("name", "groups", "x2", "x3", "x4"),
    [
        # By hand beside the paper's x4: the stages are one of 64 -> 256 less, or one of 64 -> 576.
        ("san", 20, 15_822_464 - 147_712, 15_822_464 - 2 * 147_712 + 332_352, 15_822_464),
        ("san_tiny", 4, 48_030 - 9_280, 48_030 - 2 * 9_280 + 20_880, 48_030),
    ],
)
def test_parameters_equal_mkd(name, groups, x2, x3, x4):
    # The public code has one more scalar in each group, which nothing reads.
    for scale, parameters in ((2, x2), (3, x3), (4, x4)):
        with torch.device("meta"):
            network = build(name, scale)
        assert sum(p.numel() for p in network.parameters()) == parameters - groups


def test_covariance_by_hand():
    x = torch.tensor([[[[1.0, 3.0]], [[4.0, 0.0]]]])
    # Means 2 and 2, deviations -1, 1 and 2, -2.
    torch.testing.assert_close(covariance(x), torch.tensor([[[1.0, -2.0], [-2.0, 4.0]]]))


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((6, 9), slice(0, 6), slice(1, 7)),
        ((7, 2), slice(0, 6), slice(0, 2)),
        ((9, 6), slice(1, 7), slice(0, 6)),
        ((5, 6), slice(0, 5), slice(0, 6)),
    ],
)
def test_covariance_of_a_large_map_is_that_of_its_centre(size, rows, columns):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = torch.stack([torch.cov(m[:, rows, columns].flatten(1), correction=0) for m in x])
    torch.testing.assert_close(covariance(x, limit_px=6), expected)
    x[..., rows, columns] = 0.0
    assert not covariance(x, limit_px=6).any()


def test_square_root_is_five_steps_towards_that_of_the_eigenvalues():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 50, dtype=torch.float64)
    matrix = x @ x.transpose(1, 2) * torch.tensor([1.0, 1e4]).double()[:, None, None]
    values, vectors = torch.linalg.eigh(matrix)
    trace = values.sum(1, keepdim=True)
    # One eigenvalue at a time: y = sqrt(v) p, z = p / sqrt(v), so each step is p <- p (3 - p^2) / 2.
    p = (values / trace).sqrt()
    for _ in range(5):
        p = p * (3 - p**2) / 2
    expected = vectors @ torch.diag_embed(values.sqrt() * p) @ vectors.transpose(1, 2)
    torch.testing.assert_close(square_root(matrix), expected)
    # Eigenvalues above a tenth of the trace: converged to a thousandth.
    assert float(p[values > 0.1 * trace].min()) > 0.999


def test_square_root_of_nothing_is_nothing_with_finite_gradient():
    matrix = torch.zeros(1, 3, 3, requires_grad=True)
    root = square_root(matrix)
    assert not root.any()
    root.sum().backward()
    assert matrix.grad is not None and bool(matrix.grad.isfinite().all())


def test_second_order_attention_by_hand():
    attention = SecondOrderAttention(2, reduction=2)
    for parameter in attention.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        attention.squeeze.weight[0, 0] = 1.0
        attention.excite.weight[1] = 1.0
    x = torch.tensor([[[[4.0, -4.0]], [[1.0, 1.0]]]])
    # Covariance diag(16, 0), root diag(4, 0), column means 2 and 0; gates sigmoid(0) and sigmoid(2).
    expected = torch.tensor([[[[2.0, -2.0]], [[0.880797, 0.880797]]]])
    torch.testing.assert_close(attention(x), expected)


def by_slices(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    h, w = g.shape[2] // 2, g.shape[3] // 2
    result = torch.zeros_like(g)
    for rows in (slice(0, h), slice(h, None)):
        for columns in (slice(0, w), slice(w, None)):
            a, b, c = (m[..., rows, columns].flatten(2) for m in (theta, phi, g))
            mean = torch.softmax(a.transpose(1, 2) @ b, 2) @ c.transpose(1, 2)
            result[..., rows, columns] = mean.transpose(1, 2).view_as(result[..., rows, columns])
    return result


@pytest.mark.parametrize("size", [(2, 2), (2, 5), (3, 2), (6, 8), (7, 8), (6, 3), (5, 7)])
def test_each_quadrant_attends_to_itself(size):
    torch.manual_seed(0)
    maps = torch.randn(3, 2, 3, *size, dtype=torch.float64)
    expected = by_slices(*maps)
    torch.testing.assert_close(non_local(*maps), expected)
    with torch.no_grad():  # with the fused kernel
        torch.testing.assert_close(non_local(*maps), expected)


def test_similarities_are_not_scaled():
    # One row of four: quadrants without rows are empty, those below have two pixels each.
    theta = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 4, 2, 4)
    g = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(1, 4, 2, 4)
    # Of the upper left quadrant the first pixel has similarity 4 to itself and 0 to the second.
    expected = 1 / (1 + torch.e**4)
    assert non_local(theta, theta, g)[0, 0, 0, 0].item() == pytest.approx(expected, rel=1e-4)


def test_non_local_begins_as_the_identity_and_adds_to_its_input():
    layer = NonLocal(8)
    x = torch.rand(1, 8, 5, 4)
    assert torch.equal(layer(x), x)
    nn.init.ones_(layer.out.weight)
    nn.init.zeros_(layer.g.weight)
    nn.init.constant_(layer.g.bias, 2.0)
    torch.testing.assert_close(layer(x), x + 2.0)


def test_second_derivative_through_the_attention():
    maps = torch.randn(3, 1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda m: non_local(*m), maps)


def test_the_same_layer_before_and_after_the_groups_and_both_skips():
    network = small()
    lr = torch.rand(1, 3, 6, 7)
    with torch.no_grad():
        head = network.head(lr)
        feature = shared = network.groups[3](head)
        for group in network.groups[:3]:
            feature = group(feature) + network.gamma * shared
        expected = network.tail(network.groups[3](feature), head)
        torch.testing.assert_close(network(lr), expected)
        assert torch.equal(network.run(lr, ["group3"]).taps["group3"], feature)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_rest_of_every_tap_equals_the_forward_pass(scale):
    network = small(scale)
    lr = torch.rand(2, 3, 7, 6)
    assert network.tap_names == ("group1", "group2", "group3", "body")
    with torch.no_grad():
        result = network.run(lr, network.tap_names)
        assert torch.equal(result.sr, network(lr))
        assert result.sr.shape == (2, 3, 7 * scale, 6 * scale)
        alone = network.features(lr, network.tap_names)
        for tap, feature in result.taps.items():
            assert torch.equal(alone[tap], feature)
            assert torch.equal(network.rest(feature, tap, result.head, (7, 6)), result.sr)
            other = network.rest(feature * 1.1, tap, result.head, (7, 6))
            assert float((other - result.sr).abs().max()) > 1e-3


def test_between_needs_the_head_where_groups_add_it():
    network = small()
    with torch.no_grad():
        result = network.run(torch.rand(1, 3, 6, 6), network.tap_names)
        taps, head = result.taps, result.head
        found = network.between(taps["group1"], "group1", "group3", head)
        assert torch.equal(found, taps["group3"])
        assert torch.equal(network.between(taps["group3"], "group3", "body"), taps["body"])
        assert network.between(taps["group2"], "group2", "group2") is taps["group2"]
    with pytest.raises(SrkdError, match="SAN from 'group1' to 'group2' add its head feature"):
        network.between(taps["group1"], "group1", "group2")


def test_gradient_reaches_every_parameter():
    network = small().train()
    network(torch.rand(2, 3, 6, 7)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


def test_square_root_is_in_float32_under_autocast(monkeypatch):
    seen: list[torch.dtype] = []
    monkeypatch.setattr(san, "square_root", lambda m: seen.append(m.dtype) or square_root(m))
    attention = SecondOrderAttention(4, reduction=2)
    x = 255 * torch.rand(1, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        attention(x.bfloat16())
    attention.double()(x.double())
    assert seen == [torch.float32, torch.float64]


def test_facts_and_smallest_image():
    network = small()
    assert network.facts == Facts(2, receptive_field_px=None, exact_tiling=False, minimum_px=2)
    with torch.no_grad():
        assert network(torch.rand(1, 3, 2, 3)).shape == (1, 3, 4, 6)
    lr = torch.rand(1, 3, 40, 40, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(lr)[..., 0, 0].sum(), lr)
    assert float(gradient[..., -1, -1].abs().sum()) > 0


def test_flat_image_has_finite_gradients():
    network = small().train()
    with torch.no_grad():
        for group in network.groups[:3]:
            group.blocks[0].conv2.weight.zero_()
        network.head.conv.weight.zero_()  # exactly flat features before the covariance
    network(torch.rand(1, 3, 6, 6)).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)


def test_too_few_channels_are_refused():
    with pytest.raises(SrkdError, match=r"SAN with 12 channels has none left.*choose 16 channels"):
        SanConfig(channels=12)
    assert SanConfig(channels=8, reduction=4).channels == 8


@pytest.mark.parametrize("method", ["fitnet", "mipkd"])
def test_one_step_of_a_feature_method(method):
    student = student_of("san")
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.1)
    training = training_of(method, student, teacher_of("san", channels=16))
    terms = loss_terms(training, *images())
    assert len(terms) > 1
    sum(terms.values()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in student.parameters())


@pytest.mark.slow
def test_exported_graph_has_dynamic_size():
    """The graph equals the network at sizes and batches that the export never saw, odd and even."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (extra 'cpu')")
    network = small()
    low = network.facts.minimum_px
    batch, h, w = (torch.export.Dim(n, min=m) for n, m in (("n", 1), ("h", low), ("w", low)))
    program = torch.onnx.export(
        network,
        (torch.rand(2, 3, 5, 6),),
        dynamo=True,
        dynamic_shapes=({0: batch, 2: h, 3: w},),
        verbose=False,
    )
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, low, 9), (3, 3, 8, 11), (1, 3, 12, 12)):
        lr = torch.rand(shape)
        with torch.no_grad():
            expected = network(lr)
        (found,) = session.run(None, {session.get_inputs()[0].name: lr.numpy()})
        # Unscaled similarities of 0..255 features: a rounding error grows through their softmax.
        assert float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()) < 1e-4
