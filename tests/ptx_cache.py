"""Compiled kernels on disk, for all processes of a test run and for the next run.

Nearly all of the time that the tests of CUDA kernels take is Numba's: a second or two for each of a
hundred variants. What a kernel compiles to depends on the modules of the backend and on Numba, so
that is what it is kept by.
"""

import fcntl
import hashlib
import os
import shutil
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numba

import numbabn.cuda

MOST_KEPT = 4  # states of the backend's source


@cache
def _folder():
    """The folder for the kernels of this source and these compilers; the oldest others go."""
    digest = hashlib.sha256()
    for file in sorted(Path(numbabn.cuda.__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    for package in ("numba", "numba-cuda", "llvmlite", "nvidia-nvvm"):
        try:
            digest.update(version(package).encode())
        except ImportError:  # of another CUDA release
            digest.update(b"none")
    home = Path(numba.config.CACHE_DIR or Path(__file__).parents[1] / ".pytest_cache", "ptx")
    folder = home / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    others = sorted(home.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in others[MOST_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def ptx_of(kernel, cc):
    """``kernel.ptx(cc)``, compiled by one process while others wait for it."""
    name = f"{kernel.make.__module__} {kernel.name} {kernel.bounds} {cc}".replace(" ", "_")
    file = _folder() / f"{name}.ptx"
    with open(_folder() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            new = file.with_suffix(".new")
            new.write_text(kernel.ptx(cc))
            new.rename(file)
    return file.read_text()
