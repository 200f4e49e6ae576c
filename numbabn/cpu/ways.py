"""Which kernel does what to arrays that lie in memory as some view does.

Everything that follows from the view, so that a call has little to look up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from numpy.typing import NDArray

from numbabn.cpu import launch, narrow, passes, schedule
from numbabn.cpu.caches import in_memory
from numbabn.cpu.schedule import Plan
from numbabn.layout import View

Array = NDArray[Any]


class Way(NamedTuple):
    """A kernel of `passes`, for so many threads, and how the work is `cut` up: its last arguments.

    Where the arrays are `far` too large for the caches, stores may bypass these.
    """

    kernel: Callable[..., Any]
    threads: int
    cut: tuple[Any, ...]
    far: bool


def _forward(plan: Plan) -> tuple[str, tuple[Any, ...]]:
    if plan.forward_items:
        return "forward_", (plan.forward_items, plan.forward_sizes)
    sums = plan.chunks, plan.chunk_items, plan.stats_sizes
    return "forward_twice_", (*sums, plan.element_items, plan.element_sizes)


def _backward(plan: Plan) -> tuple[str, tuple[Any, ...]]:
    if plan.backward_items:
        return "backward_", (plan.backward_items, plan.backward_sizes)
    sums = plan.chunks, plan.chunk_items, plan.sums_sizes
    return "backward_twice_", (*sums, plan.element_items, plan.element_sizes)


def _backward_eval(plan: Plan) -> tuple[str, tuple[Any, ...]]:
    finish = plan.finish_items > 0
    items, sizes = plan.chunk_items, plan.sums_sizes
    if finish:
        items, sizes = plan.finish_items, plan.finish_sizes
    return "backward_eval_", (plan.chunks, finish, items, sizes)


# The kernel's name, but for its end, and its last arguments.
_CUT: dict[str, Callable[[Plan], tuple[str, tuple[Any, ...]]]] = {
    "stats": lambda plan: ("stats_", (plan.chunks, plan.chunk_items, plan.stats_sizes)),
    "normalize": lambda plan: ("normalize_", (plan.element_items, plan.element_sizes)),
    "forward": _forward,
    "backward sums": lambda plan: (
        "backward_sums_",
        (plan.chunks, plan.chunk_items, plan.sums_sizes),
    ),
    "backward elements": lambda plan: (
        "backward_elements_",
        (plan.element_items, plan.element_sizes),
    ),
    "backward": _backward,
    "backward eval": _backward_eval,
}


class Ways:
    """The ways to go about arrays that lie alike; get them from `ways_of`."""

    __slots__ = (
        "__weakref__", "_found", "_shared_from", "channels", "itemsize", "nbytes", "repeats",
        "size", "view"
    )  # fmt: skip

    def __init__(self, view: View, itemsize: int):
        self.view = view
        self.channels = view.C
        self.itemsize = itemsize
        self.size = view.C * view.per_channel
        self.nbytes = self.size * itemsize
        # Rows are taken as one, see `narrow`: sums of repeated channels have to be merged first.
        self.repeats = narrow.rows_as_one(view) > 1
        self._shared_from = {
            name: schedule.shared_from(view, itemsize, name.startswith("backward")) for name in _CUT
        }
        self._found: dict[tuple[str, int], Way] = {}

    def way(self, name: str) -> Way:
        """How to go about what has this name in `_CUT`, with as many threads as pay."""
        threads = launch.threads_for(self.size, self._shared_from[name])
        try:
            return self._found[name, threads]
        except KeyError:
            plan = schedule.plan(self.view, self.itemsize, threads)
            kernel, cut = _CUT[name](plan)
            run = launch.caller(getattr(passes, kernel + plan.name), threads)
            way = self._found[name, threads] = Way(run, threads, cut, in_memory(4 * self.nbytes))
            return way

    def widened(self) -> tuple[Ways, int]:
        """What kernels are called with where rows are taken as one, and how often it repeats."""
        if not self.repeats:
            return self, 1
        view, times = narrow.widen(self.view)
        return ways_of(view, self.itemsize), times

    def streams(self, reads: int, aligned_rows: bool, *written: Array | None) -> bool:
        """`schedule.streams`, of a pass over such arrays."""
        return schedule.streams(self.view, self.nbytes, reads, aligned_rows, *written)

    def streams_while_summed(self, aligned_rows: bool, *written: Array | None) -> bool:
        """The same, for what is stored in the backward pass that sums.

        There it is often several rows of columns at a time, which have to lie alike. Where nothing
        is written, it says whether columns are read from memory.
        """
        if self.view.columns:
            if all(array is None for array in written):
                return in_memory(2 * self.nbytes)
            if self.channels * self.view.L * self.itemsize % 64 != 0:
                return False
        return self.streams(2, aligned_rows, *written)

    def forget(self) -> None:
        self._found.clear()


_all_ways: weakref.WeakSet[Ways] = weakref.WeakSet()


@lru_cache(4096)
def ways_of(view: View, itemsize: int) -> Ways:
    """The ways to go about arrays that lie like `view`."""
    made = Ways(view, itemsize)
    _all_ways.add(made)
    return made


def forget_plans() -> None:
    """Make all plans anew, after what they follow from has changed."""
    schedule.plan.cache_clear()
    ways_of.cache_clear()
    for made in list(_all_ways):
        made.forget()
