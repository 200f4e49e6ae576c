"""Any dense array and channel axis -> one of two canonical views, without a copy.

**Planes** ``(N, C, L)``: each channel of each sample is a contiguous run of L values (NCHW).
**Columns** ``(M, C, L)``: M rows of C channels times L columns each, with L = 1 for channels-last
memory. Very short planes, such as 4 × 4, go faster as columns: a vector then spans channels.

The samples' order never matters to batch normalization, so the axes may be taken in the order in
which they lie in memory. That makes an NCHW *view* of channels-last memory a columns view, and a
Fortran-ordered array a view as good as any.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numbabn import pool

Array = NDArray[Any]

# Planes shorter than this are taken as columns (measured, see docs/architecture.md).
SHORT_PLANE = 32
# Likewise a single row of them; a vector of 16 then lies in two planes at most.
SHORTEST_PLANE = 16
# Elements up to which one kernel in one thread is done with eval's forward pass, checks included,
# before several threads have been called (measured: 13 us instead of 17 for 100,000 elements on
# two cores).
SMALL_EVAL = 1 << 17


class View(NamedTuple):
    """How an array of some shape lies in memory, and what kernels take it for."""

    columns: bool
    N: int  # samples; rows of columns
    C: int
    L: int
    order: tuple[int, ...] | None  # axes from slowest to fastest; None for C order

    @property
    def sizes(self) -> tuple[int, int, int]:
        """``(N, C, L)``."""
        return self.N, self.C, self.L

    @property
    def per_channel(self) -> int:
        """Values per channel."""
        return self.N * self.L


@lru_cache(maxsize=4096)
def describe(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, channel_axis: int
) -> View | None:
    """The view of an array with these properties, or None if it is not dense in any order."""
    order = tuple(sorted(range(len(shape)), key=lambda axis: -strides[axis]))
    step = itemsize
    for axis in reversed(order):
        if shape[axis] != 1:
            if strides[axis] != step:
                return None
            step *= shape[axis]
    at = order.index(channel_axis)
    sizes = [shape[axis] for axis in order]
    N, C, L = prod(sizes[:at]), sizes[at], prod(sizes[at + 1 :])
    in_c_order = [a for a in order if shape[a] != 1] == [
        a for a in range(len(shape)) if shape[a] != 1
    ]
    if C == 1:
        N, L = 1, N * L
    columns = L < SHORTEST_PLANE or (L < SHORT_PLANE and N > 1)
    return View(columns, N, C, L, None if in_c_order else order)


def flatten(array: Array) -> Array:
    """A dense array's memory as a vector: float32, float64, int16 (float16), uint16 (bfloat16)."""
    flat = array.ravel("K")
    if flat.itemsize > 2:
        return flat
    return flat.view(np.int16 if flat.dtype == np.float16 else np.uint16)


class _Alias:
    """Lends a read-only array's memory; kernels are compiled for writable arrays only."""

    def __init__(self, array: Array):
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self.array = array  # keeps the memory alive


def flatten_input(array: Array) -> Array:
    """`flatten`, for an array that is only read."""
    flat = flatten(array)
    if flat.flags.writeable:
        return flat
    alias: Array = np.asarray(_Alias(flat))
    return alias


def empty(view: View, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """A new array of this shape that lies in memory as `view` does."""
    if view.order is None:
        return pool.empty(shape, dtype)
    array: Array = pool.empty(tuple(shape[axis] for axis in view.order), dtype)
    moved: Array = array.transpose(tuple(view.order.index(axis) for axis in range(len(shape))))
    return moved


def lies_like(array: Array, view: View) -> bool:
    """Whether an array of the view's shape lies in memory as `view` does."""
    if view.order is not None:
        array = array.transpose(view.order)
    return bool(array.flags.c_contiguous)


def is_dense(array: Array) -> bool:
    """Whether the array fills its memory without gaps, in whatever order of axes."""
    return describe(array.shape, array.strides, array.itemsize, 0) is not None
