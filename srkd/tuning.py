"""How a training runs fastest on this machine: candidates timed on steps of the real size, and remembered.

    precision, channels_last    all combinations; precision only where the recipe leaves it to the machine ("auto")
    compile                     torch.compile, in trainings long enough to earn back the minutes that it takes
    threads                     all of the CPU, and half of them: two hardware threads of one core share its units

One group after another, each beginning with the best so far. The first to be `CLEARLY` faster is taken, so that a
disturbance changes nothing. What was found is kept in <cache>/tuning/, under everything that it depends on.
"""

from __future__ import annotations

import gc
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import srkd.ranks as ranks
from srkd.data.cache import default_cache, hash_json
from srkd.devices import pick_device, pick_precision
from srkd.errors import SrkdError
from srkd.files import read_json, write_json
from srkd.first_stage import first_stage_of, trains_first_stage
from srkd.probe import (
    data_sizes,
    disk_needs,
    middle_steps,
    peak_memory,
    state_bytes,
    step_seconds,
    whole_time,
)
from srkd.progress import StatusLine
from srkd.training import prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from srkd.recipe import Recipe

VERSION = 1  # of what is remembered; another number where a step costs something else
CLEARLY = 0.03  # share of a step's time that a candidate must save
HOPELESS = 1.5  # candidates this much slower than the best are timed once
LONG = 5_000  # iterations from which on torch.compile is tried


@dataclass(frozen=True)
class Settings:
    """The keys of [train] that decide how fast a step is. `threads` 0: as the environment says."""

    precision: str
    channels_last: bool
    compile: bool
    threads: int

    def __str__(self) -> str:
        words = [self.precision, "channels_last" if self.channels_last else "plain layout"]
        words += ["compiled"] if self.compile else []
        return ", ".join([*words, f"{self.threads} threads"] if self.threads else words)

    def flags(self) -> str:
        """The same settings for a command line without --tune."""
        values = {k: str(v).lower() for k, v in asdict(self).items()}
        return " ".join(f"--set train.{k}={v}" for k, v in values.items())


@dataclass(frozen=True)
class Found:
    """The settings to use, and for every candidate the seconds of a step, or why there are none."""

    settings: Settings
    times: dict[Settings, float | str]


def tuned(recipe: Recipe, device: str, fixed: Collection[str], *, quiet: bool = False) -> Recipe:
    """The recipe with the fastest settings of every stage. Of several processes all call it, inside their group.

    fixed   keys of the recipe that were given by hand: these stay, others of [train] are decided here
    """
    line = StatusLine(quiet=quiet or not ranks.is_first())
    if trains_first_stage(recipe):
        first = _tune(first_stage_of(recipe), device, _names(fixed, "stage1", "train"), line)
        assert recipe.stage1 is not None
        recipe = replace(recipe, stage1=replace(recipe.stage1, **asdict(first)))
    section = "stage1" if recipe.stages == "first" else "train"
    found = asdict(_tune(recipe, device, _names(fixed, section, "train"), line))
    if recipe.stages == "first" and recipe.stage1 is not None:
        recipe = replace(recipe, stage1=replace(recipe.stage1, **found))
    return replace(recipe, train=replace(recipe.train, **found))


def _names(keys: Collection[str], *sections: str) -> set[str]:
    """The settings among the keys of these sections."""
    return {f.name for f in fields(Settings) for s in sections if f"{s}.{f.name}" in keys}


def _tune(recipe: Recipe, device: str, fixed: set[str], line: StatusLine) -> Settings:
    """Remembered or measured now; said in lines either way, with an estimate of the training."""
    target = pick_device(device)
    start = _start(recipe, target)
    key = key_of(recipe, target, fixed)
    path = default_cache().expanduser() / "tuning" / f"{hash_json(key)}.json"
    what = "the first stage" if recipe.stages == "first" else recipe.student.network
    line.say(f"tuning {what} by {recipe.method.name}, batch {recipe.train.batch}, on {target}")
    record = ranks.first_says(_remembered(path))
    if record is None:
        probe = _Probe(recipe, device, line)
        found = search(start, groups(recipe, target, fixed), probe.measure)
        record = {
            "key": key,
            "settings": asdict(found.settings),
            "seconds": found.times[found.settings],
            "state_bytes": probe.states,
            "memory": peak_memory(target),
            "measured": [{**asdict(s), "seconds": t} for s, t in found.times.items()],
        }
        if ranks.is_first():
            write_json(path, record)
        line.say(f"  remembered in {path}")
    else:
        line.say(f"  measured before: {path}; delete it to measure again")
    settings = Settings(**record["settings"])
    sizes, cached = data_sizes(recipe)
    needs = disk_needs(recipe, record["state_bytes"], sizes, cached)
    line.say(f"  taken: {settings.flags()}")
    line.say(f"  time: {whole_time(recipe, record['seconds'] * recipe.train.iterations)}")
    line.say(f"  memory: {record['memory']}")
    line.say(f"  disk: {needs}")
    return settings


def _start(recipe: Recipe, device: torch.device) -> Settings:
    """What the recipe says, with numbers in place of defaults that depend on the machine."""
    t = recipe.train
    own = device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ
    threads = t.threads or (torch.get_num_threads() if own else 0)
    return Settings(pick_precision(t.precision, device)[0], t.channels_last, t.compile, threads)


def groups(
    recipe: Recipe, device: torch.device, fixed: set[str]
) -> list[Callable[[Settings], list[Settings]]]:
    """The candidates of every group around the best so far."""
    t = recipe.train

    def layouts(best: Settings) -> list[Settings]:
        kinds = ("bf16", "fp32") if t.precision == "auto" else (best.precision,)
        orders = (best.channels_last,) if "channels_last" in fixed else (True, False)
        return [replace(best, precision=k, channels_last=o) for k in kinds for o in orders]

    def compiled(best: Settings) -> list[Settings]:
        tried = "compile" not in fixed and t.iterations >= LONG
        return [replace(best, compile=True)] if tried else []

    def halved(best: Settings) -> list[Settings]:
        tried = not t.threads and device.type == "cpu" and best.threads > 1
        return [replace(best, threads=best.threads // 2)] if tried else []

    return [layouts, compiled, halved]


def search(
    start: Settings,
    around: list[Callable[[Settings], list[Settings]]],
    measure: Callable[[Settings], float | str],
) -> Found:
    """Group by group the fastest. `measure` gives the seconds of a step, or why it could not be taken.

    Everything that is not hopeless is measured twice, there and back, and the shorter time counts.
    """
    times: dict[Settings, float | str] = {start: measure(start)}
    best = start
    for group in around:
        new = [s for s in group(best) if s not in times]
        for settings in new:
            times[settings] = measure(settings)
        in_reach = HOPELESS * min(_seconds(times), default=0.0)
        for settings in [*reversed(new), *([best] if new else [])]:
            once = times[settings]
            if isinstance(once, float) and once <= in_reach:
                again = measure(settings)
                times[settings] = min(once, again) if isinstance(again, float) else once
        fastest = min(_seconds(times), default=0.0)
        reference = times[best]
        if isinstance(reference, str) or fastest < (1 - CLEARLY) * reference:
            best = next((s for s, t in times.items() if t == fastest), best)
    if isinstance(problem := times[best], str):
        raise SrkdError(f"no setting of this training could be measured: {problem}")
    return Found(best, times)


def _seconds(times: dict[Settings, float | str]) -> Iterator[float]:
    return (t for t in times.values() if isinstance(t, float))


class _Probe:
    """Measures candidates of one training; `states` are the bytes of what a run of it keeps."""

    def __init__(self, recipe: Recipe, device: str, line: StatusLine) -> None:
        self.recipe, self.device, self.line = recipe, device, line
        self.states = 0

    def measure(self, settings: Settings) -> float | str:
        """Seconds of a step, the same on every process, or why there are none."""
        try:
            found = ranks.first_says(ranks.together(lambda: self._seconds(settings)))
        except (SrkdError, RuntimeError) as error:  # out of memory, no compiler, a graph that fails
            found = str(error).strip().partition("\n")[0] or error.__class__.__name__
        finally:
            if settings.compile:
                torch.compiler.reset()
                gc.collect()  # a network with a compiled pass refers to itself
        text = f"{1000 * found:.0f} ms" if isinstance(found, float) else f"not possible: {found}"
        self.line.say(f"  {settings}: {text}")
        return found

    def _seconds(self, settings: Settings) -> float:
        train = replace(self.recipe.train, **asdict(settings))
        training = prepare(replace(self.recipe, train=train), self.device)
        stages = middle_steps(training)
        spent = sum(step_seconds(training, at) * length for at, length in stages)
        self.states = state_bytes(training)
        return spent / sum(length for _, length in stages)


def key_of(recipe: Recipe, device: torch.device, fixed: set[str]) -> dict[str, Any]:
    """Everything that the time of a step depends on, the machine first."""
    whole, t = recipe.to_dict(), recipe.train
    if device.type == "cpu":
        # Names of processors are vague where machines are virtual; what they can do is not.
        machine = dict(getattr(torch.cpu, "get_capabilities", dict)())
    else:
        machine = torch.cuda.get_device_name(device)
    return {
        "version": VERSION,
        "machine": machine,
        "threads": [torch.get_num_threads(), t.threads, os.environ.get("OMP_NUM_THREADS")],
        "processes": ranks.world(),
        "torch": torch.__version__,
        "student": whole["student"],
        "teacher": whole["teacher"],
        "method": whole["method"],
        "stages": recipe.stages,
        "patch": recipe.data.patch,
        "batch": [t.batch, t.accumulate],
        "recipe": [t.precision, t.channels_last, t.compile, t.iterations >= LONG],
        "stagewise": t.distil_iterations / t.iterations,
        "fixed": sorted(fixed),
    }


def _remembered(path: Path) -> dict[str, Any] | None:
    """None when nothing was measured yet, or what is written is damaged: then it is measured again."""
    if not ranks.is_first() or not path.is_file():
        return None
    try:
        record = read_json(path)
        Settings(**record["settings"])
        whole = [record["seconds"] > 0, record["state_bytes"] > 0, "memory" in record]
    except (SrkdError, KeyError, TypeError):
        return None
    return record if all(whole) else None
