"""What an export writes about itself: sidecar, command that repeats it, picture of the worst crop, report."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.machine import machine, versions
from deploy.sidecar import Sidecar, portable
from srkd.files import sha256

if TYPE_CHECKING:
    from deploy.graph import Graph
    from deploy.sizes import Sizes
    from deploy.verdict import Worst
    from srkd.loaded import LoadedModel

BUILTIN = "builtin"


@dataclass(frozen=True)
class Request:
    """What was asked for; `data` are the photographs of the check, `device` None is the engine's usual one, `staged`
    leaves the upsampling as it was trained."""

    engine: str
    precision: str
    sizes: Sizes
    folder: Path
    data: str | Path
    threads: int
    device: str | None
    staged: bool = False


def describe(
    model: LoadedModel,
    request: Request,
    file: Path,
    graph: Graph,
    plan: dict[str, Any],
    settings: dict[str, Any],
    build: dict[str, Any] | None,
) -> Sidecar:
    """The sidecar of `file`, which nobody has verified yet; `graph` is what it is or was built from."""
    from deploy.graph import INPUT, INPUT_RANGE, OUTPUT, OUTPUT_RANGES, weights_file

    network = model.network
    return Sidecar(
        engine=request.engine,
        precision=request.precision,
        file=file.name,
        engine_sha256=sha256(file),
        graph_sha256=graph.sha256,
        weights_sha256=sha256(weights_file(model)),
        precision_plan=plan,
        model={
            "name": model.name,
            "family": getattr(network, "family", type(network).__name__),
            "arguments": getattr(network, "arguments", None),
            "parameters": sum(p.numel() for p in network.parameters()),
            "upsampling": "collapsed" if graph.collapsed else "as trained",
            "source": portable(model.source, request.folder),
        },
        facts=asdict(model.facts),
        input={"name": INPUT, "type": "float32", "dims": graph.input_dims, "range": INPUT_RANGE},
        output={
            "name": OUTPUT,
            "type": "float32",
            "dims": graph.output_dims,
            "range": OUTPUT_RANGES[model.facts.output_range],
        },
        sizes=request.sizes.to_json(),
        static=request.sizes.static,
        settings=settings,
        build=build,
        versions=versions(),
        machine=machine(),
        rebuild=rebuild_words(model, request),
        parity={"verdict": "UNVERIFIED", "blame": None, "record": None, "record_sha256": None},
    )


def data_name(request: Request) -> str:
    """The photographs of the check as the records name them."""
    data = Path(request.data)
    return portable(data, request.folder) if data.exists() else str(data)


def rebuild_words(model: LoadedModel, request: Request) -> str:
    """The command that makes the file again, its paths as seen from the sidecar (`how_to_rebuild`)."""
    r = request
    words = ["python", "deploy/export.py", portable(model.source, r.folder), "--engine", r.engine]
    words += ["--precision", r.precision, "--size", str(r.sizes), "--out", "."]
    words += ["--data", data_name(r)] if data_name(r) != BUILTIN else []
    words += ["--static"] if r.sizes.static else []
    words += ["--staged"] if r.staged else []
    words += ["--threads", str(r.threads)] if r.threads else []
    words += ["--device", r.device] if r.device else []
    return shlex.join([*words, "--overwrite"])


def picture_path(file: Path) -> Path:
    return file.with_name(f"{file.stem}.worst.png")


def save_worst(file: Path, worst: Worst) -> dict[str, Any]:
    """The picture of the largest error beside `file`; what the record says of it."""
    from deploy.report import worst_picture
    from srkd.images import write_png

    pixels, gain = worst_picture(worst)
    write_png(picture_path(file), pixels)
    return {
        "file": picture_path(file).name,
        "edge": worst.edge,
        "input": worst.name,
        "gain": gain,
    }
