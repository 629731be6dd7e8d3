"""The machine that a time was measured on: processors, GPU, libraries, and what else ran meanwhile.

Nothing is changed: clocks are read, never locked. What a system does not tell is None, "not known".
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.machine import machine, versions
from srkd.errors import CheckFailedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

PROC = Path("/proc")
MIB = 2**20
# What decides how many threads compute, and whether they spin while they wait.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "KMP_BLOCKTIME")
GPU_FIELDS = (
    "name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu",
    "power.draw", "clocks_throttle_reasons.active", "utilization.gpu", "memory.used", "ecc.mode.current",
    "mig.mode.current",
)  # fmt: skip
# Bits of NVML's clocks event reasons that mean less than the GPU could do.
THROTTLE = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
PROBES, PROBE_S, QUIET = 10, 1.0, 0.10


# --- what else runs -----------------------------------------------------------------------------


@dataclass(frozen=True)
class CpuTimes:
    """Seconds since the start of the machine, summed over the processors of this process; own ones of the process."""

    total: float
    idle: float
    own: float


def read_cpu_times() -> CpuTimes | None:
    """None where there is no /proc/stat."""
    try:
        text = (PROC / "stat").read_text()
    except OSError:
        return None
    used = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    own = sum(u.ru_utime + u.ru_stime for u in used)
    return parse_cpu_times(text, affinity(), os.sysconf("SC_CLK_TCK"), own)


def parse_cpu_times(stat: str, cpus: list[int], ticks_per_s: int, own_s: float) -> CpuTimes:
    """From the text of /proc/stat. Waiting for a disk is idle; time stolen by other virtual machines is not."""
    total = idle = 0
    for line in stat.splitlines():
        name, *values = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cpus:
            # user nice system idle iowait irq softirq steal; guest time is in user already
            ticks = [int(v) for v in values[:8]]
            total += sum(ticks)
            idle += ticks[3] + ticks[4]
    return CpuTimes(total / ticks_per_s, idle / ticks_per_s, own_s)


class Others:
    """Share of this process's processors that other work took since the last call, 0 to 1; None: not known."""

    def __init__(self, read: Callable[[], CpuTimes | None] = read_cpu_times) -> None:
        self.read = read
        self.last = read()

    def __call__(self) -> float | None:
        before, self.last = self.last, self.read()
        if before is None or self.last is None:
            return None
        total = self.last.total - before.total
        known = (self.last.idle - before.idle) + (self.last.own - before.own)
        return min(max(0.0, 1 - known / total), 1.0) if total > 0 else 0.0


def wait_until_quiet(
    others: Callable[[], float | None], sleep: Callable[[float], object] = time.sleep
) -> float | None:
    """The share of the processors that others take now; refused when it stays above 10 % for ten seconds."""
    shares = []
    for _ in range(PROBES):
        others()
        sleep(PROBE_S)
        share = others()
        if share is None or share <= QUIET:
            return share
        shares.append(share)
    raise CheckFailedError(
        f"the machine is busy: other work took {100 * min(shares):.0f} to {100 * max(shares):.0f} % of its "
        f"processors for {PROBES * PROBE_S:.0f} s, and times measured now would mean nothing; close other "
        "programs and measure again."
    )


# --- what it is ---------------------------------------------------------------------------------


def affinity() -> list[int]:
    """The processors that this process may use."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def describe() -> dict[str, Any]:
    """What does not change while measuring."""
    return {
        "machine": machine(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "affinity": affinity(),
        "system": platform.release(),
        "variables": {v: os.environ[v] for v in THREAD_VARIABLES if v in os.environ},
        "versions": versions(),
    }


def snapshot() -> dict[str, Any]:
    """What may change while measuring. `gpus` is empty without nvidia-smi; clocks are not locked by us."""
    return {"load_average": round(os.getloadavg()[0], 2), "gpus": read_gpus()}


def _cpu_name() -> str:
    try:
        lines = (PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def read_gpus() -> list[dict[str, str]]:
    """Every GPU as nvidia-smi sees it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = [program, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [{"error": f"nvidia-smi: {error}"}]
    return parse_gpus(done.stdout)


def check_gpus(gpus: list[dict[str, str]]) -> None:
    """Refuse GPUs that others keep busy before anything of ours runs."""
    for gpu in gpus:
        used = gpu.get("utilization.gpu", "").split(" ")[0]
        if used.isdecimal() and int(used) > 100 * QUIET:
            raise CheckFailedError(
                f"{gpu['name']} is {used} % busy with other work, and times measured now would mean nothing; end "
                "that work and measure again."
            )


def throttled(gpus: list[dict[str, str]]) -> list[str]:
    """A sentence for each GPU that is being slowed down by heat or power."""
    found = []
    for gpu in gpus:
        mask = gpu.get("clocks_throttle_reasons.active", "")
        reasons = [
            about
            for bit, about in THROTTLE.items()
            if mask.startswith("0x") and int(mask, 16) & bit
        ]
        if reasons:
            found.append(f"{gpu['name']} was slowed down: {', '.join(reasons)}")
    return found


def parse_gpus(text: str) -> list[dict[str, str]]:
    """Lines of nvidia-smi's CSV, one GPU each."""
    rows = [[value.strip() for value in line.split(",")] for line in text.splitlines() if line]
    return [dict(zip(GPU_FIELDS, row, strict=False)) for row in rows]


# --- memory -------------------------------------------------------------------------------------


class PeakMemory:
    """Resident memory that the lines inside `with` added to this process at their peak, in MiB.

    `added_mib` is None where the system keeps no peak that can be set back (Linux does).
    """

    def __init__(self, proc: Path = PROC / "self") -> None:
        self.proc = proc
        self.added_mib: float | None = None

    def __enter__(self) -> PeakMemory:
        self.before = self._mib("VmRSS")
        try:
            (self.proc / "clear_refs").write_text("5")  # 5: the peak starts again from now
        except OSError:
            self.before = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        peak = self._mib("VmHWM")
        if self.before is not None and peak is not None:
            self.added_mib = max(0.0, peak - self.before)

    def _mib(self, field: str) -> float | None:
        try:
            lines = (self.proc / "status").read_text().splitlines()
        except OSError:
            return None
        values = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
        return next((int(kib) / 1024 for kib in values), None)
