"""The rows of a comparison: runs that differ only in the seed, their means, spreads and gains."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from shlex import quote
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from srkd.finished import FinishedRun


def command_of(run: FinishedRun) -> str:
    """Trains a run again; its recipe.toml has every value resolved."""
    folder = quote(str(run.folder))
    return f"python scripts/distill.py {folder}/recipe.toml --out {folder}-again"


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of `n` values; no deviation with one value."""

    mean: float
    sd: float | None
    n: int

    @property
    def covers_zero(self) -> bool | None:
        """Whether the mean is no further from zero than the deviation; None with one value: nobody knows."""
        return None if self.sd is None else abs(self.mean) <= self.sd


def spread(values: Iterable[float]) -> Spread:
    values = list(values)
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Gain:
    """PSNR-Y differences to scratch in dB: seed -> set -> difference."""

    differences: dict[int, dict[str, float]]

    def over(self, sets: Iterable[str] | None = None) -> Spread:
        """Over seeds, of the mean over `sets` (None: all)."""
        names = None if sets is None else set(sets)
        return spread(
            fmean(v for s, v in by_set.items() if names is None or s in names)
            for by_set in self.differences.values()
        )

    @property
    def within_spread(self) -> bool | None:
        """Whether the gain is no larger than its spread; None with one seed."""
        return self.over().covers_zero


@dataclass(frozen=True)
class Row:
    """Runs that differ only in the seed.

    label     the method, with what distinguishes it from other rows of this method and pair
    series    unique within a student and scale: the label, with the teacher where there are several
    seeds     seed -> set -> {"psnr_y", "ssim_y"}; equal seeds are averaged, so that each counts once
    cost      time of a step relative to the baseline method's
    latency_ms  of the network on a picture of 256x256 LR pixels, where that was measured
    """

    method: str
    label: str
    series: str
    student: str
    scale: int
    teacher: str
    parameters: int
    macs_g: float
    runs: tuple[FinishedRun, ...]
    seeds: dict[int, dict[str, dict[str, float]]]
    steps_per_s: float | None
    gain: Gain | None = None
    cost: float | None = None
    latency_ms: float | None = None

    @property
    def pair(self) -> tuple[str, int]:
        return self.student, self.scale

    @property
    def sets(self) -> tuple[str, ...]:
        return tuple(self.runs[0].scores)

    def score(self, name: str, metric: str) -> Spread:
        """Of one set, over the seeds."""
        return spread(by_set[name][metric] for by_set in self.seeds.values())

    def quality(self) -> Spread:
        """PSNR-Y in dB, mean over the sets, over the seeds."""
        return spread(fmean(s["psnr_y"] for s in sets.values()) for sets in self.seeds.values())

    def curve(self) -> list[tuple[int, float]]:
        """(step, PSNR-Y) at the steps where every run was validated, mean over the runs."""
        common = set.intersection(*(set(run.curve) for run in self.runs))
        return [(step, fmean(run.curve[step] for run in self.runs)) for step in sorted(common)]

    def to_dict(self) -> dict[str, Any]:
        gain = None
        if self.gain is not None:
            gain = {
                **asdict(self.gain.over()),
                "within_spread": self.gain.within_spread,
                "by_set": {s: asdict(self.gain.over([s])) for s in self.sets},
                "by_seed": self.gain.differences,
            }
        return {
            "method": self.method,
            "label": self.label,
            "method_config": {p: asdict(c) for p, c in self.runs[0].recipe.method.configs.items()},
            "student": self.student,
            "scale": self.scale,
            "teachers": [{"name": n, "weights_sha256": h} for n, h in self.runs[0].teachers],
            "parameters": self.parameters,
            "macs_g": self.macs_g,
            "scores": {
                s: {metric: asdict(self.score(s, metric)) for metric in ("psnr_y", "ssim_y")}
                for s in self.sets
            },
            "by_seed": self.seeds,
            "gain": gain,
            "steps_per_s": self.steps_per_s,
            "relative_cost": self.cost,
            "latency_ms": self.latency_ms,
            "curve": self.curve(),
            "runs": [{**run.to_dict(), "command": command_of(run)} for run in self.runs],
        }
