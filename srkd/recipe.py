"""A recipe: everything that decides what is trained, on what and how. TOML -> frozen dataclasses, once.

Unknown keys and wrong types are refused with the nearest valid key. `Recipe.to_toml()` is what a run
saves: every value resolved, enough to repeat the run.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from srkd.errors import SrkdError, nearest
from srkd.methods import METHODS, MethodPlan, plan, same_type
from srkd.networks import zoo_entry


@dataclass(frozen=True)
class StudentConfig:
    network: str = "rcan_a"  # a name of the zoo (--list-networks)
    scale: int = 4  # 2, 3 or 4
    weights: str = ""  # MODEL to start from; empty: fresh weights


@dataclass(frozen=True)
class TeacherConfig:
    models: tuple[str, ...] = ()  # MODEL each; the order is kept
    cache: bool = False  # outputs over the training images computed once, not in every step


@dataclass(frozen=True)
class DataConfig:
    train: str = "builtin"  # a folder of HR images, or the built-in set
    lr: str = ""  # a folder of LR images; empty: made by MATLAB-compatible bicubic
    patch: int = 48  # LR pixels
    augment: bool = True  # the 8 flips and rotations
    place: str = (
        "auto"  # decoded images: host (mapped file) | device (its memory) | auto (by what is free)
    )
    cache: str = ""  # folder of the decoded cache; empty: $SRKD_CACHE or the user's cache folder


@dataclass(frozen=True)
class TrainConfig:
    iterations: int = 250_000
    distil_iterations: int = (
        0  # stage-wise: so many on features alone, the rest on HR alone; 0: joint
    )
    batch: int = 16  # over all ranks and accumulation steps
    accumulate: int = 1  # micro-batches per step
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "step"  # step | cosine | constant
    milestone_every: int = 100_000  # step: learning rate times gamma every so many iterations
    milestones: tuple[int, ...] = ()  # step: instead at these iterations
    gamma: float = 0.1
    final_learning_rate: float = 0.0  # cosine: where it ends
    warmup: int = 0  # iterations of linear warm-up
    ema: float = 0.999  # decay of the weight average that is evaluated and saved; 0: off
    precision: str = "auto"  # fp32 | bf16 | auto (bf16 where the machine has units for it)
    channels_last: bool = True
    compile: bool = False  # torch.compile of the passes of the student and of teachers of ours
    threads: int = 0  # of the CPU; 0: as torch finds (OMP_NUM_THREADS, else all cores)
    log_every: int = 100
    save_every: int = 5_000


@dataclass(frozen=True)
class Stage1Config(TrainConfig):
    """The first stage of a method that has one; what is not set is as in [train] and [data].

    It is one stage: `distil_iterations` is not taken over, and refused.
    """

    run: str = ""  # a run whose first stage is used again; empty: it is trained in this run
    patch: int = 48  # LR pixels

    def train(self) -> TrainConfig:
        return TrainConfig(**{f.name: getattr(self, f.name) for f in fields(TrainConfig)})


@dataclass(frozen=True)
class ValidateConfig:
    sets: tuple[str, ...] = ("builtin",)  # names of benchmark sets, or folders
    every: int = 5_000  # iterations; 0: only at the end
    teachers: bool = True  # the report scores the teachers too


SCHEDULES = ("step", "cosine", "constant")
PRECISIONS = ("fp32", "bf16", "auto")
PLACES = ("auto", "device", "host")
POSITIVE = (
    *("iterations", "batch", "accumulate", "learning_rate"),
    *("milestone_every", "log_every", "save_every"),
)
STAGES = ("all", "first")
STAGED = ("stages", "stage1")  # keys of methods with a first stage alone
SECTIONS: dict[str, type] = {
    "student": StudentConfig,
    "teacher": TeacherConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "validate": ValidateConfig,
}


@dataclass(frozen=True)
class Recipe:
    method: MethodPlan
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    seed: int = 0
    with_baseline: bool = False
    stages: str = "all"  # first: the first stage alone
    stage1: Stage1Config | None = None  # None for methods without a first stage

    @property
    def steps_on_hr(self) -> int:
        """How many optimiser steps see the HR image: what methods with and without stages have in common.

        Stage-wise the first iterations see features alone, but those of a bilevel method end with a step on HR.
        """
        bilevel = any(METHODS[part].bilevel for part in self.method.parts)
        features_alone = 0 if bilevel else self.train.distil_iterations
        return self.train.iterations - features_alone

    def to_dict(self) -> dict[str, Any]:
        sections = {name: asdict(getattr(self, name)) for name in SECTIONS}
        method = {
            "name": self.method.name,
            **{p: asdict(c) for p, c in self.method.configs.items()},
        }
        if self.stage1 is not None:
            sections["stage1"] = asdict(self.stage1)
        return {
            "seed": self.seed,
            "with_baseline": self.with_baseline,
            **({"stages": self.stages} if self.stage1 is not None else {}),
            "method": method,
            **sections,
        }

    def to_toml(self) -> str:
        import tomli_w

        return tomli_w.dumps(self.to_dict())

    def summary(self) -> str:
        """The values that differ from the defaults, one line each."""
        usual = _flat(recipe_from({"method": {"name": self.method.name}}).to_dict())
        mine = _flat(self.to_dict())
        usual |= {
            k: mine[_second(k)] for k in mine if k.startswith("stage1.") and _second(k) in mine
        }
        changed = {k: v for k, v in mine.items() if usual.get(k) != v}
        lines = [f"  {key} = {value!r}" for key, value in changed.items()]
        head = f"method {self.method.name}, student {self.student.network} x{self.student.scale}"
        return "\n".join([head, *lines])

    def differences(self, other: Recipe) -> list[str]:
        """Lines `key: mine -> other's` for every value that differs."""
        mine, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        keys = sorted(mine.keys() | theirs.keys())
        return [
            f"{k}: {mine.get(k)!r} -> {theirs.get(k)!r}"
            for k in keys
            if mine.get(k) != theirs.get(k)
        ]


def _second(key: str) -> str:
    """The key of the whole run that a key of the first stage takes its value from."""
    name = key.removeprefix("stage1.")
    return "data.patch" if name == "patch" else f"train.{name}"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def load_recipe(path: Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file (or start from the defaults) and apply `a.b=value` overrides in order.

    `extends = "other.toml"` in a file (path relative to it) starts from that recipe, and `{scale}` in the
    paths of teachers, data and first weights stands for the student's scale.
    """
    tree: dict[str, Any] = {} if path is None else _read(path)
    changes: dict[str, Any] = {}
    for override in overrides:
        _apply(changes, override)
    tree = _over(tree, changes)
    return recipe_from(tree)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tree of a recipe file laid over the one that it extends."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SrkdError(
            f"cannot read recipe {path}: {error.strerror}. Give a TOML file."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SrkdError(f"recipe {path} is not valid TOML: {error}.") from error
    except ValueError as error:  # a zero byte in the path
        raise SrkdError(f"recipe {str(path)!r} is no path: {error}.") from error
    if "extends" not in tree:
        return tree
    base = tree.pop("extends")
    if not isinstance(base, str):
        raise SrkdError(f"recipe {path}: extends = {base!r}, but the path of a recipe is needed.")
    resolved = path.resolve()
    if resolved in seen:
        raise SrkdError(f"recipe {path} extends itself; remove one 'extends'.")
    return _over(_read(path.parent / base, (*seen, resolved)), tree)


def _over(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; a method leaves behind the options of one that is no part of it."""
    merged = dict(under)
    before, after = merged.get("method"), over.get("method")
    if isinstance(before, dict) and isinstance(after, dict) and _is_another(before, after):
        merged["method"] = {}
        for key in STAGED:
            merged.pop(key, None)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _over(old, value)
        else:
            merged[key] = value
    return merged


def _is_another(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether [method] `new` names a method without all parts of `old`'s: dukd+mipkd keeps dukd's options."""
    before, after = old.get("name"), new.get("name", old.get("name"))
    if not (isinstance(before, str) and isinstance(after, str)):
        return False
    return not set(before.split("+")) <= set(after.split("+"))


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise SrkdError(f"--set {override}: write key=value, e.g. --set train.batch=8.")
    *path, last = key.strip().split(".")
    node = tree
    for part in path:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise SrkdError(f"--set {override}: '{part}' is a value, not a section.")
        node = child
    node[last] = _value(text.strip())


def _value(text: str) -> Any:
    """A TOML value; anything TOML does not know is a plain string, so quotes may be left out."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def recipe_from(tree: dict[str, Any]) -> Recipe:
    """Check a parsed recipe and freeze it."""
    top = [*SECTIONS, "method", "seed", "with_baseline", *STAGED]
    for key in tree:
        if key not in top:
            raise SrkdError(f"unknown recipe key '{key}'; {nearest(key, top)}")
    method = tree.get("method", {})
    if not isinstance(method, dict):
        raise SrkdError('method is a section: write [method] and name = "logits".')
    options = {k: v for k, v in method.items() if k != "name"}
    if not isinstance(name := method.get("name", "scratch"), str):
        raise SrkdError(f"method.name = {name!r} is no text; {nearest('', list(METHODS))}")
    sections = {key: _section(key, SECTIONS[key](), tree.get(key, {})) for key in SECTIONS}
    student = sections["student"]
    entry = zoo_entry(student.network)
    for section, key in SCALED_KEYS:
        sections[section] = replace(
            sections[section],
            **{key: _scaled(getattr(sections[section], key), student.scale)},
        )
    method_plan = plan(name, options, entry.family, student.scale)
    stages = same_type("stages", tree.get("stages", "all"), "")
    stage1 = _stage1(tree, sections, method_plan)
    if stages == "first" and stage1 is not None:
        sections["train"] = stage1.train()
        sections["data"] = replace(sections["data"], patch=stage1.patch)
    recipe = Recipe(
        method=method_plan,
        stages=stages,
        stage1=stage1,
        seed=same_type("seed", tree.get("seed", 0), 0),
        with_baseline=same_type("with_baseline", tree.get("with_baseline", False), False),
        **sections,
    )
    _check(recipe)
    return recipe


# Paths in which {scale} stands for the student's scale, so that one recipe serves x2, x3 and x4.
SCALED_KEYS = (
    *(("student", "weights"), ("teacher", "models")),
    *(("data", "train"), ("data", "lr"), ("validate", "sets")),
)


def _scaled(value: Any, scale: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_scaled(v, scale) for v in value)
    return value.replace("{scale}", str(scale))


def _stage1(
    tree: dict[str, Any], sections: dict[str, Any], chosen: MethodPlan
) -> Stage1Config | None:
    """[stage1] over the values of [train] and [data]; None for a method without a first stage."""
    values = tree.get("stage1", {})
    if not chosen.first_stage:
        if values:
            staged = ", ".join(name for name, entry in METHODS.items() if entry.first_stage)
            raise SrkdError(
                f"[stage1] (--stage1) is for methods with a first stage ({staged}), and '{chosen.name}' has none; "
                "leave it out."
            )
        return None
    train = {**asdict(sections["train"]), "distil_iterations": 0}
    usual = Stage1Config(**train, patch=sections["data"].patch)
    return _section("stage1", usual, values)


def _section(name: str, default: Any, values: Any) -> Any:
    """A section of the recipe: `default` with the checked `values` in it."""
    if not isinstance(values, dict):
        raise SrkdError(f"'{name}' is a section of the recipe, got {values!r}; write [{name}].")
    known = [f.name for f in fields(default)]
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise SrkdError(f"unknown key '{name}.{key}'; {nearest(key, known)}")
        empty = {"models": ("",), "sets": ("",), "milestones": (1,)}
        like = empty.get(key, getattr(default, key))
        checked[key] = same_type(f"{name}.{key}", value, like)
    return replace(default, **checked)


def _check(recipe: Recipe) -> None:
    """Values that have the right type and make no sense."""
    entry = zoo_entry(recipe.student.network)
    if recipe.student.scale not in entry.scales:
        scales = ", ".join(map(str, entry.scales))
        raise SrkdError(
            f"student '{recipe.student.network}' exists at scale {scales}, not {recipe.student.scale}; "
            "change --scale or --student."
        )
    _check_train("train", recipe.train)
    _check_positive("data.patch", recipe.data.patch)
    if recipe.data.place not in PLACES:
        raise SrkdError(f"data.place = '{recipe.data.place}'; {nearest(recipe.data.place, PLACES)}")
    if recipe.stage1 is not None:
        _check_train("stage1", recipe.stage1)
        if recipe.stage1.distil_iterations:
            raise SrkdError(
                f"stage1.distil_iterations = {recipe.stage1.distil_iterations}, but a first stage learns no features "
                "of a teacher; leave it out (train.distil_iterations is for the second stage)."
            )
        _check_positive("stage1.patch", recipe.stage1.patch)
    if recipe.stages not in STAGES:
        raise SrkdError(f"stages = '{recipe.stages}'; {nearest(recipe.stages, STAGES)}")
    if recipe.stages == "first":
        _check_first_alone(recipe)
    if recipe.validate.every < 0:
        raise SrkdError(f"validate.every = {recipe.validate.every}, but it must be 0 or above.")
    if not 0 <= recipe.seed < 2**63:
        raise SrkdError(f"seed = {recipe.seed}, but it must be 0 or above, and below 2^63.")


def _check_first_alone(recipe: Recipe) -> None:
    if recipe.stage1 is None:
        raise SrkdError(
            f"stages = 'first', but method '{recipe.method.name}' has no first stage; leave it out."
        )
    if recipe.stage1.run:
        raise SrkdError(
            "stages = 'first' trains a first stage and --stage1 uses one that is trained; drop one of them."
        )
    if recipe.with_baseline:
        raise SrkdError(
            "stages = 'first' trains no student, so it has no baseline; drop one of them."
        )


def _check_positive(key: str, value: float) -> None:
    if value <= 0:
        raise SrkdError(f"{key} = {value}, but it must be above 0.")


def _check_train(section: str, t: TrainConfig) -> None:
    for name, choices in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
        if (value := getattr(t, name)) not in choices:
            raise SrkdError(f"{section}.{name} = '{value}'; {nearest(value, choices)}")
    for name in POSITIVE:
        _check_positive(f"{section}.{name}", getattr(t, name))
    for f in fields(t):
        value = getattr(t, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise SrkdError(f"{section}.{f.name} = {value}, but a finite number is needed.")
    if t.distil_iterations >= t.iterations:
        raise SrkdError(
            f"{section}.distil_iterations = {t.distil_iterations}, but {section}.iterations = {t.iterations} counts "
            "both stages; leave some for the second."
        )
    for name in ("distil_iterations", "warmup", "gamma", "final_learning_rate", "threads"):
        if (value := getattr(t, name)) < 0:
            raise SrkdError(f"{section}.{name} = {value}, but it must be 0 or above.")
    if list(t.milestones) != sorted({*t.milestones}) or any(m < 1 for m in t.milestones):
        raise SrkdError(
            f"{section}.milestones = {list(t.milestones)}, but increasing iterations above 0 are needed."
        )
    if t.batch % t.accumulate:
        raise SrkdError(
            f"{section}.batch = {t.batch} cannot be split in {section}.accumulate = {t.accumulate} equal parts; "
            "make one a multiple of the other."
        )
    if not 0 <= t.ema < 1:
        raise SrkdError(
            f"{section}.ema = {t.ema}, but a decay lies in 0 (off) to below 1; 0.999 is usual."
        )
    if len(t.betas) != 2 or not all(0 <= b < 1 for b in t.betas):
        raise SrkdError(f"{section}.betas = {t.betas}, but two numbers in [0, 1) are needed.")
