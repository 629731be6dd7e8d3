"""Compare finished runs: quality, size and cost of methods, seed by seed, and against the papers.

Runs that differ only in the seed make one row. Runs of another budget (steps on HR, data, learning rate,
validation sets, ...) stand in another table, because their difference is not the method's. What a stage
without HR had on top is said.

    gain    mean over the seeds that both have of (PSNR-Y of the method - PSNR-Y of scratch), where scratch
            is the same student with the same budget and without teacher; averaged over the sets
    spread  sample standard deviation over the seeds, none with one seed. A gain that is not larger than
            its spread is marked: the seed alone could have made it.
    cost    time of a training step relative to one method on the same student and teacher
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from srkd.compare_rows import Gain, Row, Spread
from srkd.errors import CheckFailedError, SrkdError, nearest
from srkd.files import plain
from srkd.finished import HR_STEPS
from srkd.methods import METHODS, file_options
from srkd.papers import ABOUT, ARXIV, paper_gains, sets_for
from srkd.step_cost import CostRecord, read_cost

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from srkd.finished import Finding, FinishedRun
    from srkd.papers import PaperGain
    from srkd.recipe import Recipe

COST_SIZE = (256, 256)  # LR pixels (h, w) at which multiply-adds are counted, as in the papers
USUAL_BASELINE = "logits"


@dataclass(frozen=True)
class Table:
    """Rows of one budget; `differences` are lines `key: first table's -> this one's`."""

    title: str
    budget: dict[str, Any]
    differences: list[str]
    sets: tuple[str, ...]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PaperRow:
    """Our gains with a method at a scale, over `sets`, beside those of the papers over `paper_sets`.

    The two differ only where no run was validated on a set of the papers. `ours` is by student (and
    budget and options, where those differ).
    """

    method: str
    scale: int
    sets: tuple[str, ...]
    ours: dict[str, Spread]
    paper_sets: tuple[str, ...]
    papers: list[PaperGain]


@dataclass(frozen=True)
class Speed:
    """Median time in ms of one 256x256 LR picture by (student, scale), measured side by side.

    `note` says where and how, or why nothing was measured.
    """

    ms: dict[tuple[str, int], float]
    note: str


@dataclass(frozen=True)
class Comparison:
    """`about` are lines below the title; the notes say where costs and times come from."""

    tables: list[Table]
    papers: list[PaperRow]
    baseline: str
    cost_note: str
    finding: Finding
    speed_note: str = ""
    title: str = "Comparison of runs"
    about: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        tables = [
            {
                "title": t.title,
                "budget": t.budget,
                "differs_from_first": t.differences,
                "rows": [row.to_dict() for row in t.rows],
                "notes": t.notes,
            }
            for t in self.tables
        ]
        papers = [
            {
                "method": p.method,
                "scale": p.scale,
                "sets": p.sets,
                "gains": {name: asdict(gain) for name, gain in p.ours.items()},
                "paper_sets": p.paper_sets,
                "papers": [{**asdict(g), "arxiv": ARXIV[g.paper]} for g in p.papers],
            }
            for p in self.papers
        ]
        document = {
            "tables": tables,
            "papers": {"about": ABOUT, "rows": papers},
            "multiply_adds": {"rule": "fvcore", "lr_size": COST_SIZE},
            "cost": {"baseline": self.baseline, "note": self.cost_note},
            "latency": {"lr_size": COST_SIZE, "note": self.speed_note},
            "skipped": self.finding.skipped,
            "failed": self.finding.failed,
        }
        return plain(document)


def compare(
    finding: Finding,
    *,
    baseline: str | None = None,
    cost: Path | None = None,
    speed: Speed | None = None,
) -> Comparison:
    """Group the runs, compute gains and costs; `baseline` is the method that costs 1."""
    if not finding.runs:
        reasons = [f"{f}: {why}" for f, why in (finding.skipped | finding.failed).items()]
        found = (
            f"no run that can be compared ({'; '.join(reasons)})" if reasons else "no run folder"
        )
        kind = CheckFailedError if finding.failed else SrkdError
        raise kind(f"there is {found}; give folders that scripts/distill.py has finished.")
    measured = read_cost(cost) if cost is not None else None
    chosen = baseline or USUAL_BASELINE
    known = (
        {run.recipe.method.name for run in finding.runs} if measured is None else {*measured.ratios}
    )
    # A default may be missing, a wish may not.
    if chosen not in known and (baseline is not None or measured is not None):
        where = "in these runs" if measured is None else f"in {cost}"
        raise SrkdError(
            f"there is no method '{chosen}' {where} (--baseline); {nearest(chosen, [*known])}"
        )
    groups: dict[str, list[FinishedRun]] = {}
    for run in finding.runs:
        groups.setdefault(repr(sorted(run.budget.items())), []).append(run)
    macs = _multiply_adds(finding.runs)
    tables: list[Table] = []
    for runs in groups.values():
        first = tables[0].budget if tables else runs[0].budget
        tables.append(_table(runs, first, macs, chosen, measured))
    if measured is None:
        note = (
            "Cost per step is from the steps per second in the logs: runs measured at different times, "
            "or on a shared machine, give only a hint. Measure it with benchmarks/method_cost.py and "
            "give its record as --cost."
        )
    else:
        pair = f" of {measured.pair}" if measured.pair else ""
        note = f"Cost per step is from the interleaved measurement{pair} in {cost}."
    if speed is not None:
        tables = [_timed(table, speed) for table in tables]
    speed_note = "" if speed is None else speed.note
    return Comparison(tables, _beside_papers(tables), chosen, note, finding, speed_note)


def _timed(table: Table, speed: Speed) -> Table:
    return replace(
        table, rows=[replace(row, latency_ms=speed.ms.get(row.pair)) for row in table.rows]
    )


def _settings(run: FinishedRun) -> dict[str, Any]:
    """The method's options but for paths of files, which differ between machines; a first stage's budget."""
    recipe = run.recipe
    configs = dict(recipe.method.configs)
    for part, key in file_options(recipe.method):
        configs[part] = replace(configs[part], **{key: ""})
    if recipe.stage1 is not None and not recipe.stage1.run:
        configs["stage1"] = replace(recipe.stage1, log_every=1, save_every=1)
    return configs | _ways(recipe)


def _ways(recipe: Recipe) -> dict[str, Any]:
    """Settings beside the method's options that make another row, not another budget."""
    stage = recipe.train.distil_iterations
    return {"teacher.cache": recipe.teacher.cache, "train.distil_iterations": stage}


def _multiply_adds(runs: Sequence[FinishedRun]) -> dict[str, float]:
    """Network -> multiply-adds in G at 256x256; each network is counted once."""
    from srkd.cost import cost
    from srkd.networks import build_family

    networks = {_network(run): run for run in runs}
    return {
        key: cost(build_family(run.family, run.arguments), COST_SIZE).macs_g
        for key, run in networks.items()
    }


def _network(run: FinishedRun) -> str:
    return repr((run.family, sorted(run.arguments.items())))


# -- tables -------------------------------------------------------------------------------------


def _table(
    runs: list[FinishedRun],
    first: dict[str, Any],
    macs: dict[str, float],
    baseline: str,
    measured: CostRecord | None,
) -> Table:
    """One table from runs of one budget."""
    groups: dict[tuple[Any, ...], list[FinishedRun]] = {}
    for run in runs:
        key = (run.student, run.teachers, run.recipe.method.name, repr(_settings(run)))
        groups.setdefault(key, []).append(run)
    rows = _labelled([_row(group, macs) for group in groups.values()])
    notes: list[str] = []
    rows = [replace(row, gain=_gain(row, rows, notes)) for row in rows]
    costs = [_cost(row, rows, baseline, measured) for row in rows]
    if all(value is None for value in costs):
        notes.append(f"No cost relative to {baseline}: it was not measured on these pairs.")
    rows = [replace(row, cost=value) for row, value in zip(rows, costs, strict=True)]
    notes += _first_stages(rows)
    budget = runs[0].budget
    differences = [
        f"{key}: {_shown(first[key])} -> {_shown(budget[key])}"
        for key in budget
        if budget[key] != first[key]
    ]
    sets = rows[0].sets
    notes = list(dict.fromkeys(notes))
    return Table(_title(runs[0]), budget, differences, sets, sorted(rows, key=_order), notes)


def _first_stages(rows: Sequence[Row]) -> list[str]:
    """What a method with a first stage had besides the budget that the table names."""
    notes = []
    for row in rows:
        recipe = row.runs[0].recipe
        stage1, distil = recipe.stage1, recipe.train.distil_iterations
        if distil:
            alone = recipe.steps_on_hr < recipe.train.iterations
            notes.append(
                f"{row.series}: {distil:,} iterations on features alone come on top of this budget."
                if alone
                else f"{row.series}: {distil:,} of its steps on HR lie between steps on features."
            )
        if stage1 is None:
            continue
        notes.append(
            f"{row.series}: one first stage, trained beforehand, serves all its seeds, so their spread holds none "
            "of its own; its iterations come on top of this budget."
            if stage1.run
            else f"{row.series}: its first stage ({stage1.iterations:,} iterations) comes on top of this budget."
        )
    return notes


def _title(run: FinishedRun) -> str:
    b = run.budget
    return (
        f"{b[HR_STEPS]:,} {HR_STEPS}, batch {b['train.batch']}, LR patch {b['data.patch']}, "
        f"{run.data}, learning rate {b['train.learning_rate']:g} {b['train.schedule']}, "
        f"{b['train.precision']}"
    )


def _shown(value: Any) -> str:
    """A value in a line for people: hashes shortened."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text[:12]}..." if len(text) == 64 else text or "none"


def _row(runs: list[FinishedRun], macs: dict[str, float]) -> Row:
    run = runs[0]
    by_seed: dict[int, list[FinishedRun]] = {}
    for each in sorted(runs, key=lambda r: r.recipe.seed):
        by_seed.setdefault(each.recipe.seed, []).append(each)
    # Sets in the order of the recipe, which is that of the first run's scores.
    seeds = {
        seed: {
            name: {m: fmean(r.scores[name][m] for r in same) for m in ("psnr_y", "ssim_y")}
            for name in run.scores
        }
        for seed, same in by_seed.items()
    }
    speeds = [r.steps_per_s for r in runs if r.steps_per_s is not None]
    method = run.recipe.method.name
    return Row(
        method=method,
        label=method,
        series=method,
        student=run.student[0],
        scale=run.student[1],
        teacher=" + ".join(name for name, _ in run.teachers),
        parameters=run.parameters,
        macs_g=macs[_network(run)],
        runs=tuple(runs),
        seeds=seeds,
        steps_per_s=median(speeds) if speeds else None,
    )


def _labelled(rows: list[Row]) -> list[Row]:
    """Rows that can be told apart: by hash of the teacher, by options, by teacher in plots."""
    hashes: dict[str, set[tuple[str, ...]]] = {}
    for row in rows:
        hashes.setdefault(row.teacher, set()).add(tuple(h for _, h in row.runs[0].teachers))
    named = []
    for row in rows:
        if len(hashes[row.teacher]) > 1:
            teacher = " + ".join(f"{n} ({h[:8]})" for n, h in row.runs[0].teachers)
            row = replace(row, teacher=teacher)
        named.append(row)
    labelled = []
    for row in named:
        alike = [r for r in named if (r.pair, r.method) == (row.pair, row.method)]
        options = [_options(r) for r in alike if r.teacher == row.teacher]
        own = _options(row)
        told = [f"{k}={v}" for k, v in own.items() if any(o[k] != v for o in options)]
        label = f"{row.method} ({', '.join(told)})" if told else row.method
        several = row.teacher and len({r.teacher for r in alike}) > 1
        series = f"{label} of {row.teacher}" if several else label
        labelled.append(replace(row, label=label, series=series))
    return labelled


def _options(row: Row) -> dict[str, Any]:
    """Every option of the method's parts; a key alone where there is one part."""
    recipe = row.runs[0].recipe
    configs = recipe.method.configs
    options = {
        key if len(configs) == 1 else f"{part}.{key}": value
        for part, config in configs.items()
        for key, value in asdict(config).items()
    }
    own = recipe.stage1 if recipe.stage1 is not None and not recipe.stage1.run else None
    stage1 = {f"stage1.{key}": value for key, value in (asdict(own) if own else {}).items()}
    return options | stage1 | _ways(recipe)


def _order(row: Row) -> tuple[Any, ...]:
    """By student and teacher; scratch leads, then the order of the method table."""
    known = [*METHODS]
    places = [known.index(part) for part in row.runs[0].recipe.method.parts]
    return (row.pair, row.method != "scratch", row.teacher, len(places), places, row.label)


def _gain(row: Row, rows: list[Row], notes: list[str]) -> Gain | None:
    """Paired by seed with the scratch row of the same student."""
    if row.method == "scratch":
        return None
    who = f"{row.student} x{row.scale}"
    if not row.sets:
        notes.append(f"No gain for {who}: these runs were validated on nothing.")
        return None
    scratch = [r for r in rows if r.pair == row.pair and r.method == "scratch"]
    if len(scratch) != 1:
        count = "several different scratch runs" if scratch else "no scratch run"
        notes.append(f"No gain for {who}: there is {count} with this student and budget.")
        return None
    common = [seed for seed in row.seeds if seed in scratch[0].seeds]
    if not common:
        notes.append(f"No gain for {who}, {row.series}: no seed is also that of a scratch run.")
        return None
    if alone := [str(seed) for seed in row.seeds if seed not in common]:
        seeds = ", ".join(alone)
        notes.append(f"{who}, {row.series}: the gain leaves out seed {seeds}, without scratch run.")
    return Gain(
        {
            seed: {
                s: row.seeds[seed][s]["psnr_y"] - scratch[0].seeds[seed][s]["psnr_y"]
                for s in row.sets
            }
            for seed in common
        }
    )


def _cost(row: Row, rows: list[Row], baseline: str, measured: CostRecord | None) -> float | None:
    """Time of a step relative to the baseline method's on the same student, teacher and device."""
    if measured is not None:
        return measured.of(row.runs[0], baseline)
    devices = {run.device for run in row.runs}
    references = [
        r
        for r in rows
        if (r.pair, r.method) == (row.pair, baseline)
        # Scratch has no teacher: it stands beside the one pair there is.
        and (r.teacher == row.teacher or not row.teacher or not r.teacher)
        and {run.device for run in r.runs} == devices
    ]
    if len(references) != 1 or not references[0].steps_per_s or not row.steps_per_s:
        return None
    return references[0].steps_per_s / row.steps_per_s


# -- papers -------------------------------------------------------------------------------------


def _beside_papers(tables: list[Table]) -> list[PaperRow]:
    """By method and scale, in the order of the tables; methods that no paper reports are left out."""
    found: dict[tuple[str, int, tuple[str, ...]], PaperRow] = {}
    for i, table in enumerate(tables, 1):
        paper_sets = sets_for(table.sets)
        sets = tuple(s for s in paper_sets if s in table.sets) or table.sets
        for row in table.rows:
            papers = paper_gains(row.method, row.scale, paper_sets)
            if row.gain is None or not papers:
                continue
            new = PaperRow(row.method, row.scale, sets, {}, paper_sets, papers)
            entry = found.setdefault((row.method, row.scale, sets), new)
            options = f" {row.series}" if row.series != row.method else ""
            budget = f" (budget {i})" if len(tables) > 1 else ""
            entry.ours[f"{row.student}{options}{budget}"] = row.gain.over(sets)
    return list(found.values())
