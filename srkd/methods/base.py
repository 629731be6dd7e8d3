"""What a distillation method is: named, already weighted loss terms of one training step.

A method never calls backward, steps an optimiser, moves devices, logs or opens files. Its extra layers
are submodules: trained with the student, saved for resuming, dropped from the result.

Term names `pixel` and `logits` are reserved for |S(x) - y|_1 and |S(x) - T(x)|_1, so that a composition
counts them once; the config fields that weight them are `pixel_weight` and `logits_weight`.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from srkd.bilevel import BilevelPlan
    from srkd.types import Batch, Pass, Setting, Step, ViewInput


def choice(default: str, *others: str) -> Any:
    """A config field that takes one of these words; any other is refused with the nearest."""
    return field(default=default, metadata={"choices": (default, *others)})


def file_option() -> Any:
    """A config field that names a file, "" for none: made absolute, so that a run resumes from anywhere."""
    return field(default="", metadata={"file": True})


class Method(nn.Module):
    """Base of every method. Subclasses set `Config` and write `loss`."""

    Config: ClassVar[type]

    def __init__(self, config: Any, student: nn.Module, teachers: tuple[nn.Module, ...]) -> None:
        """`student` and `teachers` are for reading sizes only: keep no reference to them.

        A network stored as an attribute would become a submodule, be trained and be saved.
        """
        super().__init__()
        self.config = config

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Features of the student that `loss` reads (names of `Network.tap_names`)."""
        return ()

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """Features of the teacher that `loss` reads."""
        return ()

    @property
    def needs_teacher_pass(self) -> bool:
        """False when the step's teacher passes would not be read (a weight of 0, say)."""
        return True

    @property
    def bilevel(self) -> BilevelPlan | None:
        """How the method's own bilevel step runs before the step of the loop; None: it has none."""
        return None

    @property
    def bilevel_part(self) -> tuple[str, Any] | None:
        """Name and method of the part that has a bilevel step."""
        return None

    @property
    def files(self) -> tuple[str, ...]:
        """Files the method reads; a resumed run must find their contents unchanged."""
        return ()

    def check(self, setting: Setting) -> tuple[str, ...]:
        """Refuse what cannot work (`SrkdError`) and return what the user should know beforehand."""
        return ()

    def start(self, student: nn.Module, teachers: tuple[nn.Module, ...]) -> None:
        """Set the student's first weights, where a paper asks for it; not called with `student.weights`."""

    def views(self, batch: Batch) -> dict[str, ViewInput]:
        """More images that the networks shall see; their passes come back as `step.views`.

        The loop runs images of one size in one pass, the batch's included.
        """
        return {}

    def student_input(self, batch: Batch, teachers: tuple[Pass, ...]) -> Tensor:
        """What the student sees of the batch; other than LR where it works on the teachers' outputs."""
        return batch.lr

    def teacher_input(self, batch: Batch) -> Tensor:
        """What the teachers see of the batch; other than LR where the paper's teacher is shown more."""
        return batch.lr

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Name -> weighted scalar in float32, the same names in every step. The loop adds and logs them."""
        raise NotImplementedError


def response_terms(config: Any, step: Step) -> dict[str, Tensor]:
    """The reserved terms that most methods add their own to, at the config's weights.

    pixel = w |S(x) - y|_1 and logits = w |S(x) - T(x)|_1; a weight of 0 leaves the logits term out.
    """
    terms = {"pixel": config.pixel_weight * l1(step.student.sr, step.hr)}
    if config.logits_weight:
        terms["logits"] = config.logits_weight * l1(step.student.sr, step.teacher.sr.detach())
    return terms


def network_scale(network: nn.Module) -> int:
    """The student's scale; 4, the largest, for a stand-in that does not say."""
    scale = getattr(network, "scale", 4)
    return scale if isinstance(scale, int) else 4


def zero(step: Step) -> Tensor:
    """A term that is off in this step."""
    return torch.zeros((), device=step.lr.device)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute error over all elements, in float32 whatever the inputs are."""
    return (a.float() - b.float()).abs().mean()


class Composed(Method):
    """Sum of several methods over one set of passes: `dukd+mipkd`.

    `owners` maps each reserved term to the part it is taken from; every other term carries its
    method's name in front.
    """

    Config = dict

    def __init__(self, parts: dict[str, Method], owners: dict[str, str]) -> None:
        super().__init__({}, nn.Module(), ())
        self.parts = nn.ModuleDict(parts)
        self.owners = owners

    def _methods(self) -> list[tuple[str, Method]]:
        return [(n, p) for n, p in self.parts.items() if isinstance(p, Method)]

    @property
    def student_taps(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(t for _, p in self._methods() for t in p.student_taps))

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(t for _, p in self._methods() for t in p.teacher_taps))

    @property
    def needs_teacher_pass(self) -> bool:
        return any(p.needs_teacher_pass for _, p in self._methods())

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(f for _, p in self._methods() for f in p.files))

    @property
    def bilevel_part(self) -> tuple[str, Any] | None:
        return next(((n, p) for n, p in self._methods() if p.bilevel is not None), None)

    def check(self, setting: Setting) -> tuple[str, ...]:
        return tuple(f"{n}: {note}" for n, p in self._methods() for note in p.check(setting))

    def start(self, student: nn.Module, teachers: tuple[nn.Module, ...]) -> None:
        for _, part in self._methods():
            part.start(student, teachers)

    def teacher_input(self, batch: Batch) -> Tensor:
        # A method whose teacher sees other images than LR is no part of a composition.
        return self._methods()[0][1].teacher_input(batch)

    def views(self, batch: Batch) -> dict[str, ViewInput]:
        return {
            f"{name}.{view}": wanted
            for name, part in self._methods()
            for view, wanted in part.views(batch).items()
        }

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for name, part in self._methods():
            own = {
                view.removeprefix(f"{name}."): passes
                for view, passes in step.views.items()
                if view.startswith(f"{name}.")
            }
            for term, value in part.loss(replace(step, views=own)).items():
                if term not in self.owners:
                    terms[f"{name}.{term}"] = value
                elif self.owners[term] == name:
                    terms[term] = value
        return terms
