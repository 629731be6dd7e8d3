"""Export a network to a deployable file and prove that it still gives the same picture."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.engines import ENGINES, PRECISIONS, check_file, engine_kind, open_engine, require_engine
from deploy.machine import machine, versions
from deploy.sidecar import (
    PARITY_FILE,
    Sidecar,
    Verdict,
    drop_parity,
    record_hash,
    sidecar_path,
    write_parity,
    write_sidecar,
)
from deploy.sizes import DEFAULT_SIZES, Sizes, check_sizes, parse_sizes
from srkd.errors import SrkdError
from srkd.files import sha256, write_text
from srkd.progress import StatusLine

if TYPE_CHECKING:
    from deploy.graph import Graph
    from deploy.inputs import Photo
    from deploy.parity import Parity
    from deploy.verdict import Worst
    from srkd.loaded import LoadedModel

REPORT_FILE = "report.md"
BUILTIN = "builtin"
LAST_WORD = {
    "PASS": "PASSED",
    "FAIL": "FAILED",
    "INCONCLUSIVE": "INCONCLUSIVE",
    "UNVERIFIED": "UNVERIFIED",
}
HAVE = f"this version exports {', '.join(PRECISIONS)} with engines {' and '.join(ENGINES)}"

EXAMPLES = f"""\
engines:
{"".join(f"  {name:<6}{kind.about}{chr(10)}" for name, kind in ENGINES.items())}
the graph takes any batch, height and width; --size says which sizes are declared in the sidecar and
where parity is checked (no side above 160 px, so that the check stays short).

examples:
  python deploy/export.py runs/rcan_a --engine onnx
  python deploy/export.py rcan_c --scale 4 --engine ort --threads 4 --out out/
  python deploy/export.py runs/rcan_a --engine ort --size 16x16:270x480:540x960 --data photos/ --json

exit codes:
  0 every check that ran passed, or --no-parity     1 FAILED or INCONCLUSIVE
  2 the request is wrong                            3 a library is missing here
"""


# --- the function -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportResult:
    """What an export left. `record` is this file's entry in parity.json, None without a check."""

    verdict: Verdict
    file: Path
    sidecar: Path
    report: Path | None = None
    record: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 passed or unverified on request, 1 failed or inconclusive."""
        return 0 if self.verdict in ("PASS", "UNVERIFIED") else 1

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "file": str(self.file),
            "sidecar": str(self.sidecar),
            "report": None if self.report is None else str(self.report),
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
            "parity": self.record,
        }


def export(
    model: str | Path | LoadedModel,
    engine: str = "onnx",
    *,
    precision: str = "fp32",
    out: Path | None = None,
    scale: int | None = None,
    sizes: Sizes = DEFAULT_SIZES,
    data: str | Path = BUILTIN,
    parity: bool = True,
    threads: int = 0,
    overwrite: bool = False,
    quiet: bool = False,
) -> ExportResult:
    """Write MODEL as `<name>_<precision>.onnx` with its sidecar, verify it, and report.

    `out` defaults to `deploy/` in a run folder, else to `deploy_out/<name>`. `data` is a folder or set of
    photographs for the check. `threads` is bound to the engine `ort`; 0 is every core. The file is
    written before it is verified and its sidecar says UNVERIFIED until the verdict is known. Progress
    goes to stderr unless `quiet`.
    """
    kind = engine_kind(engine, precision)
    # The graph alone needs no runtime; whatever is opened or verified here does.
    if parity or engine != "onnx":
        require_engine(engine)
    if engine == "onnx" and threads:
        raise SrkdError(
            "--threads belongs to --engine ort; a graph for any runtime has no threads."
        )
    stages = _Stages(quiet)
    loaded = _load(model, scale)
    facts = loaded.facts
    check_sizes(sizes, facts, loaded.name)
    folder = out or default_folder(loaded)
    file = folder / f"{loaded.name}_{precision}{kind.suffix}"
    _refuse_existing(file, overwrite)
    photos: list[Photo] = []
    if parity:
        from deploy.photographs import load_photographs

        photos = load_photographs(data, loaded.scale)
    millions = sum(p.numel() for p in loaded.network.parameters()) / 1e6
    stages.done(
        "load", f"{loaded.name}  {millions:.2f} M parameters, x{facts.scale}, RGB in [0, 1]"
    )
    for note in loaded.notes:
        stages.say(note)

    from deploy.graph import export_graph

    records = drop_parity(folder, file.name)
    sidecar_path(file).unlink(missing_ok=True)
    _picture_path(file).unlink(missing_ok=True)
    if records or (folder / REPORT_FILE).is_file():
        _write_report(folder, records)
    graph = export_graph(loaded, file)
    settings = {**kind.settings, "threads": threads}
    try:
        rebuild = _rebuild_command(loaded, engine, precision, sizes, folder, data, threads)
        sidecar = _describe(loaded, graph, engine, precision, sizes, settings, rebuild)
        write_sidecar(file, sidecar)
    except BaseException:
        file.unlink(missing_ok=True)  # a graph without a sidecar is no export
        raise
    told = f"opset {graph.opset}, {graph.nodes} nodes, checked, dynamic batch, height, width"
    stages.done("onnx", told)

    if not parity:
        stages.done("engine", "not opened (--no-parity)")
        stages.done("verify", "UNVERIFIED: not run (--no-parity)")
        check_file(file)
        return ExportResult("UNVERIFIED", file, sidecar_path(file), seconds=stages.seconds)

    opened = open_engine(engine, file, loaded.scale, settings)
    library = f"{kind.module} {sidecar.versions.get(kind.module, '')}"
    stages.done(
        "engine",
        f"{library}, {settings['provider']}, threads: {threads or 'all cores'}, sizes {sizes}",
    )

    from deploy.engines import TorchEngine
    from deploy.inputs import build_inputs
    from deploy.parity import verify

    reference = TorchEngine(loaded.network, loaded.scale)
    inputs = build_inputs(photos, sizes, facts)
    found = verify(reference, opened, facts, inputs, photos, progress=stages.show)
    picture = None if found.worst is None else _save_worst(file, found.worst)
    record = {
        "file": file.name,
        "model": loaded.name,
        "engine": engine,
        "precision": precision,
        "reference": f"torch {sidecar.versions.get('torch', '')}, fp32, eval mode, CPU",
        "data": str(data),
        "sizes": str(sizes),
        "graph_sha256": graph.sha256,
        "weights_sha256": sidecar.weights_sha256,
        "settings": settings,
        "versions": sidecar.versions,
        **found.to_json(),
        "worst_picture": picture,
    }
    _write_report(folder, write_parity(folder, file.name, record))
    proved = {
        "verdict": found.verdict,
        "blame": found.blame,
        "record": PARITY_FILE,
        "record_sha256": record_hash(record),
    }
    write_sidecar(file, Sidecar(**{**asdict(sidecar), "parity": proved}))
    check_file(file)
    stages.done("verify", f"vs torch fp32, {len(photos)} photographs: {_summary(found)}")
    return ExportResult(
        found.verdict, file, sidecar_path(file), folder / REPORT_FILE, record, stages.seconds
    )


def default_folder(model: LoadedModel) -> Path:
    """`deploy/` in a run folder; shipped networks and single files get `deploy_out/<name>`."""
    from srkd.models import WEIGHTS_FOLDER

    shipped = model.source.resolve().parent == WEIGHTS_FOLDER.resolve()
    if model.source.is_dir() and not shipped:
        return model.source / "deploy"
    return Path("deploy_out") / model.name


class _Stages:
    """`[2/4] onnx  ...  3.1 s` on stderr, and how long each took."""

    names = ("load", "onnx", "engine", "verify")

    def __init__(self, quiet: bool) -> None:
        self.line = StatusLine(quiet=quiet)
        self.seconds: dict[str, float] = {}
        self.begin = time.perf_counter()

    def done(self, name: str, told: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.begin = now - self.begin, now
        head = f"[{self.names.index(name) + 1}/{len(self.names)}] {name:<7}"
        self.line.say(f"{head} {told}  {self.seconds[name]:.1f} s")

    def say(self, text: str) -> None:
        self.line.say(f"      {text}")

    def show(self, text: str) -> None:
        """A passing remark: only where the line can be rewritten."""
        if self.line.live:
            self.line.show(f"[4/4] verify  {text}")


def _load(model: str | Path | LoadedModel, scale: int | None) -> LoadedModel:
    from srkd.loaded import LoadedModel
    from srkd.models import load_model

    if not isinstance(model, LoadedModel):
        return load_model(model, scale)
    if scale not in (None, model.scale):
        raise SrkdError(f"{model.name} is a x{model.scale} network, but x{scale} was asked for.")
    return model


def _refuse_existing(file: Path, overwrite: bool) -> None:
    if file.parent.exists() and not file.parent.is_dir():
        raise SrkdError(f"--out {file.parent} is a file; give a folder.")
    there = [p for p in (file, sidecar_path(file)) if p.exists()]
    if there and not overwrite:
        raise SrkdError(f"{there[0]} is there already; add --overwrite or choose another --out.")


def _describe(
    model: LoadedModel,
    graph: Graph,
    engine: str,
    precision: str,
    sizes: Sizes,
    settings: dict[str, Any],
    rebuild: str,
) -> Sidecar:
    """The sidecar of a graph that nobody has verified yet."""
    from deploy.graph import INPUT, INPUT_RANGE, OUTPUT, OUTPUT_RANGES, weights_file

    network = model.network
    return Sidecar(
        engine=engine,
        precision=precision,
        file=graph.path.name,
        graph_sha256=graph.sha256,
        weights_sha256=sha256(weights_file(model)),
        model={
            "name": model.name,
            "family": getattr(network, "family", type(network).__name__),
            "arguments": getattr(network, "arguments", None),
            "parameters": sum(p.numel() for p in network.parameters()),
            "source": str(model.source),
        },
        facts=asdict(model.facts),
        input={
            "name": INPUT,
            "type": "float32",
            "dims": graph.input_dims,
            "range": INPUT_RANGE,
        },
        output={
            "name": OUTPUT,
            "type": "float32",
            "dims": graph.output_dims,
            "range": OUTPUT_RANGES[model.facts.output_range],
        },
        sizes=sizes.to_json(),
        settings=settings,
        versions=versions(),
        machine=machine(),
        rebuild=rebuild,
        parity={"verdict": "UNVERIFIED", "blame": None, "record": None, "record_sha256": None},
    )


def _rebuild_command(
    model: LoadedModel,
    engine: str,
    precision: str,
    sizes: Sizes,
    folder: Path,
    data: str | Path,
    threads: int,
) -> str:
    words = ["python", "deploy/export.py", str(model.source), "--engine", engine]
    words += ["--precision", precision, "--size", str(sizes), "--out", str(folder)]
    words += ["--data", str(data)] if str(data) != BUILTIN else []
    words += ["--threads", str(threads)] if threads else []
    return shlex.join([*words, "--overwrite"])


def _picture_path(file: Path) -> Path:
    return file.with_name(f"{file.stem}.worst.png")


def _save_worst(file: Path, worst: Worst) -> dict[str, Any]:
    from deploy.report import worst_picture
    from srkd.images import write_png

    pixels, gain = worst_picture(worst)
    write_png(_picture_path(file), pixels)
    return {"file": _picture_path(file).name, "input": worst.name, "gain": gain}


def _write_report(folder: Path, records: dict[str, Any]) -> None:
    from deploy.report import render

    write_text(folder / REPORT_FILE, render(records))


def _summary(found: Parity) -> str:
    e1 = found.edge("E1")
    task = "" if found.task is None else f", task {found.task.delta_db:+.4f} dB"
    blame = "" if found.blame is None else f" at {found.blame}: {found.edge(found.blame).reason}"
    return f"{e1.reason}{task}  {found.verdict}{blame if found.blame not in (None, 'E1') else ''}"


# --- the command --------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("model", metavar="MODEL", help="run folder, weights file, or a shipped name")
    p.add_argument("--engine", required=True, type=_one_of(tuple(ENGINES)), help="onnx or ort")
    p.add_argument("--precision", default="fp32", type=_one_of(PRECISIONS), help="fp32 (default)")
    p.add_argument("--scale", type=int, choices=(2, 3, 4), help="which scale of a shipped name")
    p.add_argument(
        "--size",
        default=str(DEFAULT_SIZES),
        metavar="MIN:OPT:MAX",
        help="LR sizes, each HxW (default: %(default)s)",
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write in (default: RUN/deploy for a run folder, else deploy_out/NAME)",
    )
    p.add_argument(
        "--data",
        default=BUILTIN,
        metavar="FOLDER_OR_SET",
        help="photographs to verify with (default: the built-in ones)",
    )
    p.add_argument("--threads", type=int, default=0, metavar="N", help="of ort (default: all)")
    p.add_argument("--no-parity", action="store_true", help="do not verify; the file says so")
    p.add_argument("--overwrite", action="store_true", help="replace what is there")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("--quiet", action="store_true", help="no progress")
    return p.parse_args(argv)


def _one_of(valid: tuple[str, ...]) -> Any:
    def check(value: str) -> str:
        if value not in valid:
            raise argparse.ArgumentTypeError(f"'{value}' is not available: {HAVE}")
        return value

    return check


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads < 0:
        raise SrkdError(
            f"--threads {args.threads} is negative; give 1 or more, or 0 for all cores."
        )
    result = export(
        args.model,
        args.engine,
        precision=args.precision,
        out=args.out,
        scale=args.scale,
        sizes=parse_sizes(args.size),
        data=args.data,
        parity=not args.no_parity,
        threads=args.threads,
        overwrite=args.overwrite,
        quiet=args.quiet,
    )
    if args.json:
        print(json.dumps(result.to_json()))
        return result.exit_code
    if result.record is not None:
        for edge in result.record["edges"]:
            print(f"{edge['name']}  {edge['status']:<12}  {edge['compares']}: {edge['reason']}")
    for path in (result.file, result.sidecar, result.report):
        if path is not None:
            print(path)
    print(LAST_WORD[result.verdict])
    return result.exit_code


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
