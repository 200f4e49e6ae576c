"""Rows of few channels: several are taken as one, so that vectors are full.

M rows of C channels lie in memory like M / r rows of r * C channels, of which every C-th is the
same one. So the kernels for columns go over such rows as over any others, with what they need to
know of a channel repeated r times, and what they sum is merged before anyone sees it. How many rows
make one follows from the shape alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbabn.cpu import serial
from numbabn.layout import View

Array = NDArray[Any]

# Columns that are enough for themselves, and the most that rows are put together to.
WIDE = 64
WIDEST = 256
# Elements for which this pays; smaller arrays go through fewer functions.
NARROW_FROM = 1 << 17


@cache
def rows_as_one(view: View) -> int:
    """How many rows are taken as one: a divisor of their number, or 1.

    Preferably one that makes whole vectors of 16, and as many as `WIDEST` allows.
    """
    row = view.C * view.L
    if not view.columns or row >= WIDE or view.N * row < NARROW_FROM:
        return 1
    divisors = [rows for rows in range(1, WIDEST // row + 1) if view.N % rows == 0]
    return max(divisors, key=lambda rows: (rows * row % 16 == 0, rows))


def widen(view: View) -> tuple[View, int]:
    """The view to call kernels with, and how often it repeats each channel."""
    rows = rows_as_one(view)
    if rows == 1:
        return view, 1
    return view._replace(N=view.N // rows, C=view.C * rows), rows


def repeat(numbers: Array, times: int) -> Array:
    """An array of channels, for so many rows taken as one."""
    return numbers if times == 1 else np.tile(numbers, times)


def merge_stats(partials: Array, times: int) -> Array:
    """From chunks of repeated channels to chunks of channels; see `channels` for what they hold."""
    return partials if times == 1 else _merge(serial.merge_repeated_stats, partials, times)


def merge_sums(partials: Array, times: int) -> Array:
    """Likewise for the backward sums."""
    return partials if times == 1 else _merge(serial.merge_repeated_sums, partials, times)


def _merge(kernel: Any, partials: Array, times: int) -> Array:
    chunks, fields, columns = partials.shape
    merged = np.empty((chunks, fields, columns // times))
    kernel(partials, merged)
    return merged
