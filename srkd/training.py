"""What one training run holds, and how it is built from a recipe; `srkd.step` is one step of it."""

from __future__ import annotations

import copy
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import srkd.ranks as ranks
from srkd.aggregate import Aggregate
from srkd.bilevel import BilevelState
from srkd.compiler import cpp_compiler
from srkd.devices import pick_device, pick_precision, place
from srkd.errors import MissingError, SrkdError
from srkd.first_stage import first_stage_folder, kind_of, with_network_of
from srkd.methods import METHODS, check_teachers, file_options, make, make_first_stage
from srkd.models import load_model, save_aggregate, save_model, save_privileged, weights_hash
from srkd.networks import build
from srkd.networks.base import Network
from srkd.networks.privileged import PrivilegedTeacher
from srkd.tiling import memory_budget, out_of_memory
from srkd.types import Setting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from srkd.inputs import Inputs
    from srkd.loaded import LoadedModel
    from srkd.methods.base import Method
    from srkd.networks.dctswin import DctSwin
    from srkd.recipe import Recipe, TrainConfig
    from srkd.types import Facts

    Trained = Network | DctSwin | PrivilegedTeacher


@dataclass
class Training:
    """The networks and the progress of one training run; `done` counts completed steps.

    In a first stage `student` is what that trains: the aggregation network, which works on the teachers' outputs, or
    the teacher that sees the HR image.
    """

    recipe: Recipe
    device: torch.device
    precision: str
    student: Trained
    average: Trained | None
    teachers: list[LoadedModel]
    teacher_hashes: list[str]
    method: Method
    notes: tuple[str, ...]
    optimizer: torch.optim.Adam
    bilevel: BilevelState | None = None  # the other optimisers of a method with a bilevel step
    done: int = 0
    best_psnr: float = -math.inf
    best_step: int = 0
    seconds: float = 0.0

    @property
    def result(self) -> Trained:
        """The network that is kept: the average weights if EMA is on."""
        return self.average if self.average is not None else self.student

    @property
    def task_alone(self) -> bool:
        """Whether the next step is one of the second stage of stage-wise training."""
        return 0 < self.recipe.train.distil_iterations <= self.done

    @property
    def upscaler(self) -> Network | Aggregate | PrivilegedTeacher:
        """What makes SR of LR: the result, an aggregation network with its teachers before it.

        A `PrivilegedTeacher` makes it of HR.
        """
        result = self.result
        if isinstance(result, Network | PrivilegedTeacher):
            return result
        return Aggregate(self.teachers, result).eval()

    @property
    def given_hr(self) -> bool:
        """Whether the trained network is given the HR image: no score of it is one of an upscaler."""
        return isinstance(self.student, PrivilegedTeacher)

    def save(self, folder: Path, info: dict[str, Any]) -> None:
        """Write the result with its description."""
        result = self.result
        if isinstance(result, Network):
            save_model(folder, result, info)
        elif isinstance(result, PrivilegedTeacher):
            save_privileged(folder, result, info)
        else:
            save_aggregate(folder, result, self.teachers, self.teacher_hashes, info)


def learning_rate_at(train: TrainConfig, step: int) -> float:
    """Learning rate of the 0-based `step`; each stage of stage-wise training has the whole schedule."""
    rate, iterations = train.learning_rate, train.iterations
    if distil := train.distil_iterations:
        step, iterations = (step, distil) if step < distil else (step - distil, iterations - distil)
    if train.warmup and step < train.warmup:
        return rate * (step + 1) / train.warmup
    if train.schedule == "step":
        passed = sum(step >= m for m in train.milestones)
        return rate * train.gamma ** (passed if train.milestones else step // train.milestone_every)
    if train.schedule == "cosine":
        progress = (step - train.warmup) / max(1, iterations - train.warmup)
        low = train.final_learning_rate
        return low + (rate - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return rate


def ema_decay_at(decay: float, step: int) -> float:
    """Decay of the weight average; it grows at the start, so that the random weights are forgotten."""
    return min(decay, (1 + step) / (10 + step))


def load_teachers(recipe: Recipe, stage1: Path | None = None) -> list[LoadedModel]:
    """The frozen teachers in the order of the recipe; wrong scale and wrong number are refused.

    After a first stage they are one: what that made.
    """
    staged = recipe.stage1 is not None and recipe.stages == "all"
    folder = first_stage_folder(recipe, stage1) if staged else None
    if folder is not None:
        teachers = [kind_of(recipe).trained(recipe, folder)]
    else:
        scale = recipe.student.scale
        teachers = [load_model(os.path.expandvars(spec), scale) for spec in recipe.teacher.models]
        check_teachers(recipe.method, [t.is_ours for t in teachers])
        if staged:
            teachers = [kind_of(recipe).untrained(recipe, teachers)]
    for teacher in teachers:
        teacher.network.requires_grad_(False).eval()
    return teachers


def prepare(recipe: Recipe, device: str = "auto", stage1: Path | None = None) -> Training:
    """Build networks, method and optimiser; nothing is trained or written.

    `stage1` holds the trained first stage of a method that has one; without it (and without
    `stage1.run`) its teacher has fresh weights, which is enough to check everything.
    """
    target = pick_device(device)
    precision, _ = pick_precision(recipe.train.precision, target)
    recipe = absolute(replace(recipe, train=replace(recipe.train, precision=precision)))
    if recipe.stage1 is not None:
        resolved, _ = pick_precision(recipe.stage1.precision, target)
        recipe = replace(recipe, stage1=replace(recipe.stage1, precision=resolved))
    teachers = load_teachers(recipe, stage1)
    # Hashed now: what is on the disk later need not be what was loaded. Before the first stage its
    # teacher has no file.
    hashes = [weights_hash(teacher) for teacher in teachers if teacher.source != Path()]
    if hashes and recipe.stages == "all" and recipe.stage1 is not None:
        recipe = with_network_of(recipe, teachers[0].network)
    # Fresh weights depend on the seed alone, not on what was random before.
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        student = (
            kind_of(recipe).network(recipe, len(teachers))
            if recipe.stages == "first"
            else start_weights(recipe)
        )
        method = make_method(recipe, student, teachers)
        if isinstance(student, Network) and not recipe.student.weights:
            method.start(student, tuple(t.network for t in teachers))
    check_batch(recipe)
    what = kind_of(recipe).trains if recipe.stages == "first" else "student"
    check_patch(recipe, [(what, student.facts), *((t.name, t.facts) for t in teachers)])
    notes = method.check(setting_of(recipe, target))
    check_cache(recipe, method)
    check_stages(recipe)

    if recipe.train.threads and target.type == "cpu":
        torch.set_num_threads(recipe.train.threads)
    for network in (student, method, *(t.network for t in teachers)):
        place(network, target, channels_last=recipe.train.channels_last)
    student.train()
    average = None
    if recipe.train.ema:
        average = copy.deepcopy(student).requires_grad_(False).eval()

    bilevel = bilevel_state(recipe, student, method)
    found = method.bilevel_part
    own = {id(p) for p in found[1].parameters()} if found else set()
    extra = [p for p in method.parameters() if p.requires_grad and id(p) not in own]
    parameters = [*student.parameters(), *extra]
    optimizer = torch.optim.Adam(
        parameters, lr=recipe.train.learning_rate, betas=recipe.train.betas, fused=True
    )
    if recipe.train.compile:
        compile_passes(student, teachers, target)
    return Training(
        recipe=recipe,
        device=target,
        precision=precision,
        student=student,
        average=average,
        teachers=teachers,
        teacher_hashes=hashes,
        method=method,
        notes=notes,
        optimizer=optimizer,
        bilevel=bilevel,
    )


def bilevel_state(recipe: Recipe, student: Trained, method: Method) -> BilevelState | None:
    """The optimisers of the method's bilevel step, None for methods without one."""
    found = method.bilevel_part
    if found is None:
        return None
    name, part = found
    if recipe.train.accumulate > 1:
        raise SrkdError(
            f"train.accumulate = {recipe.train.accumulate}, but '{name}' updates several times on a batch, which "
            "cannot be split; set train.accumulate=1 and lower train.batch if memory is short."
        )
    assert isinstance(student, Network)
    train = recipe.train
    return BilevelState.of(student, part, part.bilevel, train.learning_rate, train.betas)


def check_stages(recipe: Recipe) -> None:
    """Refuse stage-wise training where the first stage would have nothing to learn from."""
    without = [p for p in recipe.method.parts if not METHODS[p].needs_groups]
    if recipe.train.distil_iterations and without:
        fitting = ", ".join(name for name, entry in METHODS.items() if entry.needs_groups)
        raise SrkdError(
            f"train.distil_iterations trains on the distance of features first, and '{without[0]}' has none; "
            f"leave it out, or choose among {fitting}."
        )


def check_cache(recipe: Recipe, method: Method) -> None:
    """Refuse a teacher cache for a method that does not read the teachers' outputs, or reads more."""
    if not recipe.teacher.cache:
        return
    if method.teacher_taps:
        raise SrkdError(
            f"teacher.cache keeps the teacher's outputs, but '{recipe.method.name}' reads features inside it; "
            "leave teacher.cache out, or choose a method that reads outputs alone."
        )
    if not method.needs_teacher_pass:
        raise SrkdError(
            f"teacher.cache is set, but '{recipe.method.name}' as configured reads no teacher; leave it out, or "
            "set teacher.cache=false over a recipe that has it."
        )


def setting_of(recipe: Recipe, device: torch.device) -> Setting:
    """What the method will have to work with."""
    return Setting(
        patch_px=recipe.data.patch,
        batch=recipe.train.batch // recipe.train.accumulate // ranks.world(),
        iterations=recipe.train.iterations,
        memory=memory_budget(device),
    )


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with relative paths made absolute, so that a run can be resumed from anywhere.

    Names (Set5, rcan_c, builtin) and paths with an environment variable stay as they are.
    """

    def full(spec: str) -> str:
        return str(Path(spec).absolute()) if "$" not in spec and Path(spec).exists() else spec

    d = recipe.data
    data = replace(
        d, train=d.train if d.train == "builtin" else full(d.train), lr=full(d.lr) if d.lr else ""
    )
    sets = tuple(s if s.lower() == "builtin" else full(s) for s in recipe.validate.sets)
    configs = dict(recipe.method.configs)
    for part, key in file_options(recipe.method):
        if file := getattr(configs[part], key):
            configs[part] = replace(configs[part], **{key: full(file)})
    start, stage1 = recipe.student.weights, recipe.stage1
    if stage1 is not None and stage1.run:
        stage1 = replace(stage1, run=full(stage1.run))
    return replace(
        recipe,
        data=data,
        method=replace(recipe.method, configs=configs),
        validate=replace(recipe.validate, sets=sets),
        teacher=replace(recipe.teacher, models=tuple(full(m) for m in recipe.teacher.models)),
        student=replace(recipe.student, weights=full(start) if start else ""),
        stage1=stage1,
    )


def check_patch(recipe: Recipe, networks: list[tuple[str, Facts]]) -> None:
    """Refuse crops that are too small for a network's windows."""
    key = "stage1.patch" if recipe.stages == "first" else "data.patch"
    for name, facts in networks:
        if recipe.data.patch < facts.minimum_px:
            raise SrkdError(
                f"{key} = {recipe.data.patch}, but {name} needs at least {facts.minimum_px} LR pixels; "
                f"raise {key}."
            )


def compile_passes(student: Trained, teachers: list[LoadedModel], device: torch.device) -> None:
    """torch.compile the passes of the student and of teachers of ours; on a CPU that needs a C++ compiler.

    Networks are called as they are outside the step (`forward`), so that images of other sizes compile nothing.
    """
    if device.type == "cpu" and cpp_compiler() is None:
        raise MissingError(
            "train.compile needs a C++ compiler on the CPU, and there is none; install g++ or set "
            "train.compile=false."
        )
    for network in (student, *(t.network for t in teachers)):
        if isinstance(network, Network | PrivilegedTeacher):
            network.run = torch.compile(network.run)  # type: ignore[method-assign]
    if not isinstance(student, Network | PrivilegedTeacher):
        student.compile()


@contextmanager
def memory_advice(recipe: Recipe) -> Iterator[None]:
    """Out of memory becomes a sentence with the settings that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise too_large(recipe) from error


def too_large(recipe: Recipe) -> SrkdError:
    t = recipe.train
    return SrkdError(
        f"batch {t.batch} (in {t.accumulate} parts) with LR patch {recipe.data.patch} does not fit in "
        "memory; lower train.batch or data.patch, or raise train.accumulate."
    )


def make_method(recipe: Recipe, student: Trained, teachers: list[LoadedModel]) -> Method:
    """The method's layers; sizes beyond all memory are refused."""
    build_method = make_first_stage if recipe.stages == "first" else make
    try:
        return build_method(recipe.method, student, tuple(t.network for t in teachers))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise SrkdError(
            f"the layers of method '{recipe.method.name}' do not fit in memory; lower its sizes "
            "(method.* of the recipe)."
        ) from error


def check_batch(recipe: Recipe) -> None:
    """Refuse a batch whose crops alone exceed the free memory: asking for it could end the process."""
    patch, parts = recipe.data.patch, recipe.train.accumulate * ranks.world()
    if recipe.train.batch % parts:
        raise SrkdError(
            f"train.batch = {recipe.train.batch} cannot be shared by {ranks.world()} processes with "
            f"train.accumulate = {recipe.train.accumulate}; use a multiple of {parts}."
        )
    crops = recipe.train.batch * 3 * patch**2 * (1 + recipe.student.scale**2)  # uint8 on the CPU
    if crops > 2 * memory_budget(torch.device("cpu")):
        raise too_large(recipe)


def start_weights(recipe: Recipe) -> Network:
    """The student with fresh weights, or with those of `student.weights`."""
    student = build(recipe.student.network, recipe.student.scale)
    if not recipe.student.weights:
        return student
    start = load_model(os.path.expandvars(recipe.student.weights), recipe.student.scale).network
    if not isinstance(start, Network) or start.arguments != student.arguments:
        raise SrkdError(
            f"student.weights = {recipe.student.weights} is not a {recipe.student.network}; start from "
            "weights of the same network, or leave it empty."
        )
    return start


def describe(
    training: Training, inputs: Inputs, scores: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """What model.json says about the training of a network; no paths of this machine."""
    import platform

    from srkd.version import __version__

    t, recipe = training, training.recipe
    return {
        "scores": scores,
        "protocol": "paper-y",
        "training": {
            "method": recipe.method.name,
            **({"stage": "first"} if recipe.stages == "first" else {}),
            "teachers": [
                {"name": m.name, "weights_sha256": h, **_members(m)}
                for m, h in zip(t.teachers, t.teacher_hashes, strict=True)
            ],
            "data": {
                "name": Path(recipe.data.train).name,
                "images": len(inputs.data),
                "digest": inputs.data.digest,
            },
            "iterations": t.done,
            "batch": recipe.train.batch,
            "patch": recipe.data.patch,
            "seed": recipe.seed,
            "precision": t.precision,
            "device": t.device.type,
            "seconds": round(t.seconds, 1),
            "best": {"psnr_y": t.best_psnr, "step": t.best_step} if t.best_step else None,
        },
        "versions": {
            "srkd": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _members(teacher: LoadedModel) -> dict[str, Any]:
    """What an aggregated teacher is made of."""
    return {key: teacher.info[key] for key in ("aggregates",) if key in teacher.info}
