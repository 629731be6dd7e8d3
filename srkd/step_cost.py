"""What a training step costs, from a record of benchmarks/method_cost.py."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from srkd.errors import SrkdError
from srkd.files import read_json
from srkd.methods import plan

if TYPE_CHECKING:
    from pathlib import Path

    from srkd.finished import FinishedRun


@dataclass(frozen=True)
class CostRecord:
    """Method -> time of a step relative to logits; `pair` is "teacher -> student xS", "" if not named."""

    ratios: dict[str, float]
    pair: str

    def of(self, run: FinishedRun, baseline: str) -> float | None:
        """None for a method, a pair or options of a method that were not measured."""
        teacher, _, student = self.pair.rpartition(" -> ")
        name, scale = run.student
        taught_by = " + ".join(name.removesuffix(f"_x{scale}") for name, _ in run.teachers)
        other = self.pair and (student != f"{name} x{scale}" or taught_by not in ("", teacher))
        method = run.recipe.method.name
        if other or method not in self.ratios or _has_options(run):
            return None
        return self.ratios[method] / self.ratios[baseline]


def _has_options(run: FinishedRun) -> bool:
    """Whether a switch of the method is not at its default; a weight above 0 costs what another does."""
    chosen = run.recipe.method
    usual = plan(chosen.name, {}).configs
    return any(
        (old := getattr(usual[part], f.name)) != (new := getattr(config, f.name))
        and not (isinstance(new, float) and old and new)
        for part, config in chosen.configs.items()
        for f in fields(config)
        if not f.metadata.get("file")
    )


def read_cost(path: Path) -> CostRecord:
    """A record of benchmarks/method_cost.py. Its ratios are of means: a method may vary by step."""
    record = read_json(path)
    try:
        ratios = {str(method): float(row["ratio"]) for method, row in record["rows"].items()}
        if not ratios or min(ratios.values()) <= 0:
            raise ValueError("no ratio, or one that is not positive")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SrkdError(
            f"{path} is no record of method costs ({error!r}): it needs rows of method -> ratio; "
            "make it with benchmarks/method_cost.py."
        ) from error
    return CostRecord(ratios, str(record.get("pair", "")))
