"""The methods: which names exist, what they need, and how they combine. Importing this loads no torch.

To add a method: its file, its test, one line in METHODS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from srkd.errors import SrkdError, nearest

if TYPE_CHECKING:
    from torch import nn

    from srkd.methods.base import Method


# Terms that a composition counts once, and the config field that weights each.
RESERVED_WEIGHTS = {"pixel": "pixel_weight", "logits": "logits_weight"}


@dataclass(frozen=True)
class MethodEntry:
    """`teachers` is how many the method takes: (fewest, most); most None means any number.

    `first_stage` trains one teacher, of all of them or of none, which is then the teacher of every part.
    `bilevel` says that the method has updates of its own before the step of the loop (`Method.bilevel`).
    """

    path: str
    paper: str
    teachers: tuple[int, int | None] = (1, 1)
    needs_groups: bool = False
    first_stage: str = ""
    bilevel: bool = False

    @property
    def own_teacher(self) -> bool:
        """Whether its teacher is made in the first stage from nothing but the training images."""
        return bool(self.first_stage) and self.teachers == (0, 0)


METHODS: dict[str, MethodEntry] = {
    "scratch": MethodEntry("srkd.methods.scratch:Scratch", "the baseline", teachers=(0, 0)),
    "logits": MethodEntry("srkd.methods.logits:Logits", "Hinton et al. 2015, arXiv 1503.02531"),
    "dukd": MethodEntry("srkd.methods.dukd:Dukd", "Zhang et al., arXiv 2309.14162"),
    "mtkd": MethodEntry(
        "srkd.methods.mtkd:Mtkd",
        "Jiang et al., ECCV 2024, arXiv 2404.09571",
        teachers=(1, None),
        first_stage="srkd.methods.mtkd:Aggregation",
    ),
    "mipkd": MethodEntry(
        "srkd.methods.mipkd:Mipkd", "Li et al., ICLR 2025, arXiv 2404.02573", needs_groups=True
    ),
    "fitnet": MethodEntry(
        "srkd.methods.fitnet:Fitnet", "Romero et al., ICLR 2015, arXiv 1412.6550", needs_groups=True
    ),
    "at": MethodEntry(
        "srkd.methods.at:AttentionTransfer",
        "Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928",
        needs_groups=True,
    ),
    "rkd": MethodEntry(
        "srkd.methods.rkd:Rkd", "Park et al., CVPR 2019, arXiv 1904.05068", needs_groups=True
    ),
    "vid": MethodEntry(
        "srkd.methods.vid:Vid", "Ahn et al., CVPR 2019, arXiv 1904.05835", needs_groups=True
    ),
    "ickd": MethodEntry(
        "srkd.methods.ickd:Ickd", "Liu et al., ICCV 2021, arXiv 2202.03680", needs_groups=True
    ),
    "mkd": MethodEntry(
        "srkd.methods.mkd:Mkd", "Zhu et al., arXiv 2207.08356", needs_groups=True, bilevel=True
    ),
    "l2tww": MethodEntry(
        "srkd.methods.l2tww:L2tww",
        "Jang et al., ICML 2019, arXiv 1905.05901",
        needs_groups=True,
        bilevel=True,
    ),
    "fakd": MethodEntry("srkd.methods.fakd:Fakd", "He et al., ICIP 2020", needs_groups=True),
    "crosskd": MethodEntry(
        "srkd.methods.crosskd:CrossKd",
        "Fang et al., ICVIP 2022 (reconstruction: no public code)",
        needs_groups=True,
    ),
    "csd": MethodEntry(
        "srkd.methods.csd:Csd",
        "Wang et al., IJCAI 2021, arXiv 2105.11683",
        teachers=(0, 1),
        needs_groups=True,
    ),
    "pisr": MethodEntry(
        "srkd.methods.pisr:Pisr",
        "Lee et al., ECCV 2020, arXiv 2007.07524",
        teachers=(0, 0),
        needs_groups=True,
        first_stage="srkd.methods.pisr:PrivilegedTraining",
    ),
}


@dataclass(frozen=True)
class MethodPlan:
    """A method by name with the frozen config of each part, before any network exists.

    The weights of reserved terms are the same in every part that has them.
    """

    parts: tuple[str, ...]
    configs: dict[str, Any]

    @property
    def name(self) -> str:
        return "+".join(self.parts)

    @property
    def needs_groups(self) -> bool:
        return any(METHODS[p].needs_groups for p in self.parts)

    @property
    def first_stage(self) -> str:
        """The part that has a first stage, empty when none has."""
        return next((p for p in self.parts if METHODS[p].first_stage), "")


def file_options(chosen: MethodPlan) -> list[tuple[str, str]]:
    """(part, option) of every option that names a file."""
    return [
        (part, field.name)
        for part, config in chosen.configs.items()
        for field in fields(config)
        if field.metadata.get("file")
    ]


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def plan(name: str, options: dict[str, Any], family: str = "", scale: int = 0) -> MethodPlan:
    """Read `[method]` of a recipe. `options` holds the keys besides `name`.

    A table named like a part configures that part; a plain key goes to every part that has it. A
    config with presets fills in what is not set by hand, for the student's family and scale.
    """
    parts = tuple(part.strip() for part in name.split("+"))
    for part in parts:
        if part not in METHODS:
            raise SrkdError(f"unknown method '{part}'; {nearest(part, list(METHODS))}")
    if len(set(parts)) != len(parts):
        raise SrkdError(f"method '{name}' names one part twice; each part counts once.")
    _check_together(parts)

    shared = {k: v for k, v in options.items() if not isinstance(v, dict)}
    tables = {k: v for k, v in options.items() if isinstance(v, dict)}
    known: dict[str, list[str]] = {
        p: [f.name for f in fields(_load(METHODS[p].path).Config)] for p in parts
    }
    every_key = sorted({k for keys in known.values() for k in keys})
    for table in tables:
        if table not in parts:
            raise SrkdError(
                f"[method.{table}] belongs to no part of '{name}'; {nearest(table, parts)}"
            )
    for key in shared:
        if key not in every_key:
            raise SrkdError(f"method '{name}' has no option '{key}'; {nearest(key, every_key)}")
    configs: dict[str, Any] = {}
    by_hand: dict[str, set[str]] = {}
    for part in parts:
        for key in tables.get(part, {}):
            if key not in known[part]:
                raise SrkdError(
                    f"method '{part}' has no option '{key}'; {nearest(key, known[part])}"
                )
        values = {k: v for k, v in shared.items() if k in known[part]} | tables.get(part, {})
        configs[part] = _config(part, values, family, scale)
        by_hand[part] = set(values)
    _share_reserved(configs, by_hand)
    return MethodPlan(parts, configs)


def _check_together(parts: tuple[str, ...]) -> None:
    """Refuse parts that no teacher, no number of teachers or no iteration suits."""
    alone = [p for p in parts if METHODS[p].own_teacher]
    if alone and len(parts) > 1:
        raise SrkdError(
            f"'{'+'.join(parts)}' cannot be combined: '{alone[0]}' trains a teacher of its own, which sees the HR "
            f"image and teaches no other method; name '{alone[0]}' alone, or leave it out."
        )
    if alone:
        return
    first = [p for p in parts if METHODS[p].first_stage]
    inside = [p for p in parts if METHODS[p].needs_groups]
    if first and inside:
        fitting = ", ".join(
            m for m, e in METHODS.items() if e.teachers[0] and m not in first and not e.needs_groups
        )
        raise SrkdError(
            f"'{'+'.join(parts)}' cannot be combined: '{inside[0]}' reads features inside the teacher, and the "
            f"aggregated teacher of '{first[0]}' has outputs only; it goes with: {fitting}."
        )
    own = [p for p in parts if METHODS[p].bilevel]
    if len(own) > 1:
        raise SrkdError(
            f"'{'+'.join(parts)}' cannot be combined: '{own[0]}' and '{own[1]}' each update the student several "
            "times in an iteration and look ahead along their own updates alone; leave one of them out."
        )
    fewest = max(parts, key=lambda p: METHODS[p].teachers[0])
    limited = [p for p in parts if METHODS[p].teachers[1] is not None]
    if not limited:
        return
    most = min(limited, key=lambda p: METHODS[p].teachers[1] or 0)
    low, high = METHODS[fewest].teachers[0], METHODS[most].teachers[1] or 0
    if low > high:
        raise SrkdError(
            f"'{'+'.join(parts)}' cannot be combined: '{most}' takes {high or 'no'} teacher{'s' * (high > 1)} "
            f"and '{fewest}' needs {low}; leave '{most}' out."
        )


def _share_reserved(configs: dict[str, Any], by_hand: dict[str, set[str]]) -> None:
    """Give every part the one weight of each reserved term: set by hand, else the first part's."""
    for key in RESERVED_WEIGHTS.values():
        having = [part for part, config in configs.items() if hasattr(config, key)]
        chosen = [part for part in having if key in by_hand[part]]
        if len({getattr(configs[part], key) for part in chosen}) > 1:
            raise SrkdError(
                f"{key} is set to different values for {' and '.join(chosen)}, but its term counts once "
                f"in '{'+'.join(configs)}'; set it once, as method.{key}."
            )
        for part in having:
            value = getattr(configs[(chosen or having)[0]], key)
            configs[part] = replace(configs[part], **{key: value})


def _config(part: str, values: dict[str, Any], family: str, scale: int) -> Any:
    """The frozen config of a part, with the types of its defaults enforced."""
    config_class = _load(METHODS[part].path).Config
    default = config_class()
    checked = {}
    for key, value in values.items():
        like = ("",) if getattr(default, key) == () else getattr(default, key)
        checked[key] = same_type(f"method.{part}.{key}", value, like)
    if "preset" in checked:
        checked = {**config_class.preset_values(checked["preset"], family, scale), **checked}
    config = config_class(**checked)
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            raise SrkdError(
                f"method.{part}.{field.name} = {value}, but a finite number of 0 or above is needed."
            )
        choices = field.metadata.get("choices")
        if choices and isinstance(value, str) and value not in choices:
            raise SrkdError(f"method.{part}.{field.name} = '{value}'; {nearest(value, choices)}")
    return config


def same_type(key: str, value: Any, default: Any) -> Any:
    """`value` if it has the type of `default` (an int may stand for a float), else a clear refusal."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuple(same_type(key, v, default[0]) if default else v for v in value)
    if isinstance(default, tuple) and type(value) is not type(default):
        example = f'["{value}"]' if isinstance(value, str) else "[1, 2]"
        raise SrkdError(f"{key} = {value!r}, but a list is needed, such as {example}.")
    # The shell takes quotes away: --set method.case=3 means the word "3".
    if isinstance(default, str) and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if type(value) is not type(default):
        raise SrkdError(
            f"{key} = {value!r} is {type(value).__name__}, but {type(default).__name__} is needed "
            f"(like {default!r})."
        )
    return value


def check_teachers(plan: MethodPlan, ours: list[bool]) -> None:
    """Refuse a number or kind of teachers the method cannot use; `ours` says which have groups."""
    first = plan.first_stage
    for part in plan.parts:
        entry = METHODS[part]
        # With a first stage the other parts see one aggregated teacher.
        fewest, most = entry.teachers if part == first or not first else (1, None)
        if len(ours) < fewest:
            raise SrkdError(
                f"method '{part}' needs {'a teacher' if fewest == 1 else f'{fewest} teachers'}, got "
                f"{len(ours)}; add --teacher MODEL."
            )
        if most is not None and len(ours) > most:
            if entry.own_teacher:
                raise SrkdError(
                    f"method '{part}' trains its own teacher, but {len(ours)} were given; drop --teacher (or set "
                    "teacher.models=[] over a recipe that names one)."
                )
            if most == 0:
                raise SrkdError(
                    f"method '{part}' uses no teacher, but {len(ours)} were given; drop --teacher (or "
                    "set teacher.models=[] over a recipe that names one), or choose "
                    f"a method that learns from one: {', '.join(m for m in METHODS if m != part)}."
                )
            raise SrkdError(
                f"method '{part}' takes {most} teacher{'s' if most != 1 else ''}, got {len(ours)}; "
                "drop the others."
            )
        if entry.needs_groups and not all(ours):
            work = [name for name, other in METHODS.items() if not other.needs_groups]
            raise SrkdError(
                f"method '{part}' reads features inside the teacher, and a foreign network or an aggregated "
                f"teacher has outputs only; with this teacher these methods work: {', '.join(work)}."
            )


def make(plan: MethodPlan, student: nn.Module, teachers: tuple[nn.Module, ...]) -> Method:
    """Build the method's layers for a pair of networks."""
    from srkd.methods.base import Composed

    built = {
        part: cast("Method", _load(METHODS[part].path)(plan.configs[part], student, teachers))
        for part in plan.parts
    }
    owners = {
        term: next((p for p in plan.parts if hasattr(plan.configs[p], key)), "")
        for term, key in RESERVED_WEIGHTS.items()
    }
    return Composed(built, owners)


def make_first_stage(
    plan: MethodPlan, network: nn.Module, teachers: tuple[nn.Module, ...]
) -> Method:
    """The first stage as a method of its own, whose student is the network that it trains."""
    part = plan.first_stage
    return cast("Method", _load(METHODS[part].first_stage)(plan.configs[part], network, teachers))
