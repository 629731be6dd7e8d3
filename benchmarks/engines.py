"""How fast every engine of this machine's processor runs three networks, side by side in one run.

    python benchmarks/engines.py --json benchmarks/results/engines.json --markdown engines.md
    python benchmarks/engines.py --staged         also graphs whose upsampling is as trained, as rows of their own
    python benchmarks/engines.py --quick          a rehearsal: small pictures, few runs, a busy machine is accepted

EDSR-baseline, RCAN-A and SwinIR lightweight at x4 on photographs of 256x256, with fresh weights: time does not
depend on them. Every engine and precision that is here, opened on one exported fp32 graph or on the network itself, takes
turns with torch eager fp32 of the same number of threads. PSNR is against that row on a photograph: what an engine
computes, not how well. Networks of which a run takes seconds get ten runs (six with --quick).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploy.graph import Graph
    from deploy.subjects import Subject
    from srkd.loaded import LoadedModel

ENGINES = "torch,ort,openvino"
NETWORKS = "edsr_baseline,rcan_a,swinir_lightweight"
SCALE = 4


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--networks", default=NETWORKS, help="of the zoo, comma-separated")
    p.add_argument(
        "--engines",
        default=ENGINES,
        help="comma-separated (default: %(default)s; torch-compile takes minutes more)",
    )
    p.add_argument(
        "--staged", action="store_true", help="also graphs with the upsampling as trained"
    )
    p.add_argument("--size", default="256x256", metavar="HxW")
    p.add_argument("--threads", type=int, help="default: all cores")
    p.add_argument("--quick", action="store_true", help="a rehearsal; its figures mean nothing")
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--markdown", type=Path, metavar="FILE")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch

    from deploy.benchmark import parse_size
    from deploy.environment import Others, affinity, describe, snapshot, wait_until_quiet
    from deploy.speed import Limits, WallClock, check_watch
    from srkd.files import write_json, write_text

    size = (32, 32) if args.quick else parse_size(args.size)
    threads = args.threads or len(affinity())
    torch.set_num_threads(threads)
    # The longest rows need seconds a run: three runs a window, one run a turn, all in about eight minutes.
    full = Limits(seconds=3.0, runs=100, longest_s=6.0, drift=0.02)
    quick = Limits(seconds=0.1, runs=6, longest_s=0.2, rounds=3, warm_up_s=0.1, drift=9.0)
    limits = quick if args.quick else full
    others = Others()

    def idle() -> float | None:
        return 0.0 if args.quick else others()

    before = {"others": wait_until_quiet(idle), **snapshot()}
    result: dict[str, Any] = {
        "rehearsal": args.quick,
        "size": [*size],
        "scale": SCALE,
        "threads": threads,
        "weights": "fresh, seed 0",
        "environment": {"machine": describe(), "before": before},
        "self_test": {} if args.quick else check_watch(WallClock()),
        "networks": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks.split(","):
            result["networks"][name] = measure_network(
                name, args.engines, size, threads, limits, idle, Path(folder), args.staged
            )
    result["environment"]["after"] = snapshot()
    text = markdown(result)
    print(text)
    if args.markdown:
        write_text(args.markdown, text)
    if args.json:
        write_json(args.json, result)
    return 0


def measure_network(
    name: str,
    engines: str,
    size: tuple[int, int],
    threads: int,
    limits: Any,
    others: Any,
    folder: Path,
    staged: bool,
) -> dict[str, Any]:
    """All engines on one network, torch eager fp32 first."""
    import torch

    from deploy.graph import export_graph
    from deploy.speed_card import measure_rows, pictures, to_floats
    from srkd.errors import SrkdError
    from srkd.models import load_model, save_model
    from srkd.networks import build

    torch.manual_seed(0)
    save_model(folder / name, build(name, SCALE), {})
    model = load_model(folder / name)
    graph = export_graph(model, folder / f"{name}.onnx")
    graphs = [graph]
    if staged and graph.collapsed:
        graphs.append(export_graph(model, folder / f"{name}_staged.onnx", staged=True))
    lr = to_floats(pictures(size, SCALE, 1))
    subjects, missing = [], {}
    wanted = [
        (e, p, g) for e, p in candidates(engines) for g in graphs[: 1 if of_network(e) else 2]
    ]
    for engine, precision, used in wanted:
        try:
            subjects.append(open_here(model, used, engine, precision, threads, lr, subjects))
        except SrkdError as error:
            missing[f"{engine} {precision}"] = str(error)
    print(f"{name}: {', '.join(s.name for s in subjects)}", file=sys.stderr)
    rows, comparisons = measure_rows(
        subjects, size, 1, limits, others, lambda text: None, ["compute"]
    )
    against = {c.a: c for _, c in comparisons if c.b == subjects[0].name}
    found = []
    for row in rows:
        c = against.get(row.subject.name)
        ratio = None if c is None else {"speed": c.speed, "low": c.low, "high": c.high}
        judged = None if c is None else c.judged
        found.append({**row.to_json(), "parity": row.subject.parity, "ratio": ratio, "is": judged})
    return {"rows": found, "not_here": missing}


def candidates(engines: str) -> Iterator[tuple[str, str]]:
    """torch fp32 first, then every engine that is asked for in what it computes of an fp32 graph on a CPU."""
    from deploy.engines import engine_kind

    yield "torch", "fp32"
    for engine in engines.split(","):
        kind = engine_kind(engine)
        here = kind.runs.get("cpu", ()) if kind.rounds or kind.source == "network" else ("fp32",)
        yield from ((engine, p) for p in here if (engine, p) != ("torch", "fp32"))


def of_network(engine: str) -> bool:
    """Whether it runs the network itself, not a graph."""
    from deploy.engines import engine_kind

    return engine_kind(engine).source == "network"


def open_here(
    model: LoadedModel,
    graph: Graph,
    engine: str,
    precision: str,
    threads: int,
    lr: Any,
    before: list[Subject],
) -> Subject:
    """One engine on the network or its fp32 graph; SrkdError where this machine or version has none.

    `before` are the engines that are open, torch fp32 first.
    """
    from deploy.engines import engine_kind, engine_settings, open_engine
    from deploy.subjects import Subject, compared, open_model, start

    kind = engine_kind(engine, precision)
    if kind.source == "network":
        return open_model(model, engine, precision, lr, lambda: before[0].opened.first, threads)
    settings = engine_settings(engine, precision, threads=threads)
    opened = start(lambda: open_engine(engine, graph.path, model.scale, settings), lr)
    told = ", collapsed" if graph.collapsed else ""
    return Subject(
        name=f"{model.name} {engine} {precision}{told}",
        model=model.name,
        engine=engine,
        precision=precision,
        facts=model.facts,
        folder=graph.path.parent,
        settings=settings,
        threads=threads,
        device="cpu",
        opened=opened,
        parity=compared(before[0].opened.first, opened.first),
    )


def markdown(result: dict[str, Any]) -> str:
    """The figures as a table."""
    h, w = result["size"]
    threads, scale = result["threads"], result["scale"]
    lines = [
        f"LR {h}x{w}, x{scale}, {threads} threads, {result['weights']}; ms: median; ratio: to torch fp32, "
        "95 % interval",
        "",
        "| network | engine | ms | p99 | n | ratio | | PSNR to torch fp32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if result["rehearsal"]:
        lines.insert(0, "A REHEARSAL: these figures mean nothing.\n")
    for name, found in result["networks"].items():
        for row in found["rows"]:
            engine = row["name"].removeprefix(f"{name} ")
            if row["verdict"] == "INCONCLUSIVE":
                lines.append(f"| {name} | {engine} | INCONCLUSIVE | | | | | |")
                continue
            r, psnr = row["ratio"], row["parity"]["psnr_db"]
            ratio = "1" if r is None else f"{r['speed']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
            ms = f"{row['p50_ms']:.1f} | {row['p99_ms']:.1f} | {row['n']}"
            same = "" if psnr is None else f"{psnr:.1f} dB"
            lines.append(f"| {name} | {engine} | {ms} | {ratio} | {row['is'] or ''} | {same} |")
        lines += [
            f"| {name} | {engine} | not here: {reason} | | | | | |"
            for engine, reason in found["not_here"].items()
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
