"""The shape of the project: which way imports point, quick --help, no machine's paths, README true."""

from __future__ import annotations

import ast
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("srkd", "deploy", "scripts")
MODULES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
ENTRIES = (*ROOT.glob("scripts/*.py"), ROOT / "deploy/export.py", ROOT / "deploy/benchmark.py")
COMMANDS = [p for p in ENTRIES if p.stem != "__init__"]
HEAVY = ("torch", "onnx", "onnxruntime", "numpy", "rich", "PIL")


def imports_of(path: Path) -> set[str]:
    """Top-level packages that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    forbidden = {"srkd": {"deploy", "demo", "scripts"}, "deploy": {"demo"}, "scripts": set()}
    package = path.relative_to(ROOT).parts[0]
    allowed_entry = path == ROOT / "deploy" / "cli.py"  # the console command calls the scripts
    wrong = imports_of(path) & forbidden[package]
    if package == "deploy" and not allowed_entry:
        wrong |= imports_of(path) & {"scripts"}
    assert not wrong


def test_scripts_do_not_import_scripts() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        assert "scripts" not in imports_of(path), path


@pytest.mark.parametrize("path", COMMANDS, ids=lambda p: p.name)
def test_help_is_instant_and_loads_nothing_heavy(path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(path)!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(path)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert stop.code in (0, None), stop.code\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    begin = cpu_seconds()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and "example" in done.stdout
    assert cpu_seconds() - begin < 1


def cpu_seconds() -> float:
    """Of finished child processes: unlike wall time it does not grow on a busy machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_lists_need_no_torch() -> None:
    code = (
        "import sys; from scripts.distill import main\n"
        "assert main(['--list-networks', '--json']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "rcan_a" in json.loads(done.stdout)


def test_importing_everything_is_silent() -> None:
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES]
    names = [n.removesuffix(".__init__") for n in names]
    code = f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def tracked() -> list[Path]:
    """Text files of the project as git knows them."""
    listed = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    suffixes = {".py", ".md", ".toml", ".txt", ".json", "", ".yml"}
    return [ROOT / line for line in listed.stdout.splitlines() if Path(line).suffix in suffixes]


def test_no_path_of_one_machine() -> None:
    private = re.compile(r"(?<![\w.$}])/(work|root|home|tmp|opt|mnt)/\w")
    for path in tracked():
        if path.is_file() and path.name not in ("LICENSE", Path(__file__).name):
            assert not private.search(path.read_text(encoding="utf-8")), path


def test_no_file_has_grown_past_reading() -> None:
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 500, path


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.slow
def test_readme_python_lines_run(tmp_path: Path) -> None:
    """The API lines of README run as written, in a folder that holds a photo and a recipe."""
    import numpy as np

    from srkd.images import write_png

    blocks = python_blocks()
    assert blocks, "README has lost its Python lines"
    noise = np.random.default_rng(0).integers(0, 256, (24, 30, 3)).astype(np.uint8)
    write_png(tmp_path / "photo.png", noise)
    (tmp_path / "recipe.toml").write_text(
        '[student]\nnetwork = "edsr_tiny"\n[data]\npatch = 12\n[train]\niterations = 2\nbatch = 2\n'
    )
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stderr


def test_readme_names_existing_files_only() -> None:
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link
    for script in re.findall(r"python ((?:scripts|deploy|benchmarks)/\w+\.py)", text):
        assert (ROOT / script).is_file(), script
