"""What benchmarks/training.py makes of logs: laps, ratios, the share of the ceiling, the table."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.peers.basicsr_run import laps, network_of, parameters
from benchmarks.training import against, figure, main, markdown, summary
from srkd.errors import SrkdError
from srkd.networks import build

HEAD = "2026-01-01 00:00:00,000 INFO: [peer..][epoch:  0, iter:"


def test_laps_of_basicsr_by_hand() -> None:
    """Means since the beginning: 10 iterations of 2 s, then 10 of 1 s, then 20 of 0.5 s, half of it data."""
    log = "\n".join(
        [
            "INFO: Network: EDSR, with parameters: 1,517,571",
            f"{HEAD}      10, lr:(1.000e-04,)] [eta: 0:00:09, time (data): 2.000 (0.500)] l_pix: 1.0e-01",
            f"{HEAD}      20, lr:(1.000e-04,)] [eta: 0:00:09, time (data): 1.500 (0.250)] l_pix: 1.0e-01",
            f"{HEAD}      40, lr:(1.000e-04,)] [eta: 0:00:09, time (data): 1.000 (0.250)] l_pix: 1.0e-01",
        ]
    )
    assert laps(log) == [(pytest.approx(1.0), 0.0), (pytest.approx(0.5), pytest.approx(0.5))]
    assert parameters(log) == 1_517_571
    with pytest.raises(ValueError, match="begin afresh"):
        laps(log.replace("      40,", "   1,000,"))


def test_networks_that_both_have() -> None:
    edsr, rcan, light = (
        build(name, 4) for name in ("edsr_baseline", "rcan_a", "swinir_lightweight")
    )
    assert (network_of("edsr", edsr.arguments) or {})["num_block"] == 16
    assert (network_of("rcan", rcan.arguments) or {})["squeeze_factor"] == 16
    assert network_of("swinir", light.arguments) is None


def found() -> dict[str, Any]:
    peak = {"fp32": 100.0, "bf16": 400.0}
    ours = [
        {
            "precision": "bf16",
            "laps": [(0.1, 0.0), (0.2, 0.5), (0.1, 0.1)],
            "flop": 20e9,
            "memory_mib": 9.0,
        }
    ]
    plain = [{"precision": "fp32", "laps": [(0.4, 0.0)], "flop": 20e9, "memory_mib": 8.0}]
    theirs = [{"precision": "fp32", "laps": [(0.8, 0.2)], "memory_mib": 7.0}]
    rows = {"scratch fp32": plain, "scratch bf16": ours, "BasicSR": theirs}
    facts = {
        "rehearsal": False,
        "scale": 4,
        "batch": 16,
        "patch": 48,
        "threads": 2,
        "device": "cpu",
    }
    return {
        **facts,
        "peer": "BasicSR 1.4.2",
        "ceiling_gflop_per_s": peak,
        "rows": {f"rcan_a/{row}": summary(runs, peak) for row, runs in rows.items()},
    }


def test_summary_by_hand() -> None:
    result = found()
    row = result["rows"]["rcan_a/scratch bf16"]
    assert (row["steps_per_s"], row["data_wait"], row["gflop_per_s"]) == pytest.approx(
        (10, 0.1, 200)
    )
    assert row["of_ceiling"] == pytest.approx(0.5)  # of the ceiling in its own precision
    assert against(result, "rcan_a/scratch bf16") == pytest.approx(8)
    assert (
        "| rcan_a | scratch bf16 | 10.00 | 100 (100 to 200) | 8.00 | 10.0 % | 200 | 50 % | 9 |"
        in markdown(result)
    )


def test_without_the_peer_the_ratio_is_to_our_fp32() -> None:
    result = found()
    del result["rows"]["rcan_a/BasicSR"]
    result["peer"] = "not installed"
    assert against(result, "rcan_a/scratch bf16") == pytest.approx(4)
    assert "BasicSR: not installed" in markdown(result) and "x fp32 of ours" in markdown(result)
    assert figure(result).startswith("<svg") and "steps per second" in figure(result)


@pytest.mark.parametrize("processes", ["1", "1000"])
def test_processes_share_out_the_threads(processes: str) -> None:
    with pytest.raises(SrkdError, match="--processes shares"):
        main(["--processes", processes])
