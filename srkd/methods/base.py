"""What a distillation method is: named, already weighted loss terms of one training step.

A method never calls backward, steps an optimiser, moves devices, logs or opens files. Its extra layers
are submodules: trained with the student, saved for resuming, dropped from the result.

Term names `pixel` and `logits` are reserved for |S(x) - y|_1 and |S(x) - T(x)|_1, so that a composition
counts them once; the config fields that weight them are `pixel_weight` and `logits_weight`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from srkd.types import Step


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

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Name -> weighted scalar in float32. The loop adds them up and logs each."""
        raise NotImplementedError


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

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for name, part in self._methods():
            for term, value in part.loss(step).items():
                if term not in self.owners:
                    terms[f"{name}.{term}"] = value
                elif self.owners[term] == name:
                    terms[term] = value
        return terms
