"""What an artefact was made with, and whether a library is there. Imports nothing heavy."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from srkd.errors import MissingError

# Importing openvino reports that to its makers through this module. Where it is absent, openvino takes the
# silent stand-in that it brings along.
TELEMETRY = "openvino_telemetry"


def srkd_version() -> str:
    return _version("srkd") or "unknown"


def versions() -> dict[str, str]:
    """Versions that decide what an exported file computes, those that are installed."""
    found = {name: _version(name) for name in ("srkd", "torch", "onnx", "onnxscript", "numpy")}
    found["onnxruntime"] = _version("onnxruntime") or _version("onnxruntime-gpu")
    found["openvino"] = _version("openvino")
    found["tensorrt"] = _version("tensorrt")
    found["tensorrt_rtx"] = _version("tensorrt-rtx-cu13")
    return {"python": platform.python_version(), **{k: v for k, v in found.items() if v}}


def machine() -> str:
    """Operating system and processor, e.g. Linux-x86_64."""
    return f"{platform.system()}-{platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: its name, and its compute capability such as 9.0."""

    name: str
    capability: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability})"


def gpu() -> Gpu | None:
    """The first CUDA device as its driver names it, None without one. Loads nothing but the driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    except OSError:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    driver.cuDeviceGetName(name, len(name), device)
    parts = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        parts.append(str(value.value))
    return Gpu(name.value.decode(), ".".join(parts))


def absence(module: str) -> str | None:
    """Why a library cannot be imported, None where it can; found without importing it."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: loaded by hand, without a spec
        spec = None
    if spec is None:
        return f"{module} is not installed"
    return None if spec.origin else f"{module} is an empty folder that a removal left behind"


def require(module: str, attribute: str, purpose: str, install: str) -> ModuleType:
    """A library, or a refusal with a sentence when it is absent or the empty shell of a half removal.

    onnxruntime and onnxruntime-gpu share one folder: removing either leaves a module that imports and
    holds nothing, hence `attribute`.
    """
    try:
        found = _import(module)
    except ImportError as error:
        raise MissingError(
            f"{purpose} needs {module}, which is not usable here ({error}); install it: {install}"
        ) from error
    if not hasattr(found, attribute):
        raise MissingError(
            f"{purpose} needs {module}; a folder of that name is there but empty, as removing one of "
            f"two packages that share it leaves it. Install it again: {install}"
        )
    return found


def _import(module: str) -> ModuleType:
    """Import a library without the telemetry that it would start."""
    kept = sys.modules.get(TELEMETRY)
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # importing it fails while this stands
    try:
        return importlib.import_module(module)
    finally:
        if kept is None:
            del sys.modules[TELEMETRY]
        else:
            sys.modules[TELEMETRY] = kept
