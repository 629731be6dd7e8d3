"""Export a network to a deployable file and prove that it still gives the same picture."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.engines import (
    ENGINES,
    PRECISIONS,
    check_file,
    engine_kind,
    engine_settings,
    open_engine,
    opened_with,
    require_engine,
)
from deploy.places import default_folder, export_file
from deploy.records import BUILTIN, Request, data_name, describe, picture_path, save_worst
from deploy.sidecar import (
    PARITY_FILE,
    REPORT_FILE,
    Verdict,
    drop_parity,
    how_to_rebuild,
    record_hash,
    sidecar_path,
    write_parity,
    write_sidecar,
)
from deploy.sizes import DEFAULT_SIZES, Sizes, check_sizes, parse_sizes
from deploy.stages import Stages
from srkd.errors import MissingError, SrkdError, nearest
from srkd.files import make_folder, replacing

if TYPE_CHECKING:
    from deploy.engines import EngineKind
    from deploy.inputs import Input, Photo
    from deploy.making import Made
    from deploy.parity import Parity
    from deploy.proof import ProvableEngine
    from deploy.sidecar import Sidecar
    from srkd.loaded import LoadedModel

EXPORTED = tuple(name for name, kind in ENGINES.items() if kind.source != "network")
LAST_WORD = {
    "PASS": "PASSED",
    "FAIL": "FAILED",
    "INCONCLUSIVE": "INCONCLUSIVE",
    "UNVERIFIED": "UNVERIFIED",
    "BUILT, NOT VERIFIED": "BUILT, NOT VERIFIED",
}

EXAMPLES = f"""\
engines:
{"".join(f"  {name:<9}{ENGINES[name].about} ({', '.join(ENGINES[name].precisions)}){chr(10)}" for name in EXPORTED)}
a graph takes any batch, height and width; --size says which sizes are declared in the sidecar and
where parity is checked (no side above 160 px, so that the check stays short). A TensorRT engine is built for
the sizes from MIN to MAX and tuned for OPT. --static writes a graph of one size, one picture at a time.

upsampling: a chain of convolutions and pixel shuffles (EDSR, RCAN, SwinIR, RDN, HAN, SAN from x3 on) becomes one 5x5
convolution with the same output, about twice as fast in small networks; --staged leaves it as it was trained.

fp16: the network's range is re-centred by a power of two where that is exact, and the blocks that float16 breaks
stay float32; both are measured on the photographs of the check, and recorded.

examples:
  python deploy/export.py runs/rcan_a --engine onnx --precision fp16
  python deploy/export.py rcan_c --scale 4 --engine ort --threads 4 --out out/
  python deploy/export.py runs/rcan_a --engine openvino --size 96x96 --static
  python deploy/export.py runs/rcan_a --engine trt --precision fp16 --size 270x480:540x960:1080x1920 --benchmark

exit codes:
  0 every check that ran passed, or --no-parity     1 FAILED or INCONCLUSIVE
  2 the request is wrong                            3 a library or a GPU is missing here
An engine that is built but cannot run on this machine is BUILT, NOT VERIFIED: 0 if what could be checked passed.
"""


# --- the function -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportResult:
    """What an export left. `record` is this file's entry in parity.json, None without a check; `speed` the
    speed card, where one was asked for and the engine runs here."""

    verdict: Verdict
    file: Path
    sidecar: Path
    report: Path | None = None
    record: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    speed: Path | None = None

    @property
    def exit_code(self) -> int:
        """1 failed or inconclusive, 0 otherwise."""
        return 1 if self.verdict in ("FAIL", "INCONCLUSIVE") else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "file": str(self.file),
            "sidecar": str(self.sidecar),
            "report": None if self.report is None else str(self.report),
            "speed": None if self.speed is None else str(self.speed),
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
    device: str | None = None,
    staged: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> ExportResult:
    """Write MODEL for an engine with its sidecar, verify it, and report.

    `out` defaults to `deploy/` in a run folder, else to `deploy_out/<name>`. `data` is a folder or set of
    photographs for the check, and for the plan of a float16 graph. `threads` and `device` (cpu, cuda) are
    bound to the engine; 0 is every core, None the engine's usual device. `staged` exports the upsampling as it
    was trained, not collapsed. The file is written before it is
    verified and its sidecar says UNVERIFIED until the verdict is known. Progress goes to stderr unless
    `quiet`.
    """
    from deploy.collapse import export_facts

    kind = _kind(engine, precision, device)
    if kind.source == "built":
        from deploy.tensorrt_build import target_of

        target_of(kind.settings["library"])  # the GPU that the engine would be for
    if (threads and "threads" not in kind.settings) or (threads and engine == "onnx"):
        raise SrkdError(
            f"--threads belongs to engines bound to a CPU (ort, openvino); '{engine}' has none, leave it out."
        )
    settings = engine_settings(engine, precision, device, threads)
    # The graph alone needs no runtime; whatever is opened or verified here does, and so does a fp16 plan.
    if parity or engine != "onnx" or precision != "fp32":
        require_engine(engine, settings)
    loaded = _load(model, scale)
    facts = export_facts(loaded, staged=staged)
    loaded = replace(loaded, facts=facts)
    check_sizes(sizes, facts, loaded.name)
    folder = out or default_folder(loaded)
    request = Request(engine, precision, sizes, folder, data, threads, device, staged)
    file = export_file(folder, loaded.name, engine, precision, kind, device, sizes.only)
    _refuse_existing(file, overwrite)
    half = precision == "fp16" and not kind.rounds
    stages = Stages(quiet, half=half, built=kind.source == "built")
    photos: list[Photo] = []
    inputs: list[Input] = []
    if parity or half:
        from deploy.inputs import build_inputs
        from deploy.photographs import load_photographs

        photos = load_photographs(data, loaded.scale)
        inputs = build_inputs(photos, sizes, facts, built=kind.source == "built")
    make_folder(folder)  # before anything takes long
    millions = sum(p.numel() for p in loaded.network.parameters()) / 1e6
    stages.done(
        "load", f"{loaded.name}  {millions:.2f} M parameters, x{facts.scale}, RGB in [0, 1]"
    )
    for note in loaded.notes:
        stages.say(note)

    with tempfile.TemporaryDirectory() as temporary:
        made, sidecar = _make(
            loaded, kind, request, file, Path(temporary), inputs, settings, stages
        )
        if not parity:
            stages.done("verify", "UNVERIFIED: not run (--no-parity)")
            check_file(file)
            return ExportResult("UNVERIFIED", file, sidecar_path(file), seconds=stages.seconds)
        opened, absent = _open(file, sidecar, sizes, stages)
        found = _verify(loaded, made, opened, absent, precision, inputs, photos, stages)
    record = _record(file, sidecar, found, made)
    write_parity(folder, file.name, record)
    proved = {
        "verdict": found.verdict,
        "blame": found.blame,
        "record": PARITY_FILE,
        "record_sha256": record_hash(record),
    }
    write_sidecar(file, replace(sidecar, parity=proved))
    check_file(file)
    stages.done("verify", f"vs torch fp32, {len(photos)} photographs: {_summary(found)}")
    return ExportResult(
        found.verdict, file, sidecar_path(file), folder / REPORT_FILE, record, stages.seconds
    )


def _kind(engine: str, precision: str, device: str | None) -> EngineKind:
    if engine in ENGINES and engine not in EXPORTED:
        raise SrkdError(
            f"engine '{engine}' runs the network itself, so there is nothing to export; "
            f"{nearest(engine, EXPORTED)}"
        )
    if engine not in ENGINES:
        raise SrkdError(f"there is no engine '{engine}'; {nearest(engine, EXPORTED)}")
    return engine_kind(engine, precision, device)


def _make(
    loaded: LoadedModel,
    kind: EngineKind,
    request: Request,
    file: Path,
    temporary: Path,
    inputs: list[Input],
    settings: dict[str, Any],
    stages: Stages,
) -> tuple[Made, Sidecar]:
    """The files with their sidecar: what is exported, and the fp32 graph that it is checked against.

    An earlier export of this name is only replaced when the new one is there.
    """
    from deploy.making import make

    new = temporary / file.name
    made = make(loaded, kind, request, new, temporary, inputs, settings, stages.done, stages.show)
    sidecar = describe(
        loaded, request, new, made.graph, made.plan.to_sidecar(), settings, made.build
    )
    _forget(file.parent, file)
    try:
        # A copy: the graph stays where the checks look for it.
        with replacing(file) as copy:
            shutil.copyfile(new, copy)
        write_sidecar(file, sidecar)
    except BaseException:
        file.unlink(missing_ok=True)  # a file without a sidecar is no export
        raise
    return made, sidecar


def _open(
    file: Path, sidecar: Sidecar, sizes: Sizes, stages: Stages
) -> tuple[ProvableEngine | None, str]:
    """The engine as a user opens it, or why a built one cannot run here."""
    engine: Any = None
    absent = ""
    try:
        scale = sidecar.network_facts.scale
        engine = open_engine(sidecar.engine, file, scale, opened_with(sidecar))
    except MissingError as error:
        if sidecar.build is None:
            raise
        # The library is here, or it would not have been built: this machine cannot run it.
        absent = f"{error} Then: {how_to_rebuild(file, sidecar)}"
    kind = engine_kind(sidecar.engine)
    library = f"{kind.module} {sidecar.versions.get(kind.module, '')}"
    shown = ", ".join(f"{key}: {value}" for key, value in sidecar.settings.items())
    told = "BUILT, but it cannot run here" if engine is None else f"{library}, {shown}"
    stages.done("engine", f"{told}, sizes {sizes}")
    return engine, absent


def _verify(
    loaded: LoadedModel,
    made: Made,
    opened: ProvableEngine | None,
    absent: str,
    precision: str,
    inputs: list[Input],
    photos: list[Photo],
    stages: Stages,
) -> Parity:
    import onnx

    from deploy.emulation import HalfEmulation
    from deploy.half import spoiled_constants
    from deploy.ort_engine import OrtEngine
    from deploy.parity import Chain, verify
    from deploy.torch_engines import DoubleTorchEngine, TorchEngine
    from srkd.types import ANY_SIZE, Limits

    scale, threads, sizes = loaded.scale, made.request.threads, made.request.sizes
    rescaled = made.plan.rescale > 1
    chain = Chain(
        trained=TorchEngine(loaded.network, scale),
        graph=OrtEngine(made.graph32, scale, threads=threads),
        engine=opened,
        precision=precision,
        absent=absent,
        limits=Limits(sizes.smallest, sizes.largest)
        if made.build is not None or sizes.static
        else ANY_SIZE,
        deployed=TorchEngine(made.network, scale) if rescaled else None,
        as_trained=made.plan.reason,
        half=None if made.half is None else HalfEmulation(made.half, scale, threads),
        spoiled=()
        if made.half is None
        else tuple(spoiled_constants(onnx.load(made.graph32), made.half)),
        exact=DoubleTorchEngine(loaded.network, scale),
    )
    return verify(chain, loaded.facts, inputs, photos, progress=stages.show)


def _record(file: Path, sidecar: Sidecar, found: Parity, made: Made) -> dict[str, Any]:
    """The entry of parity.json."""
    picture = None if found.worst is None else save_worst(file, found.worst)
    return {
        "file": file.name,
        "model": sidecar.model["name"],
        "engine": sidecar.engine,
        "precision": sidecar.precision,
        "reference": f"torch {sidecar.versions.get('torch', '')}, fp32, eval mode, CPU",
        "data": data_name(made.request),
        "sizes": str(made.request.sizes),
        "graph_sha256": sidecar.graph_sha256,
        "weights_sha256": sidecar.weights_sha256,
        "settings": sidecar.settings,
        "versions": sidecar.versions,
        **found.to_json(),
        "plan": made.plan.to_json(),
        "build": sidecar.build,
        "worst_picture": picture,
    }


def _forget(folder: Path, file: Path) -> None:
    """What an earlier export said of this file."""
    drop_parity(folder, file.name)
    sidecar_path(file).unlink(missing_ok=True)
    picture_path(file).unlink(missing_ok=True)


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


def _summary(found: Parity) -> str:
    e1 = found.edge("E1")
    task = "" if found.task is None else f", task {found.task.delta_db:+.4f} dB"
    others = [found.edge(name) for name in ("E2", "E3") if found.edge(name).status != "NOT RUN"]
    told = "".join(f"; {e.edge} {e.reason}" for e in others if e.edge != found.blame)
    blame = "" if found.blame is None else f" at {found.blame}: {found.edge(found.blame).reason}"
    return f"{e1.reason}{task}{told}  {found.verdict}{blame if found.blame not in (None, 'E1') else ''}"


# --- the command --------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("model", metavar="MODEL", help="run folder, weights file, or a shipped name")
    p.add_argument("--engine", required=True, metavar="ENGINE", help=", ".join(EXPORTED))
    p.add_argument(
        "--precision", default="fp32", metavar="PRECISION", help=f"{', '.join(PRECISIONS)} (fp32)"
    )
    p.add_argument("--scale", type=int, choices=(2, 3, 4), help="which scale of a shipped name")
    p.add_argument(
        "--size",
        default=str(DEFAULT_SIZES),
        metavar="MIN:OPT:MAX",
        help="LR sizes, each HxW (default: %(default)s)",
    )
    p.add_argument(
        "--static",
        action="store_true",
        help="a graph of the one size that --size gives; larger pictures are cut into tiles of it",
    )
    p.add_argument(
        "--staged",
        action="store_true",
        help="leave the upsampling as trained, stage by stage; else it is done in one step where that is exact",
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
    p.add_argument(
        "--threads", type=int, default=0, metavar="N", help="of ort and openvino (default: all)"
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="of ort (default: cpu)")
    p.add_argument("--no-parity", action="store_true", help="do not verify; the file says so")
    p.add_argument(
        "--benchmark", action="store_true", help="then measure the file's speed at OPT (speed.json)"
    )
    p.add_argument("--overwrite", action="store_true", help="replace what is there")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("--quiet", action="store_true", help="no progress")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads < 0:
        raise SrkdError(
            f"--threads {args.threads} is negative; give 1 or more, or 0 for all cores."
        )
    if args.benchmark and args.no_parity:
        raise SrkdError(
            "--benchmark measures files whose parity passed; leave out --no-parity, or --benchmark."
        )
    sizes = parse_sizes(args.size, args.static)
    result = export(
        args.model,
        args.engine,
        precision=args.precision,
        out=args.out,
        scale=args.scale,
        sizes=sizes,
        data=args.data,
        parity=not args.no_parity,
        threads=args.threads,
        device=args.device,
        staged=args.staged,
        overwrite=args.overwrite,
        quiet=args.quiet,
    )
    card = None
    if args.benchmark and result.verdict == "PASS":
        from deploy.benchmark import benchmark

        card, path = benchmark(
            [result.file], size=sizes.usual, threads=args.threads, quiet=args.quiet
        )
        result = replace(result, speed=path)
    if args.json:
        print(json.dumps(result.to_json()))
        return result.exit_code
    if result.record is not None:
        for edge in result.record["edges"]:
            print(f"{edge['name']}  {edge['status']:<12}  {edge['compares']}: {edge['reason']}")
    if card is not None:
        from deploy.benchmark import print_card

        print_card(card)
    elif args.benchmark:
        print(
            f"not measured: a file that is {LAST_WORD[result.verdict]} has no speed worth knowing"
        )
    for path in (result.file, result.sidecar, result.report, result.speed):
        if path is not None:
            print(path)
    print(LAST_WORD[result.verdict])
    return result.exit_code


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
