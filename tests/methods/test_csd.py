"""CSD: the contrast by hand, VGG19 against a plain stack of layers, shared weights against one tensor."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from srkd.data.degradation import upscale
from srkd.errors import SrkdError
from srkd.methods import check_teachers, make, plan
from srkd.methods.base import l1
from srkd.methods.csd import Csd, contrast, corner, distance_to_all, shared
from srkd.networks import ZOO, ZooEntry, build_family
from srkd.recipe import load_recipe
from srkd.step import train_step
from srkd.training import Training, prepare
from srkd.types import Batch, Setting, Step
from srkd.vgg import BLOCKS, GRAPH_VALUES, MAP_VALUES, load_vgg

TINY = {"channels": 4, "blocks": 2, "scale": 2}
RCAN = {"channels": 4, "blocks": 1, "group_count": 2, "reduction": 2, "scale": 2}
SETTING = Setting(patch_px=8, batch=2, iterations=10, memory=2**33)


def plain_vgg() -> nn.Sequential:
    """The `features` of VGG19 up to relu5_1, one layer after another as torchvision counts them.

    Without values: a test assigns its own.
    """
    layers: list[nn.Module] = []
    c_in = 3
    for i, widths in enumerate(BLOCKS):
        layers += [nn.MaxPool2d(2)] if i else []
        for c_out in widths:
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1, device="meta"), nn.ReLU()]
            c_in = c_out
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def vgg_state() -> dict[str, Tensor]:
    """Random weights that keep the size of what passes through them."""
    torch.manual_seed(0)
    state = {}
    for name, parameter in plain_vgg().named_parameters():
        fan_in = parameter[0].numel()
        spread = (2 / fan_in) ** 0.5 if parameter.dim() == 4 else 0.1
        state[f"features.{name}"] = torch.randn(parameter.shape) * spread
    return state


@pytest.fixture(scope="module")
def vgg_file(vgg_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg19.safetensors"
    beyond = {"features.30.weight": torch.zeros(2), "classifier.0.bias": torch.zeros(2)}
    save_file({**vgg_state, **beyond}, path)
    return path


def network(sizes: dict[str, Any] = TINY, family: str = "edsr", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build_family(family, sizes)


def csd(student: nn.Module, vgg: Path | str, *teachers: nn.Module, **options: Any) -> Csd:
    options = {"channels": 8, "vgg_weights": str(vgg), **options}
    part = make(plan("csd", options), student, teachers).parts["csd"]
    assert isinstance(part, Csd)
    return part


def step_of(student: Any, iteration: int = 0) -> Step:
    random = torch.Generator().manual_seed(1)
    scale = student.scale
    lr = torch.rand(3, 3, 8, 8, generator=random)
    hr = torch.rand(3, 3, 8 * scale, 8 * scale, generator=random)
    return Step(Batch(lr, hr, iteration=iteration, total=10), student.run(lr))


# -- VGG19 ------------------------------------------------------------------------------------------


def test_maps_are_those_of_the_plain_stack_of_layers(
    vgg_file: Path, vgg_state: dict[str, Tensor]
) -> None:
    stack = plain_vgg()
    weights = {k.removeprefix("features."): v for k, v in vgg_state.items()}
    stack.load_state_dict(weights, assign=True)
    image = torch.rand(1, 3, 16, 16)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    x, expected = (image - mean) / std, []
    for number, layer in enumerate(stack):
        x = layer(x)
        if number in (1, 6, 11, 20, 29):  # relu1_1, 2_1, 3_1, 4_1, 5_1 of torchvision's vgg19
            expected.append(x)
    maps = load_vgg(vgg_file)(image)
    assert len(maps) == len(expected) == 5
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_pickled_file_gives_the_same_network(
    vgg_file: Path, vgg_state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(vgg_state, tmp_path / "vgg19.pth")
    a, b = load_vgg(vgg_file), load_vgg(tmp_path / "vgg19.pth")
    assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))


def test_vgg_is_no_part_of_what_is_trained_or_saved(vgg_file: Path) -> None:
    vgg = load_vgg(vgg_file)
    assert not list(vgg.parameters())
    assert not vgg.state_dict()
    assert vgg.double().mean.dtype == vgg.get_buffer("weight28").dtype == torch.float64  # it moves


def test_other_files_are_refused(vgg_state: dict[str, Tensor], tmp_path: Path) -> None:
    lacking = {k: v for k, v in vgg_state.items() if k != "features.28.bias"}
    save_file(lacking, tmp_path / "cut.safetensors")
    with pytest.raises(SrkdError, match=r"'features\.28\.bias' of shape \(512,\).* lacks it"):
        load_vgg(tmp_path / "cut.safetensors")
    # With batch normalisation the third entry is no ReLU's but a vector.
    save_file({**vgg_state, "features.2.weight": torch.ones(64)}, tmp_path / "bn.safetensors")
    with pytest.raises(SrkdError, match=r"features\.2\.weight.*\(64, 64, 3, 3\).*as \(64,\)"):
        load_vgg(tmp_path / "bn.safetensors")
    with pytest.raises(SrkdError, match="no weights file"):
        load_vgg(tmp_path / "none.pth")


def test_memory_of_a_graph_is_as_counted(vgg_file: Path) -> None:
    vgg, kept = load_vgg(vgg_file), {}
    weights = {buffer.data_ptr() for buffer in vgg.buffers()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        maps = vgg(image)
    assert sum(m.numel() for m in maps) == MAP_VALUES * 32 * 32
    assert sum(kept.values()) / 4 / 32**2 == pytest.approx(GRAPH_VALUES, rel=0.02)


# -- Eq. (3) ----------------------------------------------------------------------------------------


def test_contrast_by_hand() -> None:
    def maps(*values: float, count: int = 1) -> list[Tensor]:
        return [torch.full((count, 2, 1, 1), float(v)) for v in values]

    student, teacher = maps(1, 1, 1, 1, 1, count=2), maps(2, 1.5, 1.25, 1, 0, count=2)
    # Two negatives, 2 and 3 away: their distances add up to 5 in every map.
    negatives = [torch.tensor([3.0, 4.0])[:, None, None, None].expand(2, 2, 1, 1)] * 5
    expected = (1 / 32 * 1 + 1 / 16 * 0.5 + 1 / 8 * 0.25 + 1 / 4 * 0 + 1 * 1) / 5
    assert contrast(student, teacher, negatives).item() == pytest.approx(expected)


def test_contrast_stays_finite_when_a_negative_is_met() -> None:
    same = [torch.ones(1, 1, 1, 1)] * 5
    other = [torch.zeros(1, 1, 1, 1)] * 5
    assert contrast(same, same, same).item() == 0
    assert contrast(same, other, same).item() == pytest.approx(1.46875e7)


def test_distance_and_its_gradient_are_those_of_plain_autograd() -> None:
    torch.manual_seed(0)
    negatives = torch.randn(5, 2, 4, 3)
    ours = torch.randn(3, 2, 4, 3, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    value = distance_to_all(ours, negatives)
    plain = torch.stack([(theirs - n).abs().mean() for n in negatives]).sum()
    (7 * value).backward()
    (7 * plain).backward()
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(ours.grad, theirs.grad)


# -- Eq. (1): the student is a slice ----------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [("edsr", TINY), ("rcan", RCAN), ("edsr", {**TINY, "tail": "one_step", "mean_shift": False})],
)
def test_a_slice_is_the_wide_network_with_all_else_zero(
    family: str, sizes: dict[str, Any], scale: int
) -> None:
    # Channels of zero stay zero through convolution, attention and shuffle, if the slice is cut right.
    student = network({**sizes, "scale": scale}, family)
    wide = network({**sizes, "scale": scale, "channels": 8}, family, seed=1)
    for parameter in wide.parameters():
        nn.init.zeros_(parameter)
    lr = torch.rand(2, 3, 7, 5)
    sr = functional_call(wide, shared(wide, student), (lr,))
    torch.testing.assert_close(sr, student(lr))


def test_start_is_the_slice_of_the_teacher(vgg_file: Path) -> None:
    student, teacher = network(), network({**TINY, "channels": 6}, seed=1)
    method = csd(student, vgg_file, teacher)
    assert method.wide.channels == 6
    method.start(student, (teacher,))
    narrow = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        assert torch.equal(narrow[name], parameter[corner(narrow[name])]), name
    # With these weights the wide network is the teacher, and a copy: the teacher will not be trained.
    lr = torch.rand(1, 3, 6, 6)
    assert torch.equal(
        functional_call(method.wide, shared(method.wide, student), (lr,)), teacher(lr)
    )
    own = {p.data_ptr() for p in method.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in (*teacher.parameters(), *student.parameters()))


def test_training_is_that_of_one_shared_tensor(vgg_file: Path) -> None:
    """Some steps of Adam against a single wide network from which the student is cut."""
    student = network()
    method = csd(student, vgg_file)
    method.start(student, ())
    one = copy.deepcopy(method.wide)
    hidden = copy.deepcopy(dict(method.wide.named_parameters()))
    adam = torch.optim.Adam([*student.parameters(), *method.parameters()], lr=1e-3, fused=True)
    reference = torch.optim.Adam(one.parameters(), lr=1e-3)
    c, vgg = method.config, method.vgg
    assert vgg is not None
    for i in range(3):
        step = step_of(student, i)
        adam.zero_grad()
        sum(method.loss(step).values()).backward()
        adam.step()

        narrow = {
            name: parameter[corner(cut)]
            for (name, parameter), cut in zip(
                one.named_parameters(), student.parameters(), strict=True
            )
        }
        sr, wide_sr = functional_call(network(), narrow, (step.lr,)), one(step.lr)
        order = torch.randperm(3, generator=step.batch.generator("negatives"))
        negatives = vgg(upscale(step.lr[order], 2))
        loss = l1(sr, step.hr) + c.teacher_weight * l1(wide_sr, step.hr)
        loss += c.contrast_weight * contrast(vgg(sr), vgg(wide_sr.detach()), negatives)
        reference.zero_grad()
        loss.backward()
        reference.step()
    for name, parameter in student.named_parameters():
        expected = one.get_parameter(name)
        torch.testing.assert_close(
            parameter, expected[corner(parameter)], atol=2e-5, rtol=0, msg=name
        )
        held = method.wide.get_parameter(name)
        assert torch.equal(held[corner(parameter)], hidden[name][corner(parameter)]), name
        rest = torch.ones_like(held, dtype=torch.bool)
        rest[corner(parameter)] = False
        torch.testing.assert_close(held[rest], expected[rest], atol=2e-5, rtol=0, msg=name)
        assert not rest.any() or not torch.equal(held[rest], hidden[name][rest]), name


# -- Eq. (2) ----------------------------------------------------------------------------------------


def gradients(term: Tensor, module: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(
        term, list(module.parameters()), retain_graph=True, allow_unused=True
    )
    return [torch.zeros(()) if g is None else g for g in found]


@pytest.mark.parametrize(("family", "sizes"), [("edsr", TINY), ("rcan", {**RCAN, "channels": 6})])
def test_where_the_gradients_go(vgg_file: Path, family: str, sizes: dict[str, Any]) -> None:
    student = network(sizes, family)
    method = csd(student, vgg_file)
    terms = method.loss(step_of(student))
    assert set(terms) == {"pixel", "teacher_pixel", "contrast"}
    for term in terms.values():
        assert all(g.abs().sum() > 0 for g in gradients(term, student))
    for g, cut, whole in zip(
        gradients(terms["teacher_pixel"], method.wide),
        student.parameters(),
        method.wide.parameters(),
        strict=True,
    ):
        assert not g[corner(cut)].any()  # the student's weights stand there
        assert cut.shape == whole.shape or g.any()
    for name in ("pixel", "contrast"):
        assert not any(g.any() for g in gradients(terms[name], method.wide))
    assert [name for name, _ in method.named_parameters() if not name.startswith("wide.")] == []


def test_weights_scale_their_terms_and_zero_needs_no_vgg(vgg_file: Path) -> None:
    student = network()
    usual = csd(student, vgg_file)
    weighted = {"pixel_weight": 2.0, "teacher_weight": 3.0, "contrast_weight": 4.0}
    other = csd(student, vgg_file, **weighted)
    other.load_state_dict(usual.state_dict())
    step = step_of(student)
    ours, theirs = usual.loss(step), other.loss(step)
    assert ours["pixel"].item() == pytest.approx(l1(step.student.sr, step.hr).item())
    for name, factor in (("pixel", 2), ("teacher_pixel", 3), ("contrast", 4 / (200 / 255))):
        assert theirs[name].item() == pytest.approx(factor * ours[name].item(), rel=1e-5)
    without = csd(student, "", contrast_weight=0.0)
    assert without.files == ()
    assert set(without.loss(step)) == {"pixel", "teacher_pixel"}


def test_negatives_are_drawn_anew_and_the_same_in_a_repeated_step(vgg_file: Path) -> None:
    student = network()
    method = csd(student, vgg_file, negatives=1)
    drawn = [method._negatives(step_of(student, i)) for i in range(20)]
    enlarged = upscale(step_of(student).lr, 2)
    chosen = [[torch.equal(d[0], e) for e in enlarged].index(True) for d in drawn]
    assert set(chosen) == {0, 1, 2}
    for term, value in method.loss(step_of(student, 3)).items():
        assert torch.equal(value, method.loss(step_of(student, 3))[term])
    assert len(csd(student, vgg_file)._negatives(step_of(student))) == 3  # 10 asked, 3 in the batch


def test_finite_in_bf16(vgg_file: Path) -> None:
    student = network()
    method = csd(student, vgg_file)
    with torch.autocast("cpu", torch.bfloat16):
        terms = method.loss(step_of(student))
    torch.stack(list(terms.values())).sum().backward()
    for name, value in terms.items():
        assert value.dtype == torch.float32 and value.isfinite() and value > 0, name
    for parameter in (*student.parameters(), *method.parameters()):
        assert parameter.grad is not None and parameter.grad.isfinite().all()


def test_beside_a_method_that_reads_the_frozen_teacher(vgg_file: Path) -> None:
    student = network()
    teacher = network({**TINY, "channels": 8}, seed=1).requires_grad_(False)
    options = {"csd": {"vgg_weights": str(vgg_file)}}
    method = make(plan("csd+logits", options), student, (teacher,))
    assert method.needs_teacher_pass
    step = step_of(student)
    terms = method.loss(Step(step.batch, step.student, (teacher.run(step.lr),)))
    assert set(terms) == {"pixel", "logits", "csd.teacher_pixel", "csd.contrast"}
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in method.parameters())


# -- in the training --------------------------------------------------------------------------------


def training_of(vgg: Path) -> Training:
    changes = ["student.network=edsr_tiny", "student.scale=2", "data.patch=8", "train.batch=4"]
    changes += ["train.precision=fp32", "train.accumulate=2", "train.learning_rate=1e-3"]
    changes += ["method.name=csd", "method.channels=20", f"method.csd.vgg_weights={vgg}"]
    return prepare(load_recipe(None, changes), "cpu")


def test_steps_of_the_loop_and_a_resumed_one(vgg_file: Path) -> None:
    random = torch.Generator().manual_seed(0)
    crops = [
        torch.randint(256, (2, 4, 3, px, px), generator=random).to(torch.uint8) for px in (8, 16)
    ]
    whole, halves = training_of(vgg_file), training_of(vgg_file)
    before = copy.deepcopy(whole.student.state_dict())
    for lr, hr in zip(*crops, strict=True):
        terms = train_step(whole, lr, hr)
        assert set(terms) == {"pixel", "csd.teacher_pixel", "csd.contrast"}
        assert torch.stack(list(terms.values())).isfinite().all()
    assert not any(torch.equal(before[k], v) for k, v in whole.student.state_dict().items())

    train_step(halves, crops[0][0], crops[1][0])
    state = copy.deepcopy(halves.method.state_dict())
    assert all(key.startswith("parts.csd.wide.") for key in state)
    resumed = training_of(vgg_file)
    resumed.method.load_state_dict(state)
    resumed.student.load_state_dict(halves.student.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(halves.optimizer.state_dict()))
    resumed.done = halves.done
    train_step(resumed, crops[0][1], crops[1][1])
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name


def test_what_is_said_beforehand(vgg_file: Path) -> None:
    student = network()
    method = csd(student, vgg_file)
    assert not method.needs_teacher_pass
    assert method.files == (str(vgg_file),)
    few, memory = method.check(SETTING)
    assert "2 negatives a step instead of 10" in few
    wide = sum(p.numel() for p in method.wide.parameters())
    assert f"({wide:,} parameters)" in memory
    narrower = csd(student, vgg_file, network({**TINY, "channels": 6}))
    assert "has the teacher's 6 channels; method.csd.channels = 8" in narrower.check(SETTING)[0]
    with pytest.raises(SrkdError, match=r"images of 14 px at x2, but VGG19 needs 16"):
        method.check(Setting(patch_px=7, batch=2, iterations=1, memory=2**33))
    with pytest.raises(SrkdError, match=r"needs 9\d\d\d MiB .* 8192 MiB are free"):
        method.check(Setting(patch_px=192, batch=32, iterations=1, memory=2**33))


# -- refusals ---------------------------------------------------------------------------------------


def test_without_the_weights_of_vgg_it_says_how_to_give_them() -> None:
    with pytest.raises(SrkdError, match=r"ImageNet VGG19.*--set method\.csd\.vgg_weights=FILE"):
        make(plan("csd", {"channels": 8}), network(), ())


def test_a_path_may_hold_a_variable(vgg_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGG_HOME", str(vgg_file.parent))
    assert csd(network(), "$VGG_HOME/vgg19.safetensors").vgg is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 4}, "method.csd.channels = 4, but the student has 4"),
        ({"negatives": 0}, "method.csd.negatives = 0, but the contrast needs one"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SrkdError, match=re.escape(message)):
        csd(network(), "", **options)


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("edsr", {**TINY, "channels": 8, "blocks": 3}, "has blocks 3 (student 2); choose"),
        (
            "edsr",
            {**TINY, "channels": 8, "residual_scale": 0.1},
            "residual_scale 0.1 (student 1.0)",
        ),
        ("edsr", TINY, "channels 4, not above the student's 4"),
        ("rcan", {**RCAN, "channels": 8}, "family rcan (student edsr)"),
    ],
)
def test_teachers_of_which_the_student_is_no_slice(
    family: str, sizes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SrkdError, match=re.escape(message)):
        csd(network(), "", network(sizes, family))


def test_networks_that_are_no_slices() -> None:
    student = build_family("swinir", {"channels": 12, "depths": (1,), "heads": 2, "scale": 2})
    with pytest.raises(SrkdError, match=r"swinir is none .* choose a student of edsr or rcan"):
        csd(student, "")
    with pytest.raises(SrkdError, match="outputs only"):
        check_teachers(plan("csd", {}), [False])
    with pytest.raises(SrkdError, match="takes 1 teacher, got 2"):
        check_teachers(plan("csd", {}), [True, True])


def test_shipped_recipe_takes_two_steps(
    vgg_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"channels": 4, "blocks": 2, "residual_scale": 0.1}
    monkeypatch.setitem(ZOO, "edsr_c64b32", ZooEntry("edsr", "small", small))
    changes = ["method.channels=8", "data.patch=8", "train.batch=2", "train.iterations=2"]
    path = Path(__file__).parents[2] / "recipes/papers/csd_edsr.toml"
    recipe = load_recipe(path, [*changes, f"method.vgg_weights={vgg_file}", "train.precision=fp32"])
    training = prepare(recipe, "cpu")
    random = torch.Generator().manual_seed(0)
    lr = torch.randint(256, (2, 3, 8, 8), generator=random, dtype=torch.uint8)
    hr = lr.repeat_interleave(4, 2).repeat_interleave(4, 3)
    before = [p.detach().clone() for p in training.student.parameters()]
    for _ in range(2):
        terms = train_step(training, lr, hr)
        assert {"pixel", "csd.teacher_pixel", "csd.contrast"} == set(terms)
        assert all(torch.isfinite(value) for value in terms.values())
    after = training.student.parameters()
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
