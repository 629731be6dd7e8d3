"""The console command `srkd`."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest

from deploy.cli import COMMANDS, main
from srkd.errors import MissingError

ROOT = Path(__file__).resolve().parent.parent.parent


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"srkd {version('srkd')}\n"


@pytest.mark.parametrize(("words", "said"), [([], "usage"), (["exprot"], "did you mean 'export'?")])
def test_bad_requests(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""


def test_commands_exist_and_take_arguments() -> None:
    for module, _ in COMMANDS.values():
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_arguments_and_exit_codes_pass_through(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def command(argv: list[str]) -> int:
        seen.append(argv)
        if argv == ["gone"]:
            raise MissingError("no GPU here.")
        return 1

    module = types.ModuleType("scripts.cost")
    module.main = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "scripts.cost", module)
    assert main(["cost", "--help", "x"]) == 1
    assert main(["cost", "gone"]) == 3
    assert seen == [["--help", "x"], ["gone"]]
    assert capsys.readouterr().err == "error: no GPU here.\n"


def test_starts_without_torch_and_names_itself() -> None:
    code = (
        "import sys; from deploy.cli import main\n"
        "sys.argv = ['srkd', 'export', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: srkd export ")
