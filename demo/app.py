"""The comparison page: teacher, students, bicubic and nearest side by side, in the browser."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from srkd.console import run_command
from srkd.errors import MissingError, SrkdError

EXAMPLES = """\
examples:
  python demo/app.py
  python demo/app.py --model runs/mine --model runs/baseline/student
  python demo/app.py --host 0.0.0.0 --port 8080 --max-lr-px 250000

The networks of weights/ are on the page, and those given by --model. Uploads are pictures only, never weights.
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo/app.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="a further network: run folder, .safetensors or exported file; repeat for more",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=7860, help="0: any free one (default %(default)s)"
    )
    parser.add_argument(
        "--max-lr-px",
        type=int,
        metavar="N",
        help="most pixels of an uploaded LR picture (default: 2 megapixels)",
    )
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=16,
        metavar="N",
        help="jobs that may wait in line (default %(default)s)",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        raise SrkdError(f"--port {args.port} is no port; give 1 to 65535, or 0 for any free one.")
    for option in ("max_lr_px", "max_waiting"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise SrkdError(f"--{option.replace('_', '-')} {value} allows nothing; give 1 or more.")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if find_spec("gradio") is None:
        raise MissingError("The page needs gradio, which is not installed: pip install -e .[demo]")
    port = free_port(args.host, args.port)  # before anything that takes long
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="srkd-demo-"))
    # Read by Gradio when it is imported. A folder of its own: the usual one is shared by all pages of a machine.
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        return run(args, port, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port(host: str, port: int) -> int:
    """`port` if nothing listens there, any free one for 0."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SrkdError(
                f"The page cannot listen on {host} port {port} ({error.strerror}); "
                "give another --port (0: any free one) or another --host."
            ) from error
        return probe.getsockname()[1]


def run(args: argparse.Namespace, port: int, folder: Path) -> int:
    """Serve until interrupted."""
    from demo.limits import Limits
    from demo.page import build
    from demo.server import serve
    from demo.service import Service
    from demo.widgets import head
    from demo.workspace import Workspace

    limits = Limits() if args.max_lr_px is None else replace(Limits(), max_lr_px=args.max_lr_px)
    service = Service(args.model, limits, Workspace(folder / "results"))
    page = build(service, folder)
    address = serve(
        page,
        limits=limits,
        folder=folder,
        head=head(),
        host=args.host,
        port=port,
        waiting=args.max_waiting,
    )
    if args.host in ("0.0.0.0", "::"):
        print(
            "warning: other machines can reach this page, and whoever knows the address of a picture can read it.",
            file=sys.stderr,
        )
    print(f"srkd demo: {address}", flush=True)
    try:
        threading.Event().wait()
    finally:
        service.close()
        page.close(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
