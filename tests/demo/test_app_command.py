"""`python demo/app.py`: its help, its refusals, its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_service import write_run

from demo import app
from srkd.console import run_command

ROOT = Path(__file__).parents[2]


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = run_command(app.main, list(argv))
    return code, capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['app.py', '--help']\n"
        "try: import demo.app as app; app.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'gradio'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


def test_a_taken_port_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = refusal(capsys, "--port", str(port))
    assert code == 2
    assert f"port {port}" in said
    assert "--port" in said


def test_scores_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "--port", "70000") == (
        2,
        "error: --port 70000 is no port; give 1 to 65535, or 0 for any free one.\n",
    )
    code, said = refusal(capsys, "--max-lr-px", "0")
    assert code == 2
    assert "--max-lr-px 0" in said


def test_without_gradio_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, said = refusal(capsys)
    assert code == 3
    assert "pip install -e .[demo]" in said


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_it_says_its_address_and_leaves_nothing_when_interrupted(
    tmp_path: Path, end: signal.Signals
) -> None:
    run = write_run(tmp_path / "run", 1, {})
    places = {"TMPDIR": str(tmp_path), "SRKD_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "demo/app.py", "--port", "0", "--model", str(run)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **places},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("srkd demo: http://127.0.0.1:")
        server.send_signal(end)
        rest, said = server.communicate(timeout=60)
    assert (server.returncode, rest) == (130, "")
    assert said.strip() == "interrupted"
    assert not list(tmp_path.glob("srkd-demo-*"))
