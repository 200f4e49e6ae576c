"""How many threads do the work, and how they are called."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numba.np.ufunc.parallel as numba_parallel

# Values under which a second thread does not pay, per threading layer. An OpenMP or TBB region
# costs 2 to 3 µs, and what changes hands between cores as much again (measured on two of them:
# 50,000 values take 0.65 to 0.97 of the time on one); workqueue's costs 100 µs.
PARALLEL_FROM = {"omp": 1 << 16, "tbb": 1 << 16, "workqueue": 1 << 19}
# Values that any further thread should have to itself, to be worth waking.
EACH = 1 << 15


class _Process:
    """What this process may do; a forked child must not use its parent's OpenMP threads."""

    def __init__(self) -> None:
        self.has_run_parallel = False
        self.serial_only = False

    def forked(self) -> None:
        self.serial_only = self.has_run_parallel


process = _Process()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=process.forked)


@cache
def layer() -> str:
    """The threading layer, which Numba chooses when it starts its threads."""
    numba.get_num_threads()
    return str(numba.threading_layer())


@cache
def _get_num_threads() -> Callable[[], int]:
    """Numba's `get_num_threads`, or the part of it that matters once the threads are there.

    That takes 0.1 us, and the whole 0.6, for it makes sure each time that they are.
    """
    numba.get_num_threads()
    inner: Callable[[], int] | None = getattr(numba_parallel, "_get_num_threads", None)
    return numba.get_num_threads if inner is None else inner


def threads_for(size: int, least: int) -> int:
    """How many threads should share `size` values; one if these are fewer than `least`."""
    if size < least or process.serial_only:
        return 1
    threads = int(_get_num_threads()())
    if threads == 1 or size < _worth_while():
        return 1
    process.has_run_parallel = True
    return min(threads, size // EACH)


@cache
def _worth_while() -> int:
    """Values from which on a second thread pays."""
    return PARALLEL_FROM.get(layer(), PARALLEL_FROM["omp"])


@cache
def _one_at_a_time() -> bool:
    """Whether the layer ends the process when two threads are in parallel kernels at once."""
    return layer() == "workqueue"


_taking_turns = threading.Lock()


def _in_turn(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` on several threads, or on one while another kernel is run on several."""

    def run(parts: int, *arguments: Any) -> Any:
        if not _taking_turns.acquire(blocking=False):
            return kernel(1, *arguments)
        try:
            return kernel(parts, *arguments)
        finally:
            _taking_turns.release()

    return run


def caller(kernel: Callable[..., Any], threads: int) -> Callable[..., Any]:
    """What calls a kernel of `passes` on so many threads, as far as the layer allows for it."""
    return _in_turn(kernel) if threads > 1 and _one_at_a_time() else kernel
