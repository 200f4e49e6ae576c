"""Builds the C++ harnesses beside this file on demand, into a cache folder, and loads them.

Nothing is compiled when the package is installed, and nothing is written into the repository: the
shared library lands in the user's cache folder under a name made from the source, the command and
the processor, so that a change to any of them builds it anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Missing", "build", "cpu_model", "optional", "pointer"]

HERE = Path(__file__).parent


class Missing(Exception):
    """A peer or a tool is not there; the message says which, and what would bring it."""


def optional(module: str) -> Any:
    """Import a module that need not be installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{error.name or module} is not installed") from error
    except Exception as error:  # installed, but broken: as good as missing, and not fatal
        raise Missing(f"{module} cannot be imported: {type(error).__name__}: {error}") from error


def cpu_model() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "numbabn-benchmarks"


def build(source: str, flags: Sequence[str], *, depends: Sequence[Path] = ()) -> ctypes.CDLL:
    """Compile a source of this folder to a shared library, unless it was before, and load it.

    Parameters
    ----------
    source : str
        File name of the C++ source.
    flags : sequence of str
        Compiler and linker flags beyond those of any shared library.
    depends : sequence of Path
        Headers whose content decides what is built, such as a library's version header.

    Raises
    ------
    Missing
        When there is no compiler, or when it refuses the source.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "c++"))), None)
    if compiler is None:
        raise Missing("no C++ compiler (g++ or $CXX)")
    path = HERE / source
    command = [compiler, "-std=c++17", "-shared", "-fPIC", str(path), *flags]
    contents = [path.read_bytes(), *(d.read_bytes() for d in depends)]
    key = hashlib.sha256(b"\0".join([*contents, repr(command).encode(), cpu_model().encode()]))
    library = cache_folder() / f"{path.stem}-{key.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Built aside and moved into place, so that two runs at once never load half a file.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            done = subprocess.run(
                [*command, "-o", str(built)], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                reason = next((line for line in done.stderr.splitlines() if "error" in line), "")
                raise Missing(f"{source} does not compile here: {reason.strip()}")
            built.replace(library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise Missing(f"{source} does not load: {error}") from error


def pointer(array: NDArray[np.generic] | None) -> ctypes.c_void_p:
    """Address of an array's data; a null pointer for None."""
    return ctypes.c_void_p(None if array is None else array.ctypes.data)
