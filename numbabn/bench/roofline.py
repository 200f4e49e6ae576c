"""How fast memory moves: copies and triads that do no arithmetic worth mentioning.

A pass reads each of its inputs at least once and writes one array: that is a copy for the forward
passes, a triad for the backward ones. The faster of an ordinary and a streaming one, on the very
arrays of the pass and with the same number of threads, is its roofline. (On arrays of their own,
the probes and the passes would push each other out of the last cache.) It is Numba's code, so that
no compiler has to be there; benchmarks/bandwidth.py has the same probes in C++.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numba
import numpy as np

from numbabn.bench.problem import Contestant, Problem
from numbabn.cpu.memory import load, pointer, put
from numbabn.cpu.options import function, kernel
from numbabn.cpu.parallel import shared
from numbabn.cpu.vector import LANES, fma, splat_like

__all__ = ["probes"]


@function
def _move(first, second, out, streaming, begin, end):
    """``out = 0.5 * first (+ 0.5 * second)`` from vector `begin` to `end`, all of them pointers."""
    half = splat_like(first, 0.5)
    for i in range(begin, end):
        # The factor keeps LLVM from calling memcpy, which streams by rules of its own.
        value = load(first, i * LANES) * half
        if second is not None:
            value = fma(load(second, i * LANES), half, value)
        put(out, i * LANES, LANES, value, streaming)


_shared = shared(_move)


@kernel
def _run(threads, first, second, out, vectors, streaming):
    _shared(threads, vectors, pointer(first), pointer(second), pointer(out), streaming)


def probes(given: Problem, pass_name: str, threads: int) -> Iterator[Contestant]:
    """What bounds a pass from below: an ordinary and a streaming copy, or triad.

    Parameters
    ----------
    given : Problem
        Its input and gradient are read, its output is written.
    pass_name : str
        A forward pass is bounded by a copy, a backward pass by a triad.
    threads : int
        That share the work.
    """
    # Halves are moved as pairs. Doubles are not, for their lower halves would often be denormal.
    kind = np.float64 if given.dtype == np.float64 else np.float32
    first, second, out = (lines.view(kind) for lines in given.lines)
    added = second if pass_name.startswith("backward") else None
    for streaming in (False, True):
        run = partial(_run, threads, first, added, out, first.size // LANES, streaming)
        prepare = partial(numba.set_num_threads, threads)
        yield Contestant("memory", pass_name, threads, run, prepare)
