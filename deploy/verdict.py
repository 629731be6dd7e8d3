"""What an edge of the parity chain can say, and when: numbers, gates, verdicts.

Three outcomes, never two: what could not be decided (too few photographs, numbers between the gates) is
INCONCLUSIVE. Edges that do not apply or cannot run here are NOT RUN, with the reason. Gates: gates.toml.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from srkd.errors import SrkdError

if TYPE_CHECKING:
    import numpy as np

    from deploy.difference import Difference

Status = Literal["PASS", "FAIL", "INCONCLUSIVE", "NOT RUN"]
GATES_FILE = Path(__file__).with_name("gates.toml")


@dataclass(frozen=True)
class Edge:
    name: str
    compares: str
    catches: str


EDGES = (
    Edge("E0", "trained network vs deployed network", "folding and rescaling"),
    Edge("E1", "torch fp32 vs ONNX fp32 in ONNX Runtime, CPU", "the exporter"),
    Edge("E2", "ONNX fp32 vs ONNX fp16", "loss and overflow of half precision"),
    Edge("E3", "ONNX in ONNX Runtime vs the engine", "the engine"),
    Edge("E4", "the engine at two shapes", "sizes baked into graph or engine"),
    Edge("E5", "whole picture vs tiles", "halo and joints"),
)


@dataclass(frozen=True)
class Gate:
    """Bounds of one edge; what is None is not asked. PSNR in dB with peak 1.

    `pass_task_margin_db`  parity must exceed the network's own PSNR against HR by this much
    `pass_task_delta_db`   what the engine may change of that PSNR; a loss is negative
    `fail_pattern_psnr_db` parity on patterns, where photographs alone are held to the PSNR above
    `float32_errors`       how many times float32's own error, on patterns, no edge counts as a fault
    `least_share`          share of convolutions and matrix products in the precision asked for
    """

    pass_max_abs: float | None = None
    fail_max_abs: float | None = None
    pass_psnr_db: float | None = None
    fail_psnr_db: float | None = None
    pass_seam: float | None = None
    fail_seam: float | None = None
    pass_task_margin_db: float | None = None
    pass_task_delta_db: float | None = None
    fail_task_delta_db: float | None = None
    fail_pattern_psnr_db: float | None = None
    float32_errors: float | None = None
    least_share: float | None = None


def read_gates(path: Path = GATES_FILE) -> dict[str, Gate]:
    """The gates by edge: E0 to E5, with the case where an edge has several (E3_fp16, E5_exact)."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        return {name: Gate(**table) for name, table in tables.items()}
    except (OSError, tomllib.TOMLDecodeError, TypeError) as error:
        raise SrkdError(f"cannot read the gates in {path}: {error}. Restore the file.") from error


@dataclass(frozen=True)
class Task:
    """Mean PSNR-Y in dB against HR of the reference (the network in torch, in E1) and of the engine, on the
    same photographs."""

    photographs: int
    torch_db: float
    engine_db: float

    @property
    def delta_db(self) -> float:
        return 0.0 if self.torch_db == self.engine_db else self.engine_db - self.torch_db


@dataclass(frozen=True)
class EdgeResult:
    """Verdict of one edge, its numbers over all gated inputs, a row per input, and what it costs the task."""

    edge: str
    status: Status
    reason: str
    numbers: Difference | None = None
    seam: float | None = None
    rows: tuple[dict[str, Any], ...] = ()
    task: Task | None = None


@dataclass(frozen=True)
class Worst:
    """The input with the largest error of an edge: reference and candidate (1, 3, H, W), and where in it."""

    name: str
    reference: np.ndarray
    candidate: np.ndarray
    y: int
    x: int
    edge: str = "E1"


def edge_json(result: EdgeResult) -> dict[str, Any]:
    about = next(e for e in EDGES if e.name == result.edge)
    seam = result.seam if result.seam is None or math.isfinite(result.seam) else None
    return {
        **asdict(about),
        "status": result.status,
        "reason": result.reason,
        "numbers": None if result.numbers is None else result.numbers.to_json(),
        "seam": seam,
        "rows": list(result.rows),
    }


def judge(numbers: Difference, gate: Gate, seam: float | None = None) -> tuple[Status, str]:
    """The verdict of a gate and the sentence that explains it."""
    if numbers.nonfinite:
        return "FAIL", f"{numbers.nonfinite} of {numbers.values} values are NaN or infinite"
    # name, value, bounds; larger is worse. PSNR is turned round for that.
    bounds = [
        ("max abs", numbers.max_abs, gate.pass_max_abs, gate.fail_max_abs),
        ("-PSNR", -numbers.psnr_db, _minus(gate.pass_psnr_db), _minus(gate.fail_psnr_db)),
        ("seam score", seam or 0.0, gate.pass_seam, gate.fail_seam),
    ]
    said = [_said(name, value, limit) for name, value, _, limit in bounds if _over(value, limit)]
    if said:
        return "FAIL", "; ".join(said)
    said = [_said(name, value, limit) for name, value, limit, _ in bounds if _over(value, limit)]
    if said:
        return "INCONCLUSIVE", "; ".join(said)
    return "PASS", "; ".join(
        _measured(name, value) for name, value, limit, _ in bounds if limit is not None
    )


def with_task_margin(gate: Gate, task_db: float | None) -> Gate:
    """`gate` with the PSNR to pass raised to the task's own, `task_db`, and the margin that it asks for.

    With errors that are independent of the network's own, 25 dB above the task cost at most 0.014 dB
    (`deploy.difference`).
    """
    if gate.pass_task_margin_db is None or task_db is None:
        return gate
    need = task_db + gate.pass_task_margin_db
    return replace(gate, pass_psnr_db=max(need, gate.pass_psnr_db or need))


def judge_task(
    status: Status, reason: str, delta_db: float | None, gate: Gate
) -> tuple[Status, str]:
    """A verdict on pictures, with what the gate says of the change of the task's PSNR.

    `delta_db` is None where no input has an original: then nothing passes.
    """
    if gate.pass_task_delta_db is None:
        return status, reason
    if delta_db is None:
        unknown = "the cost is unknown, because no photograph came with its original: choose a set with --data"
        return worse(status, "INCONCLUSIVE"), f"{reason}; {unknown}"
    told = f"{reason}; task PSNR {delta_db:+.4f} dB"
    bounds: tuple[tuple[Status, float | None], ...] = (
        ("FAIL", gate.fail_task_delta_db),
        ("INCONCLUSIVE", gate.pass_task_delta_db),
    )
    for verdict, least in bounds:
        if least is not None and delta_db < least:
            return worse(status, verdict), f"{told} (need at least {least:+g} dB)"
    return status, told


def worse(one: Status, other: Status) -> Status:
    return next(status for status in ("FAIL", "INCONCLUSIVE", "PASS") if status in (one, other))


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def _over(value: float, limit: float | None) -> bool:
    return limit is not None and not value <= limit


def _measured(name: str, value: float) -> str:
    return f"PSNR {-value:.1f} dB" if name == "-PSNR" else f"{name} {value:.2g}"


def _said(name: str, value: float, limit: float | None) -> str:
    assert limit is not None
    need = f"need {-limit:.0f} dB" if name == "-PSNR" else f"need at most {limit:g}"
    return f"{_measured(name, value)} ({need})"
