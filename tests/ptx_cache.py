"""Compiled kernels on disk, for all processes of a test run and for the next run.

Nearly all of the time that the tests of CUDA kernels take is Numba's: a second or two for each of a
hundred variants. What a kernel compiles to depends on the modules of the backend and on Numba, so
that is what it is kept by.
"""

import fcntl
import gc
import hashlib
import os
import shutil
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numba

import numbabn.cuda
from benchmarks import cuda_resources
from numbabn.cuda import launch

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


@contextmanager
def _locked(file, wait):
    """Whether the lock beside `file` is held in this context; it is if one waits for it."""
    with open(file.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        yield held


def _compiled(kernel, cc, wait):
    """The file of ``kernel.ptx(cc)``, and whether it is there, or was made now.

    It is not if another process is at it and one does not `wait`.
    """
    name = f"{kernel.make.__module__} {kernel.name} {kernel.bounds} {cc}".replace(" ", "_")
    file = _folder() / f"{name}.ptx"
    with _locked(file, wait) as held:
        if held and not file.exists():
            # A compilation makes a million objects that live as long as it: looking for cycles
            # among them takes a fifth of its time.
            gc.disable()
            try:
                new = file.with_suffix(".new")
                new.write_text(kernel.ptx(cc))
                new.rename(file)
            finally:
                gc.enable()
    return file, held


def _others(kernel):
    """The kernels of arrays that `kernel` is compiled for one of: the tests will want all."""
    for entry in cuda_resources.entries():
        if entry.make.__name__.endswith(("planes", "columns")):
            yield launch.kernel(
                entry.make, kernel.storage, kernel.aligned, kernel.wide, entry.bounds
            )


def ptx_of(kernel, cc):
    """``kernel.ptx(cc)``, compiled by one process, while others compile what comes next."""
    file, there = _compiled(kernel, cc, wait=False)
    others = _others(kernel)
    while not there:
        other = next(others, None)
        if other is not None:
            _compiled(other, cc, wait=False)
        file, there = _compiled(kernel, cc, wait=other is None)
    return file.read_text()
