"""The one training loop: recipe in, run folder out.

Nothing in the step waits for the device: loss terms go into a buffer that is read every `log_every`
steps. What a step is, and why a resumed run is exact, stands in `srkd.training`.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import srkd.ranks as ranks
from srkd.data.resident import ResidentSampler, placed
from srkd.data.sampling import Prefetcher
from srkd.data.sets import given_hr
from srkd.errors import CheckFailedError, SrkdError
from srkd.evaluate import SetScore, score
from srkd.files import write_text
from srkd.first_stage import FOLDER as FIRST_STAGE
from srkd.first_stage import first_stage_of, kind_of, trains_first_stage
from srkd.inputs import Inputs, open_inputs
from srkd.methods import plan
from srkd.metrics import PAPER_Y
from srkd.progress import StatusLine, TrainingLine, counter
from srkd.recipe import TeacherConfig, load_recipe
from srkd.report import below_best, markdown_table, samples, write_first_report, write_report
from srkd.resuming import check_same_recipe, restore, state_of
from srkd.runs import Run, Silence
from srkd.step import NotFiniteError, TermBuffer, train_step
from srkd.taught import StoppedError, with_cached_teachers
from srkd.training import Training, describe, learning_rate_at, memory_advice, prepare

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from srkd.recipe import Recipe

Scores = dict[str, dict[str, float]]  # set -> {"psnr_y": dB, "ssim_y": .}
INTERRUPTED_HINT = "interrupted; continue with: python scripts/distill.py --resume {folder}"


@dataclass(frozen=True)
class Result:
    """What `distill` returns. `rows` are the lines of the report's table, see `srkd.report`."""

    folder: Path
    scores: Scores
    rows: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "interrupted": self.interrupted,
            "scores": self.scores,
            "table": self.rows,
        }


def distill(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
) -> Result:
    """Train a recipe into the run folder `out`, and its baseline beside it when asked for.

    Under torchrun every process calls this; the first one writes and its result has the rows.
    """
    out = Path(out)

    def check() -> None:
        if ranks.is_first():
            Run.check(out, overwrite=overwrite)  # before anything takes long
            _check_not_read(recipe, out)

    with ranks.group(device):
        quiet = quiet or not ranks.is_first()
        ranks.together(check)
        training, inputs = _open(recipe, device, quiet)
        run = Run.shared(lambda: Run.create(out, training.recipe, overwrite=overwrite))
        return _finish(run, training, inputs, device, quiet)


def resume(folder: str | Path, *, device: str = "auto", quiet: bool = False) -> Result:
    """Continue a run folder exactly where its newest state stands."""
    with ranks.group(device):
        quiet = quiet or not ranks.is_first()
        run = Run.shared(lambda: Run.open(Path(folder)))
        try:
            training, inputs = _open(run.recipe, device, quiet)
        except BaseException:
            run.close()
            raise
        return _finish(run, training, inputs, device, quiet)


def _check_not_read(recipe: Recipe, out: Path) -> None:
    """Refuse a folder that holds what the run itself reads: making the run would delete it."""
    reused = recipe.stage1.run if recipe.stage1 is not None else ""
    folder = out.resolve()
    for spec in (*recipe.teacher.models, recipe.student.weights, reused):
        used = Path(os.path.expandvars(spec)).resolve()
        if spec and (used == folder or folder in used.parents):
            raise SrkdError(
                f"this run reads {spec}, which lies in --out {out} and would be replaced; choose another --out."
            )


def _open(recipe: Recipe, device: str, quiet: bool) -> tuple[Training, Inputs]:
    """Everything of the run, opened and checked; a first stage is trained later."""
    training = ranks.together(lambda: prepare(recipe, device))
    for note in training.notes:
        StatusLine(quiet=quiet).say(note)
    least = training.upscaler.facts.minimum_px
    inputs = open_inputs(training.recipe, least, counter("decoding training images", quiet=quiet))
    if trains_first_stage(training.recipe):
        first = first_stage_of(training.recipe)
        prepare(first, device)
        inputs.crops_for(first)
    return training, inputs


def baseline_of(recipe: Recipe) -> Recipe:
    """The same student, start, data and steps on HR without a teacher."""
    train = replace(recipe.train, iterations=recipe.steps_on_hr, distil_iterations=0)
    return replace(
        recipe,
        train=train,
        method=plan("scratch", {}),
        teacher=TeacherConfig(),
        with_baseline=False,
        stage1=None,
    )


def _finish(run: Run, training: Training, inputs: Inputs, device: str, quiet: bool) -> Result:
    """Train what is left of the run: first stage, student, baseline; then write the report."""
    try:
        with Interrupt(quiet) as interrupt:
            if trains_first_stage(training.recipe):
                recipe = training.recipe
                del training  # its teachers, which the first stage loads too
                if not _train_first_stage(run, recipe, inputs, device, interrupt, quiet):
                    return Result(run.folder, {}, interrupted=True)
                training = prepare(recipe, device, run.folder / FIRST_STAGE)
            scores, done = _train(run, training, inputs, interrupt, quiet)
            baseline = None
            if not ranks.any_says(interrupt.asked) and run.recipe.with_baseline and done:
                baseline = run.folder / "baseline"
                recipe = baseline_of(training.recipe)
                done = _train_baseline(baseline, recipe, inputs, device, interrupt, quiet)
        if not done or (run.recipe.with_baseline and baseline is None):
            return Result(run.folder, scores, interrupted=True)
        if not ranks.is_first():
            rows = []
        elif training.recipe.stages == "first":
            rows = write_first_report(run, inputs.sets, training.device)
        else:
            rows = write_report(run, training.teachers, inputs.sets, scores, baseline)
        return Result(run.folder, scores, rows)
    finally:
        run.close()


def _train_first_stage(
    run: Run, recipe: Recipe, inputs: Inputs, device: str, interrupt: Interrupt, quiet: bool
) -> bool:
    """Train or continue the first stage as a run inside the run; returns whether to go on."""
    folder, first = run.folder / FIRST_STAGE, first_stage_of(recipe)
    line = StatusLine(quiet=quiet)

    def again() -> bool:
        """Check a folder that is there already; whether its stage is complete."""
        if not (folder / "recipe.toml").is_file() or not ranks.is_first():
            return False
        check_same_recipe(load_recipe(folder / "recipe.toml"), first, run.folder)
        # Paths may have changed, and the folder is a MODEL that finds its teachers by them.
        write_text(folder / "recipe.toml", first.to_toml())
        return (folder / "report.md").is_file()

    if ranks.first_says(ranks.together(again)):
        line.say(f"first stage: {folder} is complete")
        return True
    line.say(f"first stage: {kind_of(recipe).summary(recipe)}, in {folder}")
    own = _inner_run(folder, first)
    try:
        training = prepare(first, device)
        done = _train(own, training, inputs.crops_for(training.recipe), interrupt, quiet)[1]
        if done and ranks.is_first():
            rows = write_first_report(own, inputs.sets, training.device)
            line.say(markdown_table(rows) + below_best(rows))
    finally:
        own.close()
    return not ranks.any_says(interrupt.asked) and done


def _inner_run(folder: Path, recipe: Recipe) -> Run:
    """A run inside the run, new or continued."""
    return Run.shared(
        lambda: (
            Run.open(folder) if (folder / "recipe.toml").is_file() else Run.create(folder, recipe)
        )
    )


def _train_baseline(
    folder: Path, recipe: Recipe, inputs: Inputs, device: str, interrupt: Interrupt, quiet: bool
) -> bool:
    """Train or continue the baseline; returns whether it is complete."""
    run = _inner_run(folder, recipe)
    try:
        return _train(run, prepare(recipe, device), inputs, interrupt, quiet)[1]
    finally:
        run.close()


def _train(
    run: Run, training: Training, inputs: Inputs, interrupt: Interrupt, quiet: bool
) -> tuple[Scores, bool]:
    """Run the steps that are left; returns the final scores and whether the run is complete."""
    with torch.random.fork_rng(devices=[] if training.device.type == "cpu" else None):
        # What a network draws in training (stochastic depth) depends on the seed and the step alone.
        torch.manual_seed(training.recipe.seed)
        state = ranks.first_says(ranks.together(run.load_state))
        if state is not None:
            ranks.together(lambda: restore(training, inputs, state, run.folder))
        ranks.copy_from_first(
            [*training.student.state_dict().values(), *training.method.state_dict().values()]
        )

        def cached() -> Inputs | None:
            try:
                return with_cached_teachers(training, inputs, lambda: interrupt.asked, quiet=quiet)
            except StoppedError:
                return None

        taught = ranks.in_turn(cached)
        if ranks.any_says(taught is None) or taught is None:
            return {}, False
        return _steps(run, training, taught, interrupt, quiet)


def _steps(
    run: Run, training: Training, inputs: Inputs, interrupt: Interrupt, quiet: bool
) -> tuple[Scores, bool]:
    t, train = training, training.recipe.train
    run.rewind_log(t.done)
    every = t.recipe.validate.every
    scores: Scores = {}
    buffer = TermBuffer()
    stage = ", first stage," if t.recipe.stages == "first" else ""
    line = TrainingLine(t.recipe.method.name + stage, train.iterations, quiet=quiet)
    sampler, where = placed(inputs.sampler, t.device, t.recipe.data.place)
    if where:
        line.say(f"images: {where}")
    pin = t.device.type == "cuda" and not isinstance(sampler, ResidentSampler)
    try:
        with (
            memory_advice(t.recipe),
            run.tensorboard(t.done) as writer,
            line,
            Prefetcher(sampler, t.done, train.iterations, pin=pin) as batches,
        ):
            clock = Clock(t, batches)
            for _, crops in batches:
                terms = train_step(t, *crops)
                buffer.add(terms, t.done)
                # Read once: a signal that comes later in this round is for the next one.
                stop = ranks.any_says(interrupt.asked)
                last = t.done == train.iterations or stop
                if t.done % train.log_every == 0 or last:
                    _log(t, run, buffer.read(t.done), clock, writer, line)
                validate = t.done == train.iterations or (every and t.done % every == 0)
                save = t.done % train.save_every == 0 or last
                if validate or save:
                    with clock.paused():
                        check_finite(t, buffer)
                        if validate:
                            scores = _validate(t, inputs, run, writer, line)
                        if save:
                            run.save_state(state_of(t, inputs), best=t.best_step == t.done)
                if stop and t.done < train.iterations:
                    return scores, False
    except NotFiniteError as bad:  # on every process at once: terms are means over all
        raise (_explain(bad, run) if ranks.is_first() else ranks.SaidElsewhereError(1)) from bad
    if not scores:  # the run was complete when it was resumed
        scores = _scores(t, inputs)
    if ranks.is_first():
        t.save(run.folder, describe(t, inputs, scores))
    return scores, True


def _log(
    t: Training,
    run: Run,
    terms: dict[str, float],
    clock: Clock,
    writer: SummaryWriter | Silence,
    line: TrainingLine,
) -> None:
    rate = learning_rate_at(t.recipe.train, t.done - 1)
    speed, wait = clock.lap()
    facts = {"step": t.done, "learning_rate": rate, "steps_per_s": speed, "data_wait": wait}
    run.log({**facts, "terms": terms})
    for name, value in terms.items():
        writer.add_scalar(f"loss/{name}", value, t.done)
    writer.add_scalar("train/learning_rate", rate, t.done)
    writer.add_scalar("train/steps_per_s", speed, t.done)
    writer.add_scalar("train/data_wait", wait, t.done)
    line.update(t.done, terms, speed, wait)


def _scores(t: Training, inputs: Inputs) -> Scores:
    """PSNR-Y and SSIM-Y of the network that will be kept, on every validation set; images are shared out."""
    scores: Scores = {}
    upscaler = t.upscaler
    for evaluation_set in map(given_hr, inputs.sets) if t.given_hr else inputs.sets:
        own = evaluation_set.readers[ranks.rank() :: ranks.world()]
        part = replace(evaluation_set, readers=own)
        # With more processes than images some have none.
        images = ranks.together(lambda part=part: score(upscaler, part).images if len(part) else ())
        gathered = ranks.gathered(images)
        result = SetScore(
            evaluation_set.name,
            evaluation_set.scale,
            evaluation_set.lr_origin,
            PAPER_Y,
            tuple(gathered),
        )
        scores[evaluation_set.name] = {"psnr_y": result.psnr, "ssim_y": result.ssim}
    return scores


def _validate(
    t: Training, inputs: Inputs, run: Run, writer: SummaryWriter | Silence, line: TrainingLine
) -> Scores:
    """Score the network, remember the best, keep pictures. What fails here loses no training."""
    try:
        scores = _scores(t, inputs)
    except BaseException:
        run.save_state(state_of(t, inputs))
        raise
    for name, values in scores.items():
        for metric, value in values.items():
            writer.add_scalar(f"{name}/{metric}", value, t.done)
    run.log({"step": t.done, "scores": scores})
    if scores:
        psnr = sum(s["psnr_y"] for s in scores.values()) / len(scores)
        if psnr > t.best_psnr:
            t.best_psnr, t.best_step = psnr, t.done
            if t.done % t.recipe.train.save_every and t.done < t.recipe.train.iterations:
                run.save_state(state_of(t, inputs), best=True)
        line.validated(psnr, t.best_psnr)
        line.say(
            f"step {t.done}{', of the HR image' if t.given_hr else ''}: "
            + " · ".join(f"{n} {s['psnr_y']:.2f} / {s['ssim_y']:.4f}" for n, s in scores.items())
        )
        if ranks.is_first() and not t.given_hr:
            samples(run.folder / "samples", t.upscaler, inputs.sets[0], t.done)
    return scores


def check_finite(t: Training, buffer: TermBuffer) -> None:
    """No validation and no state of a network that has broken."""
    buffer.check(t.done)
    finite = torch.stack([torch.isfinite(p).all() for p in t.student.parameters()])
    if not bool(finite.all()):
        raise NotFiniteError(t.done, "a weight of the student", float("nan"))


def _explain(bad: NotFiniteError, run: Run) -> CheckFailedError:
    states = run.states()
    good = f"the last good state is {states[-1]}" if states else "no state was saved before it"
    return CheckFailedError(
        f"training stopped: {bad.term} became {bad.value} at step {bad.step}; {good}. Lower the learning "
        "rate (--set train.learning_rate=...) or use --precision fp32 in a new run."
    )


class Interrupt:
    """Ctrl-C and SIGTERM ask for a stop after the current step; a second Ctrl-C stops at once."""

    def __init__(self, quiet: bool = False) -> None:
        self.asked, self.quiet = False, quiet
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._ask)
        except ValueError:
            pass  # signals belong to the main thread; elsewhere they are the caller's business
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        StatusLine(quiet=self.quiet).say(
            "\nstopping after this step or image; Ctrl-C again stops at once"
        )


class Clock:
    """Steps per second and share of time spent waiting for data since the last lap."""

    def __init__(self, training: Training, batches: Prefetcher) -> None:
        self.training, self.batches = training, batches
        self._start()

    def _start(self) -> None:
        self._t0 = time.perf_counter()
        self._step = self.training.done
        self._waited = self.batches.waited_s
        self._paused = 0.0

    def lap(self) -> tuple[float, float]:
        """(steps per second, waiting share in 0..1); validation and saving do not count."""
        seconds = max(time.perf_counter() - self._t0 - self._paused, 1e-9)
        self.training.seconds += seconds
        speed = (self.training.done - self._step) / seconds
        wait = (self.batches.waited_s - self._waited) / seconds
        self._start()
        return speed, wait

    def paused(self) -> _Pause:
        return _Pause(self)

    def skip(self, seconds: float) -> None:
        self._paused += seconds


class _Pause:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock.skip(time.perf_counter() - self.start)
