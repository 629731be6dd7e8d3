"""The C++ compiler that torch.compile needs on a CPU."""

from __future__ import annotations

import os
import shutil


def cpp_compiler() -> str | None:
    """The first one there is, None without any; CXX is asked before the usual names."""
    names = (os.environ.get("CXX", ""), "g++", "clang++")
    return next((name for name in names if name and shutil.which(name)), None)
