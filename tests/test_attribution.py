"""Attribution against hand-worked numbers, the path integral it must obey, and the files of the command."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from scripts.attribute import main, parse, parse_window
from srkd.attribution import (
    BlurPath,
    Window,
    attribute,
    attribute_all,
    attribution,
    blur,
    check_window,
    detail,
    diffusion_index,
    gaussian,
    gini,
    heat_map,
    split,
)
from srkd.attribution_maps import (
    RAMP,
    WINDOW_COLOUR,
    colours,
    file_name,
    heat_picture,
    input_picture,
    overlay_picture,
)
from srkd.console import run_command
from srkd.errors import SrkdError
from srkd.images import to_tensor, write_png
from srkd.loaded import LoadedModel
from srkd.models import save_model
from srkd.networks import build
from srkd.types import Facts

HALF = 1 / math.sqrt(2 * math.log(2))  # the sigma whose kernel of 3 px is [1 2 1] / 4
SHORT = BlurPath(steps=3, kernel_px=5)


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def enlarge(x: Tensor) -> Tensor:
    """Repeats every pixel, x2."""
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def box(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1)


# --- blur ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "kernel_px"), [(1.2, 9), (0.3, 9), (5.0, 3), (1e-3, 9)])
def test_kernel_is_symmetric_and_sums_to_one(sigma, kernel_px):
    weights = gaussian(sigma, kernel_px)
    assert weights.shape == (kernel_px,) and weights.sum().item() == pytest.approx(1, abs=1e-15)
    assert torch.equal(weights, weights.flip(0)) and int(weights.argmax()) == kernel_px // 2
    ratio = weights[kernel_px // 2 + 1] / weights[kernel_px // 2]
    assert ratio.item() == pytest.approx(math.exp(-0.5 / sigma**2))


def test_blur_by_hand():
    dot = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    dot[0, 0, 2, 2] = 16
    row = torch.tensor([0.0, 1, 2, 1, 0], dtype=torch.float64)
    torch.testing.assert_close(blur(dot, HALF, 3)[0, 0], row[:, None] * row)


def test_blur_mirrors_at_the_border_without_repeating_it():
    ramp = torch.tensor([0.0, 8, 16, 40], dtype=torch.float64).expand(1, 2, 3, 4)
    # 8 0 | 0 would be the repeated border; mirrored, the left neighbour of 0 is 8.
    expected = torch.tensor([4.0, 8, 20, 28], dtype=torch.float64).expand(1, 2, 3, 4)
    torch.testing.assert_close(blur(ramp, HALF, 3), expected)
    torch.testing.assert_close(blur(ramp.mT, HALF, 3), expected.mT)


def test_blur_leaves_the_sharp_and_the_flat_alone():
    x = noise(1, 3, 6, 7)
    assert blur(x, 0, 9) is x
    flat = x[..., :1, :1].expand(1, 3, 6, 7)
    assert torch.equal(blur(flat, 1.2, 9), flat)


def test_blur_refuses_what_it_cannot_mirror():
    assert blur(noise(1, 1, 5, 5), 1.2, 9).shape == (1, 1, 5, 5)
    with pytest.raises(SrkdError, match="6x4 px is too small for a blur kernel of 9 px"):
        blur(noise(1, 1, 4, 6), 1.2, 9)


def test_path_is_linear_and_ends_sharp():
    path = BlurPath(sigma_max=2.0, steps=4)
    assert [path.sigma(j) for j in range(5)] == [2.0, 1.5, 1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigma_max": 0.0}, "sigma_max is 0.0"),
        ({"sigma_max": math.nan}, "sigma_max is nan"),
        ({"steps": 0}, "0 steps goes nowhere"),
        ({"kernel_px": 4}, "kernel has 4 px"),
        ({"kernel_px": 1}, "kernel has 1 px"),
    ],
)
def test_impossible_paths_are_refused(values, message):
    with pytest.raises(SrkdError, match=message):
        BlurPath(**values)


# --- target, map, index -------------------------------------------------------------------------


def test_detail_by_hand():
    image = torch.tensor([[0.0, 3, 0], [4, 0, 12], [0, 5, 0]], dtype=torch.float64)
    sr = torch.stack([image, 2 * image]).unsqueeze(1)
    # (0, 0): down 4, right 3. The window ends at the border, so the rest has no difference.
    assert detail(sr[..., :2, :2], Window(0, 0, 2)).tolist() == [5, 10]
    # Inside: each pixel of the window takes the row and the column after it.
    by_hand = 5 + math.hypot(-3, -3) + math.hypot(-4, -4) + math.hypot(5, 12)
    assert detail(sr, Window(0, 0, 2))[0].item() == pytest.approx(by_hand)
    assert detail(sr.expand(2, 3, 3, 3), Window(0, 0, 2))[1].item() == pytest.approx(6 * by_hand)


def test_detail_has_a_gradient_beside_flat_pixels():
    sr = torch.tensor([[1.0, 1, 1, 5], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])[None, None]
    sr.requires_grad_()
    detail(sr, Window(0, 0, 3)).sum().backward()
    expected = torch.zeros(4, 4)
    expected[0, 3], expected[0, 2] = 1, -1
    assert sr.grad is not None and torch.equal(sr.grad[0, 0], expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 1, 1, 1], 0.0), ([0, 0, 0, 1], 0.75), ([3, 1, 4, 2], 0.25), ([0, 1, 0, 1], 0.5)],
)
def test_gini_by_hand(values, expected):
    heat = torch.tensor(values, dtype=torch.float64).view(2, 2)
    assert gini(heat) == pytest.approx(expected, abs=1e-6)
    assert gini(heat.float()) == pytest.approx(expected, abs=1e-6)


def test_diffusion_index_by_hand():
    assert diffusion_index(0.25) == 75 and diffusion_index(0.0) == 100
    assert math.isnan(gini(torch.zeros(2, 2)))


def test_map_by_hand():
    signed = torch.tensor([[[1.0, -2], [0, 3]], [[1, -6], [0, -3]]])
    assert heat_map(signed).tolist() == [[0.25, 1.0], [0.0, 0.0]]
    assert torch.equal(heat_map(torch.zeros(3, 2, 2)), torch.zeros(2, 2))


# --- the path through a network -----------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_attribution_by_hand(steps):
    """Columns that grow, any number of steps: D is last minus first column, so LAM is their change."""
    x = (torch.arange(8, dtype=torch.float64) ** 2 / 49).expand(1, 1, 8, 8)
    path = BlurPath(sigma_max=HALF, steps=steps, kernel_px=3)
    found = attribution(lambda g: g, x, (2, 1, 3), path)
    change = 2 / 49 / 4  # second difference of c^2 / 49, times a quarter
    expected = torch.zeros(8, 8, dtype=torch.float64)
    expected[1:4, 2], expected[1:4, 5] = change, -change  # sharp is below blurred
    torch.testing.assert_close(found.signed[0], expected, atol=1e-15, rtol=0)
    assert found.rise == pytest.approx(0, abs=1e-15) and found.undefined == 0


def test_support_is_what_the_window_reads():
    x = noise(1, 3, 12, 12)
    found = attribution(enlarge, x, Window(8, 6, 4), SHORT)
    read = torch.zeros(12, 12, dtype=torch.bool)
    read[3:5, 4:6] = True  # output columns 8..11, rows 6..9
    read[5, 4:6] = read[3:5, 6] = True  # one more row and column of differences; not their corner
    assert torch.equal(heat_map(found.signed) > 0, read)
    # A 3x3 convolution before it widens what is read by one pixel.
    wider = F.max_pool2d(read[None].double(), 3, stride=1, padding=1)[0] > 0
    found = attribution(lambda g: enlarge(box(g)), x, Window(8, 6, 4), SHORT)
    assert torch.equal(heat_map(found.signed) > 0, wider)


def test_attributions_add_up_to_what_the_network_draws():
    """The integral of a gradient along a path is the difference of its ends (error of order 1/m)."""
    kernel = noise(3, 3, 3, 3) - 0.5
    x, window = noise(1, 3, 10, 11), Window(3, 4, 8)

    def network(g: Tensor) -> Tensor:
        return enlarge(torch.tanh(F.conv2d(g, kernel, padding=1)))

    ends = [detail(network(g), window).item() for g in (blur(x, 1.2, 9), x)]
    errors = []
    for steps in (50, 400):
        found = attribution(network, x, window, BlurPath(steps=steps), batch=25)
        assert found.rise == pytest.approx(ends[1] - ends[0])
        errors.append(abs(found.signed.sum().item() - found.rise) / found.rise)
    assert errors[0] < 0.05 and errors[1] < errors[0] / 4


def test_repeats_to_the_bit_and_does_not_depend_on_the_batch():
    network = build("edsr_tiny", 2).double()  # in float32 the order of sums shows
    x = noise(1, 3, 9, 8)
    path, seen = BlurPath(steps=5), []
    found = attribution(network, x, (4, 4, 8), path)
    again = attribution(network, x, (4, 4, 8), path)
    batched = attribution(
        network, x, (4, 4, 8), path, batch=2, progress=lambda *done: seen.append(done)
    )
    assert torch.equal(found.signed, again.signed) and found.rise == again.rise
    torch.testing.assert_close(found.signed, batched.signed, rtol=1e-9, atol=1e-12)
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_the_network_is_left_as_it_was():
    network = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.5)).train()
    network[1].eval()
    network[0].bias.requires_grad_(False)
    with torch.no_grad():
        found = attribution(network, noise(1, 3, 8, 8).float(), (0, 0, 4), SHORT)
    assert found.signed.any()
    assert network.training and network[0].training and not network[1].training
    assert network[0].weight.requires_grad and not network[0].bias.requires_grad
    assert network[0].weight.grad is None


def test_a_flat_image_has_no_map():
    network = build("edsr_tiny", 2)
    found = attribution(network, torch.full((1, 3, 8, 8), 0.3), (4, 4, 8), SHORT)
    assert not found.signed.any() and found.undefined == 0
    (heat,) = split(found.signed)
    assert not heat.map.any() and math.isnan(heat.gini) and math.isnan(heat.diffusion_index)


def test_gradients_that_are_no_numbers_count_as_zero_and_are_counted():
    def broken(g: Tensor) -> Tensor:
        nan = (g[..., :1] - g[..., :1]).abs().sqrt()  # 0, with the gradient inf * 0
        return torch.cat([g[..., :1] + nan, g[..., 1:]], -1)

    x = noise(1, 3, 8, 7)
    plain = attribution(lambda g: g, x, (0, 0, 4), SHORT)
    found = attribution(broken, x, (0, 0, 4), SHORT)
    assert found.undefined == 3 * 3 * 8 and plain.undefined == 0
    assert plain.signed[..., 0].any() and not found.signed[..., 0].any()
    assert torch.equal(found.signed[..., 1:], plain.signed[..., 1:])


def test_split_gives_each_image_of_a_stack_its_own_map():
    x = noise(1, 6, 10, 10)
    both = split(attribution(lambda g: g[:, :3] + 0.2 * box(g[:, 3:]), x, (2, 2, 4), SHORT).signed)
    assert [heat.map.shape for heat in both] == [(10, 10), (10, 10)]
    assert both[1].diffusion_index > both[0].diffusion_index  # the box spreads
    assert all(h.map.max() == 1 and h.diffusion_index == 100 * (1 - h.gini) for h in both)

    signed = attribution(lambda g: g[:, 3:], x, (2, 2, 4), SHORT).signed
    alone = split(attribution(lambda g: g, x[:, 3:], (2, 2, 4), SHORT).signed)
    ignored, used = split(signed)
    assert not ignored.map.any() and math.isnan(ignored.gini)
    assert torch.equal(used.map, alone[0].map) and used.gini == alone[0].gini
    with pytest.raises(SrkdError, match="6 channels do not split into groups of 4"):
        split(signed, 4)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: attribution(enlarge, noise(2, 3, 8, 8), (0, 0, 4)), "about one input"),
        (lambda: attribution(enlarge, noise(1, 3, 8, 8), (0, 0, 4), batch=0), "0 steps at once"),
        (lambda: attribution(enlarge, noise(1, 3, 8, 8), (9, 0, 8)), "not inside the output"),
        (
            lambda: attribution(lambda g: enlarge(g.detach()), noise(1, 3, 8, 8), (0, 0, 4)),
            "outputs without a gradient",
        ),
        (
            lambda: attribution(lambda g: g / 0, noise(1, 3, 8, 8), (0, 0, 4)),
            "output in the window is not finite",
        ),
    ],
)
def test_what_cannot_be_attributed_is_refused(ask, message):
    with pytest.raises(SrkdError, match=message):
        ask()


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((17, 0, 16), "needs x <= 16 and y <= 8"),
        ((0, 9, 16), "needs x <= 16 and y <= 8"),
        ((-1, 0, 16), "not inside the output, which is 32x24"),
        ((0, 0, 25), "25 px does not fit into the output, which is 32x24"),
        ((0, 0, 1), "no differences"),
    ],
)
def test_windows_outside_are_refused(window, message):
    check_window(Window(16, 8, 16), height=24, width=32)
    with pytest.raises(SrkdError, match=message):
        check_window(Window(*window), height=24, width=32)


# --- models, pictures, the command --------------------------------------------------------------


class Nearest(nn.Module):
    def forward(self, lr: Tensor) -> Tensor:
        return enlarge(lr)


def nearest(minimum_px: int = 1) -> LoadedModel:
    facts = Facts(scale=2, receptive_field_px=0, exact_tiling=True, minimum_px=minimum_px)
    return LoadedModel(Nearest(), "nearest", Path("nearest"), facts)


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_attribute_of_an_array_is_attribution_of_its_tensor():
    lr = photo(8, 9)
    row = attribute(nearest(), lr, (2, 4, 6), path=SHORT)
    direct = attribution(enlarge, to_tensor(lr), (2, 4, 6), SHORT)
    assert torch.equal(row.attribution.signed, direct.signed)
    (heat,) = split(direct.signed)
    assert torch.equal(row.heat.map, heat.map)
    assert row.heat.diffusion_index == heat.diffusion_index and 0 < heat.diffusion_index < 100


def test_pictures_show_map_and_window():
    row = attribute(nearest(), photo(10, 12), (8, 6, 4), path=SHORT)
    picture = heat_picture(row)
    assert picture.shape == (20, 24, 3)
    top, left = divmod(int(row.heat.map.argmax()), 12)
    assert (picture[2 * top : 2 * top + 2, 2 * left : 2 * left + 2] == RAMP[-1]).all()
    framed = (overlay_picture(row) == WINDOW_COLOUR).all(-1)
    expected = np.zeros((20, 24), bool)
    expected[5:11, 7:13] = True
    expected[6:10, 8:12] = False
    assert (framed == expected).all()
    bare = input_picture(row)
    assert bare[~expected].std() > overlay_picture(row)[~expected].std()  # half of it is heat


def test_ramp_grows_lighter_in_equal_steps():
    shades = colours(np.linspace(0, 1, 101)[None])[0] / 255
    linear = np.where(shades <= 0.04045, shades / 12.92, ((shades + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)
    assert (np.diff(lightness) > 0).all()
    assert np.abs(lightness - np.linspace(0, lightness[-1], 101)).max() < 8


def test_small_pictures_are_refused():
    with pytest.raises(SrkdError, match="9x8 px, but nearest needs at least 10 px"):
        attribute(nearest(minimum_px=10), photo(8, 9), (0, 0, 4), path=SHORT)
    with pytest.raises(SrkdError, match=r"must be \(height, width, 3\) uint8"):
        attribute(nearest(), photo(8, 9).astype(np.float32), (0, 0, 4), path=SHORT)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small networks at x2, one at x3, a picture of 12x10 px (LR) and a large one of 25x21 px."""
    folder = tmp_path_factory.mktemp("attribution")
    for name, scale, seed in (("one", 2, 1), ("two", 2, 2), ("three", 3, 3)):
        torch.manual_seed(seed)
        save_model(folder / name, build("edsr_tiny", scale), {})
    write_png(folder / "small.png", photo(10, 12))
    write_png(folder / "large.png", photo(21, 25))
    write_png(folder / "tiny.png", photo(4, 12))
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_the_command_writes_pictures_and_numbers(place, tmp_path, capsys):
    out = tmp_path / "out"
    ask = [str(place / "one"), str(place / "small.png"), "--window", "4,2,8", "--steps", "2"]
    assert main([*ask, "--device", "cpu", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        "attribution.json",
        "one_map.png",
        "one_overlay.png",
    ]
    for name in ("one_map.png", "one_overlay.png"):
        with Image.open(out / name) as picture:
            assert picture.size == (24, 20) and picture.mode == "RGB"
    described = json.loads((out / "attribution.json").read_text())
    (model,) = described["models"]
    assert f"{model['diffusion_index']:.2f}" in said and f"{model['gini']:.4f}" in said
    assert model["diffusion_index"] == pytest.approx(100 * (1 - model["gini"]))
    info = json.loads((place / "one" / "model.json").read_text())
    assert model["weights_sha256"] == info["weights_sha256"] and model["model"] == "one"
    assert described["image"] == "small.png" and described["input_size"] == [10, 12]
    assert described["window"] == {"x": 4, "y": 2, "size": 8}
    assert described["path"] == {"sigma_max": 1.2, "steps": 2, "kernel_px": 9}


def test_the_command_compares_models_on_a_picture_made_smaller(
    place, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    models = [str(place / "one"), str(place / "two")]
    ask = [*models, str(place / "large.png"), "--window", "4,2", "--hr", "--steps", "2", "--json"]
    assert main([*ask, "--device", "cpu", "--batch", "2"]) == 0
    described = json.loads(capsys.readouterr().out)
    out = tmp_path / "attribution" / "large_one_two_4_2_16"
    assert described == json.loads((out / "attribution.json").read_text())
    assert described["input_size"] == [10, 12] and described["made_smaller"] is True
    indices = [model["diffusion_index"] for model in described["models"]]
    assert len(set(indices)) == 2
    with Image.open(out / "side_by_side.png") as sheet:
        assert sheet.width > 3 * 24 and sheet.height > 20
    rows = attribute_all(
        models, place / "large.png", (4, 2, 16), hr=True, path=BlurPath(steps=2), batch=2
    )
    assert [row.heat.diffusion_index for row in rows] == pytest.approx(indices)


def test_a_window_without_texture_has_no_index(place, tmp_path, capsys):
    write_png(tmp_path / "flat.png", np.full((10, 12, 3), 77, np.uint8))
    ask = [str(place / "one"), str(tmp_path / "flat.png"), "--window", "4,2", "--steps", "2"]
    assert main([*ask, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "no pixel takes part" in shown.err and "nan" not in shown.out
    described = json.loads((tmp_path / "out" / "attribution.json").read_text())
    assert described["models"][0]["diffusion_index"] is None


def test_names_of_files_are_short_and_plain():
    assert file_name("runs/a b_x4") == "runs_a_b_x4" and len(file_name("x" * 300)) == 80


def test_window_text():
    assert parse_window("120,80,24") == (120, 80, 24) and parse_window(" 0, 7") == (0, 7, 16)


def test_defaults_of_the_command_are_those_of_the_path():
    args = parse(["model", "image", "--window", "0,0"])
    assert BlurPath(args.sigma_max, args.steps, args.kernel) == BlurPath()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one", "small.png", "--window", "4;2"], "'4;2' is no window"),
        (["one", "small.png", "--window", "4,2,8,8"], "is no window"),
        (["one", "small.png", "--window=-4,2,8"], "is no window"),
        (["one", "small.png", "--window", "4,2,1.5"], "is no window"),
        (["one", "small.png", "--window", "9,2,16"], "needs x <= 8 and y <= 4"),
        (["one", "small.png", "--window", "0,0,1"], "no differences"),
        (["one", "tiny.png", "--window", "0,0,4"], "too small for a blur kernel of 9 px"),
        (["one", "broken.png", "--window", "0,0,4"], "broken.png"),
        (["one", "absent.png", "--window", "0,0,4"], "cannot read .*absent.png"),
        (["absent", "small.png", "--window", "0,0,4"], "no file, run folder or shipped model"),
        (["one", "three", "small.png", "--window", "0,0,4"], "enlarge by x2 and x3"),
        (["one", "small.png", "--window", "0,0,4", "--kernel", "8"], "kernel has 8 px"),
        (["one", "small.png", "--window", "0,0,4", "--batch", "0"], "0 steps at once"),
        (["one", "small.png", "--window", "0,0,4", "--scale", "3"], "x2 network, but x3"),
        (["one", "small.png", "--window", "0,0,4", "--device", "tpu"], "device 'tpu'"),
    ],
)
def test_mistakes_end_in_a_sentence(words, message, place, tmp_path, capsys):
    files = {"one", "three", "absent", *(p.name for p in place.iterdir()), "absent.png"}
    argv = [str(place / word) if word in files else word for word in words]
    out = tmp_path / "out"
    assert run_command(main, [*argv, "--out", str(out), "--quiet"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert re.search(message, shown.err)
    assert not out.exists()
