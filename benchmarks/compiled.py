"""asv: the kernels, compiled once for a whole run, by several processes at once.

Each benchmark's process finds them in Numba's cache on disk. Without this the suite would be as
right, as every `setup` runs what is timed, but slower: kernels would be compiled one after the
other, and each process would begin with compiling the functions that its kernels share.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from .quick import leave_out
from .shapes import PASSES

__all__ = ["float32_kernels", "other_kernels"]

# A shape and layout of each kind for which there are kernels: long planes, the one view, on one
# side; on the other what becomes columns, the other view. Two processes that compile the same
# function for different types would lose entries of its index, so they have one view each.
PLANES = (("32x256x14x14", "nchw"),)
COLUMNS = (("32x256x14x14", "nhwc"), ("32x512x7x7", "nchw"), ("65536x64", "nchw"))
SMALL = (("1x2048x7x7", "nchw"), ("1x512x7x7", "nchw"))


def _run(kinds: Sequence[tuple[str, str]], dtypes: Sequence[str]) -> None:
    """Run every pass once."""
    from .suite import cell

    for dtype in dtypes:
        for shape, layout in kinds:
            for pass_name in PASSES:
                with suppress(NotImplementedError):  # of an old commit, or without ml_dtypes
                    cell(pass_name, shape, layout, dtype)


def _call() -> None:
    """Run what bench_calls measures."""
    from .bench_calls import Overhead

    with suppress(NotImplementedError):
        Overhead().setup()


def _at_once(*jobs: Callable[[], None]) -> None:
    """Do each job in a process of its own.

    What goes wrong there is left for the benchmark's own `setup` to report.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def float32_kernels() -> None:
    """Compile what float32 benchmarks need; the `setup_cache` of their classes."""
    everything = ("float32",)
    _at_once(
        _call,
        partial(_run, PLANES, everything),
        partial(_run, COLUMNS + SMALL, everything),
    )


def other_kernels() -> None:
    """Compile what benchmarks of the other dtypes need; the `setup_cache` of their classes."""
    dtypes = [d for d in ("float64", "float16", "bfloat16") if not leave_out(PLANES[0][0], d)]
    _at_once(partial(_run, PLANES, dtypes), partial(_run, COLUMNS[:1], dtypes))


# Seconds. asv takes it from the function.
float32_kernels.timeout = other_kernels.timeout = 600  # type: ignore[attr-defined]
