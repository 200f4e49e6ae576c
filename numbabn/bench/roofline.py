"""How fast memory moves: copies and triads that do no arithmetic worth mentioning.

A pass reads each of its inputs at least once and writes one array: that is a copy for the forward
passes, a triad for the backward ones. The faster of an ordinary and a streaming one, on arrays of
the same size and with the same number of threads, is the roofline of the pass. It is Numba's code,
so that no compiler has to be there; benchmarks/bandwidth.py has the same probes in C++.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numba
import numpy as np
from numba import prange

from numbabn.bench.problem import Array, Contestant
from numbabn.cpu.memory import load, pointer, put
from numbabn.cpu.options import function, kernel, parallel_kernel
from numbabn.cpu.parallel import share
from numbabn.cpu.vector import LANES, fma, splat_like

__all__ = ["probes"]


@function
def _move(first, second, out, begin, end, streaming):
    """``out = 0.5 * first (+ 0.5 * second)`` from vector `begin` to `end`, all of them pointers."""
    half = splat_like(first, 0.5)
    for i in range(begin, end):
        # The factor keeps LLVM from calling memcpy, which streams by rules of its own.
        value = load(first, i * LANES) * half
        if second is not None:
            value = fma(load(second, i * LANES), half, value)
        put(out, i * LANES, LANES, value, streaming)


@kernel
def _serial(first, second, out, vectors, streaming):
    _move(pointer(first), pointer(second), pointer(out), 0, vectors, streaming)


@parallel_kernel
def _parallel(first, second, out, vectors, streaming, parts):
    for part in prange(parts):
        begin, end = share(vectors, parts, part), share(vectors, parts, part + 1)
        _move(pointer(first), pointer(second), pointer(out), begin, end, streaming)


def probes(
    arrays: tuple[Array, Array, Array], pass_name: str, threads: int
) -> Iterator[Contestant]:
    """What bounds a pass from below: an ordinary and a streaming copy, or triad.

    Parameters
    ----------
    arrays : three arrays of float32
        The first two are read, the last is written; whole vectors, on boundaries of 64 bytes.
    pass_name : str
        A forward pass is bounded by a copy, a backward pass by a triad.
    threads : int
        That share the work.
    """
    first, second, out = arrays
    added = second if pass_name.startswith("backward") else None
    for streaming in (False, True):
        arguments: list[Any] = [first, added, out, first.size // LANES, streaming]
        if threads == 1:
            run = partial(_serial, *arguments)
        else:
            run = partial(_parallel, *arguments, np.int64(threads))
        prepare = partial(numba.set_num_threads, threads)
        yield Contestant("memory", pass_name, threads, run, prepare)
