"""Who does the work: how many threads, by a kernel's form in `serial` or that in `parallel`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numba
import numba.np.ufunc.parallel as numba_parallel

from numbabn.cpu import parallel, serial

if TYPE_CHECKING:
    from numbabn.cpu.schedule import Plan

# Values under which a second thread does not pay, per threading layer. An OpenMP or TBB region
# costs 2 to 3 µs, and a small array's one kernel spares as much again (measured on two cores:
# 50,000 values take 0.65 to 0.97 of the time in one); workqueue's costs 100 µs.
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
def _forms(name: str, kind: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """A kernel for one thread, and the same for many."""
    return getattr(serial, name + kind), getattr(parallel, name + kind)


def run(name: str, plan: Plan, items: int, *arguments: Any) -> None:
    """Run kernel `name` over its items, on several threads if there are several of both."""
    alone, shared = _forms(name, plan.name)
    parts = min(plan.threads, items)
    if parts == 1 or not _run_shared(shared, items, parts, *arguments):
        alone(*arguments, 0, items)


def run_meeting(name: str, plan: Plan, *arguments: Any) -> bool:
    """Run both passes of training, where one kernel does them and several threads may.

    Returns whether it did: that saves two calls of kernels, and what goes with them.
    """
    if plan.threads == 1 or plan.name != "columns":
        return False
    kernel = getattr(parallel, name + plan.name)
    return _run_shared(kernel, plan.chunk_items, plan.element_items, plan.threads, *arguments)


@cache
def _one_at_a_time() -> bool:
    """Whether the layer ends the process when two threads are in parallel kernels at once."""
    return layer() == "workqueue"


_taking_turns = threading.Lock()


def _run_shared(kernel: Callable[..., None], *arguments: Any) -> bool:
    """Run a kernel of `parallel`, unless another is run and the layer allows for one only."""
    if not _one_at_a_time():
        kernel(*arguments)
        return True
    if not _taking_turns.acquire(blocking=False):
        return False
    try:
        kernel(*arguments)
    finally:
        _taking_turns.release()
    return True
