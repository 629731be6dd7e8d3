"""TensorRT and TensorRT-RTX: which library an engine name stands for, and what the library says.

    tensorrt        10.13 and later, 11   builds on the GPU that the engine is for
    tensorrt_rtx    consumer GPUs (RTX)   builds anywhere; the GPU's code is compiled when it starts

Both have one Python interface; only what both have is used, but for the branches on `portable`.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from deploy.machine import require
from srkd.errors import MissingError, SrkdError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import ModuleType


@dataclass(frozen=True)
class Library:
    """`portable`: an engine is built without a GPU and runs on several kinds of them: those of
    `capabilities`, the compute capabilities that it has code for when none is asked for (none: of the GPU that
    builds it).
    """

    title: str
    module: str
    install: str
    portable: bool
    capabilities: tuple[str, ...] = ()


LIBRARIES: dict[str, Library] = {
    "tensorrt": Library(
        title="TensorRT",
        module="tensorrt",
        # The package of this name on PyPI is a shell: its libraries are on NVIDIA's index alone.
        install="pip install tensorrt --extra-index-url https://pypi.nvidia.com",
        portable=False,
    ),
    "tensorrt_rtx": Library(
        title="TensorRT-RTX",
        module="tensorrt_rtx",
        install="pip install tensorrt-rtx-cu13",
        portable=True,
        # Of 1.7. Without 9.0 and 10.0 (H100, H200, B200); 7.5 must be asked for.
        capabilities=("8.0", "8.6", "8.9", "12.0", "12.1"),
    ),
}


# What runs on a GPU that TensorRT-RTX has no code for.
ELSEWHERE = "use --engine trt, --engine ort with ONNX Runtime's CUDA provider, or the network itself in torch"


def load_library(name: str) -> tuple[Library, ModuleType]:
    """The library by the name in an engine's settings; never another one in its place."""
    if name not in LIBRARIES:
        raise SrkdError(f"there is no TensorRT library '{name}'; {nearest(name, list(LIBRARIES))}")
    library = LIBRARIES[name]
    require(library.module, "Builder", library.title, library.install)
    return library, import_module(library.module)


def kernels_file(plan: Path) -> Path:
    """Where the kernels that TensorRT-RTX compiled for `plan` are kept: <file>.kernels beside it."""
    return plan.with_name(f"{plan.name}.kernels")


# --- what the library says ------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """Errors and warnings in the order they came, one line each."""

    errors: list[str]
    warnings: list[str]

    @property
    def first_error(self) -> str:
        """The first is the cause; those after it are consequences."""
        return self.errors[0] if self.errors else "it gave no reason"


@cache
def _logger(module: ModuleType) -> Any:
    # One per process: the library keeps the first logger it is given and ignores any other.
    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.said = Said([], [])

        def log(self, severity: Any, msg: str) -> None:
            line = " ".join(msg.split())
            if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR):
                self.said.errors.append(line)
            elif severity == module.ILogger.WARNING:
                self.said.warnings.append(line)

    return Logger()


@contextmanager
def listening(module: ModuleType) -> Iterator[Said]:
    """What the library says inside this block."""
    logger = _logger(module)
    before, logger.said = logger.said, Said([], [])
    try:
        yield logger.said
    finally:
        logger.said = before


def start(library: Library, module: ModuleType, kind: str, said: Said) -> Any:
    """A `Builder` or `Runtime`; without a usable driver the library makes none."""
    try:
        return getattr(module, kind)(_logger(module))
    except TypeError as error:  # how the bindings report a null pointer
        raise MissingError(
            f"{library.title} {module.__version__} does not start here: {said.first_error}. Check the "
            "NVIDIA driver (nvidia-smi)."
        ) from error
