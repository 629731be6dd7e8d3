"""The passes of one step: which images share one, what they keep, where gradients and random numbers go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tiny_pair import (
    Nearest,
    count_runs,
    images,
    part_of,
    step_of,
    student_of,
    teacher_of,
    training_of,
)

from srkd.methods.mipkd import Mipkd
from srkd.passes import passes
from srkd.step import loss_terms
from srkd.types import Batch

if TYPE_CHECKING:
    from srkd.training import Training
    from srkd.types import Step

SIZES = (8, 4, 8, 6, 4)  # px of five batches, three sizes
COUNTS = (2, 3, 1, 2, 1)  # images in each


def batches() -> list[torch.Tensor]:
    return [images(n, px, seed=i)[0] for i, (n, px) in enumerate(zip(COUNTS, SIZES, strict=True))]


def test_images_of_one_size_share_one_pass() -> None:
    network = teacher_of("edsr")
    seen = count_runs(network)
    made = passes(network, batches(), ())
    assert seen == [(3, 3, 8, 8), (4, 3, 4, 4), (2, 3, 6, 6)]
    shapes = [tuple(p.sr.shape) for p in made]
    assert shapes == [(n, 3, 2 * px, 2 * px) for n, px in zip(COUNTS, SIZES, strict=True)]
    assert all(p.network is network for p in made)


def test_shared_passes_of_a_network_without_sums_are_exactly_the_separate_ones() -> None:
    made = passes(Nearest(), batches(), ())
    assert all(torch.equal(p.sr, Nearest()(x)) for p, x in zip(made, batches(), strict=True))


@pytest.mark.parametrize("family", ["edsr", "rcan", "swinir"])
def test_shared_passes_equal_separate_ones(family: str) -> None:
    network = teacher_of(family)
    made = passes(network, batches(), network.tap_names)
    for shared, image in zip(made, batches(), strict=True):
        assert torch.allclose(shared.sr, network(image), atol=1e-5)
    alone = network.run(batches()[0], network.tap_names)
    assert made[0].head is not None and alone.head is not None
    assert torch.allclose(made[0].head, alone.head, atol=1e-4)
    for name in network.tap_names:
        assert torch.allclose(made[0].taps[name], alone.taps[name], rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("sizes", [(8, 8, 4), (8, 4, 4), (8, 4)])
def test_the_first_batch_alone_keeps_features(sizes: tuple[int, ...]) -> None:
    network = teacher_of("edsr")
    made = passes(network, [images(2, px)[0] for px in sizes], ("block2", "body"))
    assert set(made[0].taps) == {"block2", "body"}
    assert all(len(feature) == 2 for feature in made[0].taps.values())
    assert made[0].head is not None and len(made[0].head) == 2
    assert all(not p.taps for p in made[1:])


def test_each_image_is_seen_once_by_each_network_of_a_composition() -> None:
    student, teacher = student_of("edsr"), teacher_of("rcan")
    training = training_of("dukd+mipkd+at", student, teacher)
    seen = [count_runs(network) for network in (student, teacher)]
    loss_terms(training, *images())
    # LR and zoomed-in crops together, zoomed-out ones apart.
    assert seen == [[(4, 3, 8, 8), (2, 3, 4, 4)]] * 2


def test_weights_of_0_run_no_teacher() -> None:
    student, teacher = student_of("edsr"), teacher_of("edsr")
    training = training_of("logits", student, teacher, logits_weight=0.0)
    seen = count_runs(teacher)
    assert set(loss_terms(training, *images())) == {"pixel"}
    assert seen == []


def test_students_have_a_graph_and_teachers_none() -> None:
    student, teacher = student_of("edsr"), teacher_of("edsr")
    teacher.requires_grad_(True)  # not even then
    step = step_of(training_of("dukd+mipkd", student, teacher), *images())
    assert set(step.views) == {"dukd.zoom_in", "dukd.zoom_out"}
    assert step.student.sr.requires_grad and step.student.taps["body"].requires_grad
    assert all(view.student.sr.requires_grad for view in step.views.values())
    assert step.teacher.head is not None
    taught = [step.teacher.sr, step.teacher.head, *step.teacher.taps.values()]
    taught += [view.teacher.sr for view in step.views.values()]
    assert not any(tensor.requires_grad for tensor in taught)


def test_passes_of_a_step_belong_to_its_images() -> None:
    """The student's pass of a view is over what the method asked it to see, and so is the teacher's."""
    student, teacher = student_of("edsr"), teacher_of("edsr")
    training = training_of("dukd", student, teacher)
    lr, hr = images(4)
    step = step_of(training, lr, hr)
    wanted = part_of(training, "dukd").views(step.batch)
    assert torch.allclose(step.student.sr, student(lr), atol=1e-6)
    assert torch.allclose(step.teacher.sr, teacher(lr), atol=1e-6)
    for name, asked in wanted.items():
        view = step.views[f"dukd.{name}"]
        assert torch.allclose(view.student.sr, student(asked.student), atol=1e-6)
        assert torch.allclose(view.teacher.sr, teacher(asked.teacher), atol=1e-6)
        assert not torch.equal(asked.student, asked.teacher)


def test_channels_last_images_stay_so() -> None:
    training = training_of("dukd", student_of("edsr"), teacher_of("edsr"))
    lr, hr = (image.contiguous(memory_format=torch.channels_last) for image in images())
    views = training.method.views(Batch(lr, hr))
    seen = [image for view in views.values() for image in (view.student, view.teacher)]
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in seen)


def test_parts_of_a_step_draw_their_own_images_and_one_mixed_network() -> None:
    student, teacher = student_of("edsr"), teacher_of("edsr")
    training = training_of("dukd+mipkd", student, teacher)
    mipkd = part_of(training, "mipkd")
    assert isinstance(mipkd, Mipkd)
    lr, hr = images(8)
    owners = set()
    for iteration in range(6):
        training.done = iteration
        first, second = (step_of(training, lr, hr, part) for part in (0, 1))
        assert (first.batch.part, second.batch.part) == (0, 1)
        assert mipkd._draws(first) == mipkd._draws(second)
        owners.add(str(mipkd._draws(first)))
        assert seen_by_student(training, first) != seen_by_student(training, second)
        assert seen_by_student(training, first) == seen_by_student(training, first)
    assert len(owners) > 1  # drawn anew in every step


def seen_by_student(training: Training, step: Step) -> list[list[float]]:
    views = training.method.views(step.batch)
    return [view.student.flatten().tolist() for view in views.values()]
