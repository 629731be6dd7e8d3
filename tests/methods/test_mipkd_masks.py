"""MiPKD's masks and one mixer: values by hand; options without effect."""

from __future__ import annotations

import pytest
import torch
from tiny_pair import student_of, teacher_of
from torch import nn

from srkd.methods import make, plan
from srkd.methods.mipkd import (
    MipkdConfig,
    Mixer,
    cka_mask,
    cosine_mask,
    grid_mask,
    linear_cka,
    random_mask,
    two_layers,
)
from srkd.types import Setting


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


def test_mask_of_ones_is_the_teacher_and_of_zeros_the_student() -> None:
    mixer = Mixer(4, 6, MipkdConfig(latent=1.0))
    f_s, f_t = torch.randn(2, 4, 5, 5), torch.randn(2, 6, 5, 5)
    z_s, z_t = mixer.encode_s(f_s), mixer.encode_t(f_t)
    ones = torch.ones(2, 6, 5, 5, dtype=torch.bool)
    assert torch.equal(mixer(z_s, z_t, ones), mixer.decode(mixer.encode_t(f_t)))
    assert torch.equal(mixer(z_s, z_t, ~ones), mixer.decode(mixer.encode_s(f_s)))
    # Eq. (4) in between: every element comes from one of the two.
    mask = random_mask(z_t, 0.5, torch.Generator().manual_seed(0))
    m = mask.float()
    assert torch.allclose(mixer(z_s, z_t, mask), mixer.decode(z_s * (1 - m) + z_t * m))


def test_shared_encoder_has_one_set_of_weights() -> None:
    mixer = Mixer(4, 6, MipkdConfig(encoder="shared", latent=1.0))
    f_t = torch.randn(1, 6, 5, 5)
    assert isinstance(mixer.encode_s, nn.Sequential)
    assert torch.equal(mixer.encode_s[1](f_t), mixer.encode_t(f_t))
    assert isinstance(mixer.encode_s[0], nn.Conv2d)  # to the teacher's width first
    same = Mixer(6, 6, MipkdConfig(encoder="shared", latent=1.0))
    assert torch.equal(same.encode_s(f_t), same.encode_t(f_t))
    count = sum(p.numel() for p in same.parameters())
    separate = sum(p.numel() for p in Mixer(6, 6, MipkdConfig(latent=1.0)).parameters())
    assert count * 3 == separate * 2


def test_latent_space_has_its_share_of_the_teachers_channels() -> None:
    mixer = Mixer(4, 6, MipkdConfig(latent=0.5))
    f_s, f_t = torch.randn(1, 4, 5, 5), torch.randn(1, 6, 5, 5)
    z_s, z_t = mixer.encode_s(f_s), mixer.encode_t(f_t)
    assert z_s.shape == z_t.shape == (1, 3, 5, 5)
    assert mixer(z_s, z_t, grid_mask(z_t)).shape == f_t.shape


def test_options_without_effect_are_named() -> None:
    setting = Setting(patch_px=16, batch=2, iterations=10, memory=2**30)
    pair = student_of("edsr"), (teacher_of("edsr"),)
    chain = make(plan("mipkd", {"mix_mode": "chain", "drop": 0.25}), *pair)
    assert chain.check(setting) == (
        "mipkd: method.mipkd.drop = 0.25 has no effect with these options",
    )
    assert make(plan("mipkd", {}), *pair).check(setting) == ()
