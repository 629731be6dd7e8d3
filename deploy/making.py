"""From a trained network to the file of an engine: range, graph, half precision, build.

    network --rescale--> fp32 graph --islands--> fp16 graph --build--> engine

What the engine does not need is left out: an fp32 graph is neither rescaled nor planned.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

import deploy.graph
from deploy.engines import named
from deploy.rescale import recentred
from deploy.volume import check_countable
from srkd.errors import CheckFailedError, SrkdError
from srkd.files import replacing, sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from deploy.engines import EngineKind
    from deploy.graph import Graph
    from deploy.inputs import Input
    from deploy.island_search import BlockRow
    from deploy.ranges import BlockRange
    from deploy.records import Request
    from srkd.loaded import LoadedModel

    Done = Callable[[str, str], None]


@dataclass(frozen=True)
class PrecisionPlan:
    """What was done so that float16 holds the network, and the measurements behind it.

    `rescale` is the k that features are divided by and `reason` why; `before` and `after` are the ranges of
    the blocks. `islands` stay float32, `needed` are those of them that this network needs by measurement
    and no other has; `psnr_before` is that of the worst input without these, in dB.
    """

    rescale: int = 1
    reason: str = "nothing is folded or rescaled: the trained network is exported"
    before: tuple[BlockRange, ...] = ()
    after: tuple[BlockRange, ...] = ()
    islands: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    psnr_before: float | None = None
    psnr_after: float | None = None
    rows: tuple[BlockRow, ...] = field(default=())

    def to_sidecar(self) -> dict[str, Any]:
        return {"fp32_islands": list(self.islands), "rescale": self.rescale}

    def to_json(self) -> dict[str, Any]:
        """The measurements, for parity.json; values that are not finite become null."""
        from deploy.difference import finite_or_none
        from deploy.island_search import block_table
        from deploy.ranges import table

        return {
            **self.to_sidecar(),
            "reason": self.reason,
            "ranges_before": table(self.before),
            "ranges_after": table(self.after),
            "needed_islands": list(self.needed),
            "psnr_db_without_them": finite_or_none(self.psnr_before),
            "psnr_db_with_them": finite_or_none(self.psnr_after),
            "blocks": block_table(self.rows),
        }


@dataclass(frozen=True)
class Made:
    """What was made. `network` is the one that is exported, `graph32` its fp32 graph, `half` the fp16 one
    (None in another precision), `graph` what the file is or was built from, `build` the facts of a build."""

    request: Request
    network: nn.Module
    graph32: Path
    graph: Graph
    half: onnx.ModelProto | None
    plan: PrecisionPlan
    build: dict[str, Any] | None


def make(
    model: LoadedModel,
    kind: EngineKind,
    request: Request,
    file: Path,
    temporary: Path,
    inputs: Sequence[Input],
    settings: dict[str, Any],
    done: Done,
    show: Callable[[str], None],
) -> Made:
    """Write `file`, and what is only needed to check it to `temporary`. `done` tells of finished stages."""
    halved = request.precision == "fp16" and not kind.rounds
    plan, deployed = PrecisionPlan(), model
    if halved:
        show("audit of the ranges")
        found = recentred(model.network, inputs)
        plan = PrecisionPlan(found.k, found.reason, found.before, found.after)
        deployed = replace(model, network=found.network)
        done("range", found.reason)
    built = kind.source == "built"
    graph32 = temporary / "fp32.onnx" if halved or built else file
    only = request.sizes.only
    graph = deploy.graph.export_graph(deployed, graph32, only, staged=request.staged)
    shapes = "dynamic batch, height, width" if only is None else f"one picture of {request.sizes}"
    tail = ", upsampling in one step" if graph.collapsed else ""
    told = f"opset {graph.opset}, {graph.nodes} nodes, checked, {shapes}{tail}"
    done("onnx", told)
    half: onnx.ModelProto | None = None
    if halved:
        show("which blocks float16 breaks")
        half, plan = _halve(graph32, model, inputs, plan)
        path = temporary / "fp16.onnx" if built else file
        graph = _written(half, path, graph)
        done("fp16", _told(plan))
    build = None
    if built:
        check_countable(onnx.load(graph.path), request.sizes, model.name)
        build = _build(kind, graph, file, request, settings, done)
    return Made(request, deployed.network, graph32, graph, half, plan, build)


def _halve(
    graph32: Path, model: LoadedModel, inputs: Sequence[Input], plan: PrecisionPlan
) -> tuple[onnx.ModelProto, PrecisionPlan]:
    """The fp16 graph with the islands that it needs."""
    from deploy.half import to_half
    from deploy.island_search import plan_islands
    from deploy.verdict import read_gates

    wide = onnx.load(graph32)
    try:
        found = plan_islands(wide, model.facts, inputs, read_gates()["E2"])
    except CheckFailedError as error:
        # float16 is not what ails it: the edges say what does.
        plan = replace(plan, reason=f"{plan.reason}; {error}")
        needed: tuple[str, ...] = ()
    else:
        needed = found.islands
        plan = replace(
            plan,
            needed=needed,
            psnr_before=found.psnr_before,
            psnr_after=found.psnr_after,
            rows=found.rows,
        )
    half = to_half(wide, needed)
    notes = {note.key: note.value for note in half.metadata_props}
    return half, replace(plan, islands=tuple(json.loads(notes["srkd.fp32_islands"])))


def _told(plan: PrecisionPlan) -> str:
    if not plan.needed:
        return f"mixed-precision graph, {len(plan.islands)} islands in float32 by rule, none by measurement"
    return (
        f"mixed-precision graph; {len(plan.needed)} islands by measurement ({', '.join(plan.needed[:3])}"
        f"{', ...' if len(plan.needed) > 3 else ''}): {plan.psnr_before:.1f} -> {plan.psnr_after:.1f} dB"
    )


def _written(proto: onnx.ModelProto, path: Path, wide: Graph) -> Graph:
    with replacing(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
    return replace(wide, path=path, sha256=sha256(path), nodes=len(proto.graph.node))


def _build(
    kind: EngineKind,
    graph: Graph,
    file: Path,
    request: Request,
    settings: dict[str, Any],
    done: Done,
) -> dict[str, Any]:
    """The built engine, from the cache where the same one is there."""
    from deploy.engine_cache import cached_engine
    from deploy.tensorrt_build import engine_key, target_of

    assert kind.builder is not None
    builder = named(kind.builder)
    version, capabilities = target_of(settings["library"])
    key = engine_key(graph.sha256, request.sizes, settings, version, capabilities)
    facts, reused = cached_engine(
        key, file, lambda target: builder(graph.path, target, request.sizes, settings)
    )
    if facts.get("key") != key:
        raise SrkdError(f"the engine in the cache is not that of key {key}; delete it there.")
    told = f"cached key {key[:8]}" if reused else f"key {key[:8]}"
    size = facts["bytes"] / 1e6
    done(
        "build",
        f"{kind.module} {facts['version']}, {facts['gpu'] or 'any GPU it supports'}, {facts['layers']} layers, "
        f"{size:.2f} MB, min/opt/max {request.sizes}, {told}",
    )
    return facts
