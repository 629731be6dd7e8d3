"""MiPKD's masks and encoder layers: values by hand."""

from __future__ import annotations

import pytest
import torch

from srkd.methods.mipkd import (
    cka_mask,
    cosine_mask,
    grid_mask,
    linear_cka,
    random_mask,
    two_layers,
)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_random_mask_has_its_ratio(ratio: float) -> None:
    mask = random_mask(torch.zeros(4, 16, 32, 32), ratio, torch.Generator().manual_seed(0))
    assert mask.float().mean().item() == pytest.approx(ratio, abs=0.01)


def test_grid_is_a_checkerboard_of_half_the_places() -> None:
    expected = [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert grid_mask(torch.zeros(2, 5, 3, 4)).int().tolist() == [[expected]]
    assert grid_mask(torch.zeros(2, 5, 3, 4)).float().mean() == 0.5


def test_cosine_takes_the_teacher_where_the_two_differ_most() -> None:
    # Places of a 2 x 2 map: same direction (1), a right angle (0), opposite (-1), 45 degrees (0.7).
    z_s = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    z_t = torch.tensor([[[[9.0, 0.0], [-1.0, 1.0]], [[0.0, 2.0], [0.0, 1.0]]]])
    assert cosine_mask(z_s, z_t, 0.5).int().tolist() == [[[[0, 1], [1, 0]]]]
    assert cosine_mask(z_s, z_t, 0.25).int().tolist() == [[[[0, 0], [1, 0]]]]


def test_cka_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])  # centred: -1 0 1
    others = {
        (2.0, 4.0, 6.0): 1.0,
        (3.0, 2.0, 1.0): 1.0,
        (1.0, 0.0, 1.0): 0.0,  # centred 1/3 -2/3 1/3: product 0
        (1.0, 3.0, 2.0): 0.25,  # centred -1 1 0: product 1, squares 2 and 2
        (5.0, 5.0, 5.0): 0.0,  # says nothing
    }
    for values, expected in others.items():
        alike = linear_cka(x.view(1, 1, 1, 3), torch.tensor(values).view(1, 1, 1, 3))
        assert alike.item() == pytest.approx(expected, abs=1e-6)


def test_cka_is_the_general_formula_for_single_columns() -> None:
    z_s, z_t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for n in range(2):
        for c in range(3):
            x, y = (z[n, c].reshape(-1, 1) - z[n, c].mean() for z in (z_s, z_t))
            norm = torch.linalg.matrix_norm
            expected = norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))
            assert linear_cka(z_s, z_t)[n, c].item() == pytest.approx(expected.item(), rel=1e-4)
            correlation = torch.corrcoef(torch.cat([x, y], 1).T)[0, 1]
            assert expected.item() == pytest.approx(correlation.item() ** 2, rel=1e-4)


def test_cka_takes_the_channels_that_are_least_alike() -> None:
    z_s = torch.tensor([1.0, 2.0, 3.0]).expand(1, 4, 1, 3)
    z_t = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 1.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0]])
    assert cka_mask(z_s, z_t[None, :, None], 0.5).flatten().int().tolist() == [0, 1, 0, 1]


def test_both_kinds_of_layers_have_as_many_weights() -> None:
    for kind in ("conv", "mlp"):
        layers = two_layers(6, 6, 6, kind)
        weights = sum(p.numel() for n, p in layers.named_parameters() if n.endswith("weight"))
        assert weights == 18 * 6**2, kind
        assert layers(torch.zeros(2, 6, 5, 5)).shape == (2, 6, 5, 5)
    torch.manual_seed(0)
    spread = torch.autograd.functional.jacobian(
        lambda f: two_layers(1, 1, 1, "mlp")(f)[0, 0, 2, 2], torch.randn(1, 1, 5, 5)
    )
    assert set(spread.nonzero()[:, 2:].flatten().tolist()) == {2}  # an MLP sees one place
