"""What an artefact was made with, and whether a library is there. Imports nothing heavy."""

from __future__ import annotations

import importlib
import platform
from importlib.metadata import PackageNotFoundError, version

from srkd.errors import MissingError


def srkd_version() -> str:
    return _version("srkd") or "unknown"


def versions() -> dict[str, str]:
    """Versions that decide what an exported file computes, those that are installed."""
    found = {name: _version(name) for name in ("srkd", "torch", "onnx", "onnxscript", "numpy")}
    found["onnxruntime"] = _version("onnxruntime") or _version("onnxruntime-gpu")
    return {"python": platform.python_version(), **{k: v for k, v in found.items() if v}}


def machine() -> str:
    """Operating system and processor, e.g. Linux-x86_64."""
    return f"{platform.system()}-{platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def require(module: str, attribute: str, purpose: str, install: str) -> None:
    """Refuse with a sentence when a library is absent, or is the empty shell a half removal leaves.

    onnxruntime and onnxruntime-gpu share one folder: removing either leaves a module that imports and
    holds nothing, hence `attribute`.
    """
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise MissingError(
            f"{purpose} needs {module}, which is not usable here ({error}); install it: {install}"
        ) from error
    if not hasattr(found, attribute):
        raise MissingError(
            f"{purpose} needs {module}; a folder of that name is there but empty, as removing one of "
            f"two packages that share it leaves it. Install it again: {install}"
        )
