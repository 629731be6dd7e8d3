"""Edge E3: does the engine compute what the graph says, and in the precision that was asked for?

The same ONNX file in ONNX Runtime on the CPU, in float32, against the engine. Two things must hold: the engine
itself says that it runs as asked (`deploy.proof`; another precision is a fault however close the pictures
are), and the pictures agree within the gate of that precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy.comparison import RefusedError, compare, without_lost_patterns
from deploy.engines import CPU_PROVIDER
from deploy.ort_engine import OrtEngine
from deploy.verdict import EdgeResult, Gate, judge, judge_task, with_task_margin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.comparison import Comparison, Float32
    from deploy.engines import Engine
    from deploy.inputs import Input
    from deploy.proof import ProvableEngine
    from deploy.verdict import Status
    from srkd.types import Facts


def gate_name(precision: str) -> str:
    """The table of gates.toml for an engine in `precision`."""
    return "E3" if precision == "fp32" else f"E3_{precision}"


def check_engine(
    graph: Engine,
    engine: ProvableEngine,
    facts: Facts,
    inputs: Sequence[Input],
    gate: Gate,
    precision: str = "fp32",
    float32: Float32 | None = None,
) -> EdgeResult:
    """E3: the graph in ONNX Runtime on the CPU (`graph`) against `engine`, which opened or was built from it.

    `gate` is that of `gate_name(precision)`; what `float32` itself loses on patterns is forgiven. ONNX Runtime
    on the CPU is what the engine is compared with, so for itself there is nothing to compare.
    """
    if isinstance(engine, OrtEngine) and engine.provider == CPU_PROVIDER:
        reason = "the engine is ONNX Runtime on the CPU itself, so E1 covers it"
        if precision == "fp16":
            reason = (
                "ONNX Runtime computes float16 in float32 on a CPU: the file loads and runs, which shows "
                "neither its range nor its speed; run it on a GPU"
            )
        return EdgeResult("E3", "NOT RUN", reason)
    try:
        found = compare(graph, engine, facts, inputs)
    except RefusedError as refused:
        return EdgeResult("E3", "FAIL", str(refused), rows=refused.rows)
    proof = engine.proof(inputs[0].lr)
    found, lost = without_lost_patterns(found, _pattern_gate(gate), float32)
    status, reason = judge_pictures(found, gate)
    reason += lost
    mismatch = proof.mismatch(precision, gate.least_share or 0.0)
    if mismatch is None:
        reason = f"{reason}; convolutions and matrix products: {proof}"
    else:
        known = proof.layers or status == "FAIL"
        status, reason = ("FAIL" if known else "INCONCLUSIVE"), f"{mismatch}; {reason}"
    return EdgeResult("E3", status, reason, found.numbers, rows=found.rows, task=found.task)


def judge_pictures(found: Comparison, gate: Gate) -> tuple[Status, str]:
    """The verdict of the gate on the pictures: parity as in E1, and what the engine costs of the task.

    The bound on parity rises with the network: 25 dB above its own PSNR costs at most 0.014 dB of it. It
    holds for photographs; on patterns a network has no PSNR of its own.
    """
    task, judged = found.task, found
    if found.numbers.nonfinite:
        return judge(found.numbers, gate)
    if gate.pass_task_margin_db is not None and task is not None:
        gate, judged = with_task_margin(gate, task.torch_db), found.only("photograph")
    status, reason = judge(judged.relative, gate)
    if gate.pass_psnr_db is None:
        reason = f"PSNR {judged.relative.psnr_db:.1f} dB, which is not judged"
    least, patterns = gate.fail_pattern_psnr_db, found.only("pattern")
    if least is not None and patterns.parts and patterns.relative.psnr_db < least:
        worst = min(patterns.parts, key=lambda part: part.relative.psnr_db)
        told = f"{worst.item.name}: PSNR {worst.relative.psnr_db:.1f} dB (need {least:.0f} dB)"
        return "FAIL", f"{told}; {reason}"
    return judge_task(status, reason, None if task is None else task.delta_db, gate)


def _pattern_gate(gate: Gate) -> Gate:
    """What patterns are held to: the gate itself, or their own bound where it has one."""
    least = gate.fail_pattern_psnr_db
    if least is None:
        return gate
    return Gate(pass_psnr_db=least, fail_psnr_db=least, float32_errors=gate.float32_errors)
