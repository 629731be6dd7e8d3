"""One step of a training: passes of all networks, the method's terms, the optimiser, the weight average.

A step is a function of (recipe, seed, step number, state): crops and symmetries are drawn from (seed,
step, sample), the learning rate is computed from the step, and the state holds everything else. So
N steps, a kill, a resume and N steps give bit for bit what 2N steps give (CPU, fp32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import srkd.ranks as ranks
from srkd.bilevel import bilevel_iteration
from srkd.methods import RESERVED_WEIGHTS
from srkd.methods.base import l1
from srkd.networks.base import Network
from srkd.passes import passes
from srkd.training import ema_decay_at, learning_rate_at
from srkd.types import Batch, Pass, Step, View

if TYPE_CHECKING:
    from collections.abc import Mapping

    from srkd.training import Training
    from srkd.types import ViewInput


@dataclass(frozen=True)
class Seen:
    """What one micro-batch brings before the student has seen it.

    views      what the method wants both networks to see besides the batch
    teachers   for every teacher its passes over the batch and over the views, without graph
    features   of the teacher, for a bilevel step
    """

    batch: Batch
    views: dict[str, ViewInput]
    teachers: list[list[Pass]]
    features: Mapping[str, Tensor]


def train_step(
    training: Training, lr: Tensor, hr: Tensor, taught: tuple[Tensor, ...] = ()
) -> dict[str, Tensor]:
    """One optimiser step on a batch of uint8 crops; returns the weighted terms, still on the device.

    `taught` are the crops of the cached outputs of every teacher, if there is a cache: float16, like hr.
    """
    t, train = training, training.recipe.train
    if 0 < train.distil_iterations == t.done:
        t.optimizer.state.clear()  # the second stage begins afresh
    rate = learning_rate_at(train, t.done)
    for group in t.optimizer.param_groups:
        group["lr"] = rate
    t.optimizer.zero_grad(set_to_none=True)
    if ranks.world() > 1:
        # What a network draws in training differs between processes and repeats in a resumed run.
        torch.manual_seed(t.recipe.seed + t.done * ranks.world() + ranks.rank())
    totals: dict[str, Tensor] = {}
    parts = zip(*(crops.chunk(train.accumulate) for crops in (lr, hr, *taught)), strict=True)
    # Micro-batches are counted over all processes, so that methods draw the same for the same crops.
    for part, crops in enumerate(parts, ranks.rank() * train.accumulate):
        lr_part, hr_part, *known = (to_image(c, t) for c in crops)
        if t.task_alone:
            terms = {"pixel": _pixel(t, lr_part, hr_part)}
        else:
            seen = look(t, lr_part, hr_part, part, tuple(known))
            totals |= _bilevel_part(t, seen, rate)
            terms = student_terms(t, seen)
        torch.stack(list(terms.values())).sum().div(train.accumulate).backward()
        for name, value in terms.items():
            totals[name] = totals.get(name, 0) + value.detach() / train.accumulate
    ranks.average_gradients([p for g in t.optimizer.param_groups for p in g["params"]])
    if ranks.world() > 1:
        kept = t.method.state_dict()  # constants are no statistics
        ranks.average_(
            [b for name, b in t.method.named_buffers() if name in kept and b.is_floating_point()]
        )
    t.optimizer.step()
    if t.average is not None:
        update_average(t.average, t.student, ema_decay_at(train.ema, t.done))
    t.done += 1
    return totals


def _pixel(training: Training, lr: Tensor, hr: Tensor) -> Tensor:
    """|S(x) - y|_1 alone: the second stage of stage-wise training."""
    t = training
    with torch.autocast(t.device.type, torch.bfloat16, enabled=t.precision == "bf16"):
        return l1(t.student(lr), hr)


def _bilevel_part(training: Training, seen: Seen, rate: float) -> dict[str, Tensor]:
    """What a method with a bilevel step does before the step of the loop; values for the log."""
    t, found = training, training.method.bilevel_part
    if t.bilevel is None or found is None:
        return {}
    name, method = found
    assert isinstance(t.student, Network)
    values = bilevel_iteration(
        t.student,
        method,
        method.bilevel,
        t.bilevel,
        seen.batch.lr,
        seen.batch.hr,
        {tap: feature.float() for tap, feature in seen.features.items()},
        iteration=t.done,
        learning_rate=rate,
        bf16=t.precision == "bf16",
    )
    return {f"{name}.{key}": value.detach() for key, value in values.items()}


def to_image(batch: Tensor, training: Training) -> Tensor:
    """(N, 3, h, w) on the CPU -> float32 in [0, 1] on the device, in the training's layout.

    uint8 is divided by 255; what is float16 (cached outputs) is in this range already.
    """
    layout = torch.channels_last if training.recipe.train.channels_last else torch.contiguous_format
    moved = batch.to(training.device, non_blocking=True)
    image = moved.to(torch.float32, memory_format=layout)
    return image.div_(255) if batch.dtype == torch.uint8 else image


def look(
    training: Training, lr: Tensor, hr: Tensor, part: int = 0, taught: tuple[Tensor, ...] = ()
) -> Seen:
    """Views and teacher passes of a micro-batch."""
    t, method = training, training.method
    batch = Batch(
        lr=lr,
        hr=hr,
        iteration=t.done,
        total=t.recipe.train.iterations,
        part=part,
        seed=t.recipe.seed,
    )
    with torch.no_grad():
        views, shown = method.views(batch), method.teacher_input(batch)
    with torch.autocast(t.device.type, torch.bfloat16, enabled=t.precision == "bf16"):
        teachers = _teacher_passes(t, shown, views, taught) if method.needs_teacher_pass else []
        features = _teacher_features(t, lr, teachers) if t.bilevel is not None else {}
    return Seen(batch, views, teachers, features)


def student_terms(training: Training, seen: Seen) -> dict[str, Tensor]:
    """The student's passes and the method's terms (float32), with graph."""
    t, method = training, training.method
    with torch.autocast(t.device.type, torch.bfloat16, enabled=t.precision == "bf16"):
        first = method.student_input(seen.batch, tuple(own[0] for own in seen.teachers))
        students = passes(
            t.student, [first, *(v.student for v in seen.views.values())], method.student_taps
        )
        step = Step(
            batch=seen.batch,
            student=students[0],
            teachers=tuple(own[0] for own in seen.teachers),
            views={
                name: View(students[i + 1], tuple(own[i + 1] for own in seen.teachers))
                for i, name in enumerate(seen.views)
            },
        )
        terms = method.loss(step)
    # The first stage of stage-wise training: the distance of features alone. A bilevel method has had it.
    if t.recipe.train.distil_iterations and t.bilevel is None:
        return {name: value for name, value in terms.items() if name not in RESERVED_WEIGHTS}
    return terms


def loss_terms(
    training: Training, lr: Tensor, hr: Tensor, part: int = 0, taught: tuple[Tensor, ...] = ()
) -> dict[str, Tensor]:
    """Passes of all networks and the method's terms (float32), with graph."""
    return student_terms(training, look(training, lr, hr, part, taught))


@torch.no_grad()
def _teacher_passes(
    training: Training, shown: Tensor, wanted: dict[str, ViewInput], taught: tuple[Tensor, ...]
) -> list[list[Pass]]:
    """For every teacher its passes over the batch (from the cache, if there is one) and over the views."""
    views, taps = [view.teacher for view in wanted.values()], training.method.teacher_taps
    if not taught:
        return [passes(m.network, [shown, *views], taps) for m in training.teachers]
    return [
        [Pass(network=m.network, sr=known), *passes(m.network, views, ())]
        for m, known in zip(training.teachers, taught, strict=True)
    ]


@torch.no_grad()
def _teacher_features(
    training: Training, lr: Tensor, teachers: list[list[Pass]]
) -> Mapping[str, Tensor]:
    """The teacher's features over the batch, once for all updates; no tail if nobody reads its image."""
    if teachers:
        return teachers[0][0].taps
    (model,) = training.teachers
    assert isinstance(model.network, Network)
    return model.network.features(lr, training.method.teacher_taps)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * network, all tensors at once."""
    torch._foreach_lerp_(  # type: ignore[attr-defined]
        list(average.parameters()), list(network.parameters()), 1 - decay
    )
    for kept, fresh in zip(average.buffers(), network.buffers(), strict=True):
        kept.copy_(fresh)


class NotFiniteError(Exception):
    """A loss term became NaN or infinite at a (1-based) step."""

    def __init__(self, step: int, term: str, value: float) -> None:
        super().__init__(f"{term} = {value} at step {step}")
        self.step, self.term, self.value = step, term, value


class TermBuffer:
    """Loss terms of the last steps, kept on the device and read all at once: no wait in the step."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.values: list[Tensor] = []

    def add(self, terms: dict[str, Tensor], step: int) -> None:
        """`step` is the 1-based one of these terms; other names than before begin a new stage."""
        if self.names and self.names != tuple(terms):
            self.check(step - 1)
            self.values.clear()
        self.names = tuple(terms)
        self.values.append(torch.stack(list(terms.values())))

    def check(self, last_step: int) -> Tensor:
        """The buffered values (steps, terms) on the CPU, means over the processes.

        A value that is no number is an error, on every process.
        """
        table = torch.stack(self.values) if self.values else torch.zeros(0, len(self.names))
        ranks.average_([table])
        table = table.cpu()
        bad = (~torch.isfinite(table)).nonzero()
        if len(bad):
            row, column = (int(v) for v in bad[0])
            step = last_step - len(table) + row + 1
            raise NotFiniteError(step, self.names[column], float(table[row, column]))
        return table

    def read(self, last_step: int) -> dict[str, float]:
        """Mean of each term since the last reading; empties the buffer."""
        table = self.check(last_step)
        self.values.clear()
        return dict(zip(self.names, table.mean(0).tolist(), strict=True)) if len(table) else {}
