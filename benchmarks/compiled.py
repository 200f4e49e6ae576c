"""asv: the kernels, compiled once for a whole run, by two processes at once.

Each benchmark's process finds them in Numba's cache on disk. Without this the suite would be as
right, as every `setup` runs what is timed, but slower: kernels would be compiled one after the
other, and each process would begin with compiling the functions that its kernels share.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from contextlib import suppress

from .quick import DTYPES, is_quick, leave_out
from .shapes import PASSES

__all__ = ["float32_kernels", "other_kernels"]

# A shape and layout of each kind for which there are kernels: long planes are one view; what
# becomes columns, and small arrays, the other.
PLANES = (("32x256x14x14", "nchw"),)
COLUMNS = (("32x256x14x14", "nhwc"),)
MORE_COLUMNS = (
    *(("1x2048x7x7", "nhwc"), ("65536x64", "nchw")),
    *(("1x2048x7x7", "nchw"), ("1x512x7x7", "nchw")),
)


def _run(kinds: Sequence[tuple[str, str]], dtypes: Sequence[str]) -> None:
    """Run every pass once."""
    from .suite import cell

    for dtype in dtypes:
        for shape, layout in kinds:
            for pass_name in PASSES:
                with suppress(NotImplementedError):  # of an old commit, or without ml_dtypes
                    cell(pass_name, shape, layout, dtype)


def _planes(dtypes: Sequence[str]) -> None:
    """Compile the kernels of planes, and those that bench_calls calls."""
    from .bench_calls import Overhead

    if "float32" in dtypes:
        with suppress(NotImplementedError):
            Overhead().setup()
    _run(PLANES, dtypes)


def _columns(dtypes: Sequence[str]) -> None:
    """Compile the kernels of columns, and those of small arrays."""
    if "float32" in dtypes:
        _run(MORE_COLUMNS, ("float32",))
    _run(COLUMNS, dtypes)


def _compile(dtypes: Sequence[str]) -> None:
    """Compile each view's kernels in a process of its own.

    Not more of them: two processes that compile the same function for different types would lose
    entries of its index on disk. What goes wrong is left for a benchmark's own `setup` to report.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=job, args=(dtypes,)) for job in (_planes, _columns)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def float32_kernels() -> None:
    """Compile what float32 benchmarks need; the `setup_cache` of their classes."""
    # A quick run has so few dtypes that they are compiled together, which keeps both busy.
    _compile(DTYPES if is_quick() else ("float32",))


def other_kernels() -> None:
    """Compile what benchmarks of the other dtypes need; the `setup_cache` of their classes."""
    names = ("float64", "float16", "bfloat16")
    _compile([name for name in names if not leave_out(PLANES[0][0], name)])


# Seconds. asv takes it from the function.
float32_kernels.timeout = other_kernels.timeout = 600  # type: ignore[attr-defined]
