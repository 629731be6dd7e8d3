"""Many users at once on the demo: python demo/app.py in a process of its own, each user a gradio_client.

Every user uploads pictures that nobody else has, has them compared, and reads what comes back: nearest must be the own
picture repeated, the network's picture that of `srkd.upscale`, to the pixel. An answer is one of

    right     both pictures are the user's own
    wrong     a picture of something else: of another user, or damaged
    refused   the server said that its queue is full; the user waits and tries again
    lost      any other error, or no answer within `ANSWER_S` seconds

Times are of the right answers, from the upload to the last picture read, waiting in line included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MODEL = "rcan_c_x4"
ANSWER_S = 120
TRY_AGAIN_S = 1.0
PICTURES = 3  # of each user, in turn
SAMPLE_S = 0.5
EXAMPLES = """\
examples:
  python benchmarks/demo_load.py
  python benchmarks/demo_load.py --users 40 --seconds 30 --max-waiting 64 --json
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--users", type=int, default=20)
    p.add_argument("--seconds", type=float, default=120, help="new requests begin (default: 120)")
    p.add_argument("--size", type=int, default=32, help="side of the LR pictures (default: 32)")
    p.add_argument("--max-waiting", type=int, help="of the server (default: its own)")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args)
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(lines(found)))
    return 1 if found["wrong"] or found["lost"] else 0


def lines(found: dict[str, Any]) -> list[str]:
    memory = found["server_mib"]
    return [
        f"{found['users']} users for {found['seconds']:.0f} s, LR {found['size']}x{found['size']} px, {MODEL}",
        f"answers      {found['right']} right, {found['wrong']} wrong, {found['lost']} lost",
        f"refused      {found['refused']} (queue full), each user answered at least {found['fewest']} times",
        f"response     p50 {found['p50_s']:.2f} s, p95 {found['p95_s']:.2f} s, longest {found['max_s']:.2f} s",
        f"throughput   {found['per_second']:.2f} comparisons a second",
        f"server       {memory['first']} MiB at first, {memory['peak']} MiB at most, {memory['last']} MiB at the end",
        *(f"error        {text}" for text in found["errors"]),
    ]


@dataclass
class User:
    """One user's pictures with what must come back, and what came."""

    pictures: list[Path]
    nearest: list[np.ndarray]
    networks: list[np.ndarray]
    answers: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from deploy.environment import describe, snapshot

    users = [make_user(folder / f"user{n}", n, args.size) for n in range(args.users)]
    waiting = [] if args.max_waiting is None else ["--max-waiting", str(args.max_waiting)]
    command = [sys.executable, "demo/app.py", "--port", "0", *waiting]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    ) as server:
        try:
            address = address_of(server)
            ask(users[0], address, folder / "warm", until=0.0)  # loads the network
            users[0] = make_user(folder / "user0", 0, args.size)
            memory = [resident_mib(server.pid)]
            begin = time.monotonic()
            until = begin + args.seconds
            threads = [
                threading.Thread(target=ask, args=(user, address, folder / f"got{n}", until))
                for n, user in enumerate(users)
            ]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(SAMPLE_S)
                memory.append(resident_mib(server.pid))
            elapsed = time.monotonic() - begin
        finally:
            server.terminate()
    total = sum((user.answers for user in users), Counter[str]())
    seconds = sorted(s for user in users for s in user.seconds)
    percentiles = np.percentile(seconds, [50, 95, 100]) if seconds else [float("nan")] * 3
    return {
        "users": args.users,
        "seconds": args.seconds,
        "size": args.size,
        "max_waiting": args.max_waiting,
        **{what: total[what] for what in ("right", "wrong", "refused", "lost")},
        "fewest": min(user.answers["right"] for user in users),
        **{
            name: round(float(value), 3)
            for name, value in zip(("p50_s", "p95_s", "max_s"), percentiles, strict=True)
        },
        "per_second": round(total["right"] / elapsed, 3),
        "server_mib": {"first": memory[0], "peak": max(memory), "last": memory[-1]},
        "errors": sorted({text for user in users for text in user.errors})[:5],
        "environment": {**describe(), **snapshot()},
    }


def make_user(folder: Path, number: int, size: int) -> User:
    """Pictures of random blocks, each unlike all others."""
    import numpy as np

    from srkd import upscale
    from srkd.images import write_png
    from srkd.models import load_model

    model = load_model(MODEL)
    user = User([], [], [])
    for n in range(PICTURES):
        rng = np.random.default_rng([number, n])
        blocks = rng.integers(0, 256, (-(-size // 4), -(-size // 4), 3), dtype=np.uint8)
        lr = blocks.repeat(4, 0).repeat(4, 1)[:size, :size]
        path = folder / f"picture{n}.png"
        write_png(path, lr)
        user.pictures.append(path)
        user.nearest.append(lr.repeat(model.scale, 0).repeat(model.scale, 1))
        user.networks.append(upscale(lr, model))
    return user


def address_of(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    line = server.stdout.readline()
    found = re.search(r"http://\S+", line)
    if not found:
        raise SystemExit(f"the demo did not start: {line!r}")
    return found.group()


def ask(user: User, address: str, folder: Path, until: float) -> None:
    """One comparison after the other, at least one, begun before `until`."""
    from gradio_client import Client

    # By default httpx gives up after seconds, which no browser does.
    patience = {"timeout": ANSWER_S}
    client = Client(address, verbose=False, download_files=folder, httpx_kwargs=patience)
    number = 0
    while not number or time.monotonic() < until:
        begin = time.monotonic()
        what = one(user, client, number % PICTURES)
        user.answers[what] += 1
        if what == "right":
            user.seconds.append(time.monotonic() - begin)
        if what == "refused":
            time.sleep(TRY_AGAIN_S)
        else:
            number += 1


def one(user: User, client: Any, n: int) -> str:
    import numpy as np
    from gradio_client import handle_file

    from srkd.images import read_rgb8

    try:
        job = client.submit(
            file=handle_file(str(user.pictures[n])), models=[MODEL], api_name="/compare"
        )
        files, _ = job.result(timeout=ANSWER_S)
    except Exception as error:  # whatever a client raises is what its user gets
        text = f"{type(error).__name__}: {error}"
        if "queue is full" in text.lower():
            return "refused"
        user.errors.append(text)
        return "lost"
    found = {Path(file).stem: read_rgb8(Path(file)) for file in files}
    right = np.array_equal(found["nearest"], user.nearest[n]) and np.array_equal(
        found[MODEL], user.networks[n]
    )
    return "right" if right else "wrong"


def resident_mib(pid: int) -> int:
    """Resident memory of a process, from Linux's /proc."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    return int(found.group(1)) // 1024 if found else 0


if __name__ == "__main__":
    sys.exit(main())
