"""What the backend is handed: arrays by address, and the queue that work is put into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class DeviceArray(NamedTuple):
    """A contiguous array in the device's memory.

    16-bit floats have the dtypes that `numbabn.layout.flatten` gives them: int16 for float16,
    uint16 for bfloat16.
    """

    address: int
    size: int
    dtype: np.dtype[Any]
    owner: object = None  # keeps the memory alive

    @property
    def itemsize(self) -> int:
        return int(self.dtype.itemsize)


# Stands for channels that are not given.
NOTHING = DeviceArray(0, 0, np.dtype(np.float32))


class Queue:
    """A stream, and scratch memory that belongs to it.

    Parameters
    ----------
    stream : int
        0 for the legacy default stream, 1, 2, or a ``cudaStream_t``.
    allocate : callable
        Takes a number of elements and a dtype and returns a `DeviceArray`: from the allocator of
        the caller's own library, so that memory is reused in the stream's order.
    multiprocessors : int
        Of the device. Grids are made for as many; results do not depend on it.
    """

    def __init__(
        self,
        stream: int,
        allocate: Callable[[int, np.dtype[Any]], DeviceArray],
        multiprocessors: int = 132,
    ):
        self.stream = stream
        self.multiprocessors = multiprocessors
        self._allocate = allocate

    def empty(self, count: int, dtype: Any = np.float64) -> DeviceArray:
        """Scratch memory, of unknown content."""
        return self._allocate(count, np.dtype(dtype))
