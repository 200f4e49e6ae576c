"""Memory for outputs that does not have to be mapped anew each time.

A fresh array of some megabytes costs more in page faults than batch normalization costs in time.
So an output's memory comes from here, and comes back when the last array over it dies: a `_Lease`
is the base of the array, every view, slice and buffer export keeps the array alive and so the
lease, and the lease's end is the memory's return. Blocks begin on a boundary of 2 MiB and ask for
huge pages. Small arrays are left to NumPy, which is faster at them.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import numbers
import os
import sys
import threading
from collections import OrderedDict, deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["clear_pool", "empty", "set_pool_limit"]

Array = NDArray[Any]

# Below this malloc keeps and reuses memory itself.
SMALLEST = 1 << 20
_HUGE_PAGE = 1 << 21
_PRIVATE = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)


class _Block:
    """A mapping of its own, and where in it the usable bytes begin."""

    __slots__ = ("address", "mapping", "size")

    def __init__(self, size: int):
        self.size = size
        length = size + _HUGE_PAGE
        # Private: after a fork, parent and child must not write into each other's arrays.
        self.mapping = mmap.mmap(-1, length, flags=_PRIVATE) if _PRIVATE else mmap.mmap(-1, length)
        start = np.frombuffer(self.mapping, np.uint8).__array_interface__["data"][0]
        self.address = start + -start % _HUGE_PAGE
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self.mapping.madvise(mmap.MADV_HUGEPAGE)


class _Lease:
    """What an array over a block holds on to; its end hands the block back."""

    __slots__ = ("__array_interface__", "block")

    def __init__(self, block: _Block, shape: tuple[int, ...], typestr: str):
        self.block = block
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": typestr,
            "data": (block.address, False),
        }

    def __del__(self) -> None:
        _pool.give_back(self.block)


def _memory() -> int:
    """Bytes of RAM."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 8 << 30


def _round_up(size: int) -> int:
    """To a multiple of an eighth of its power of two, so that similar sizes share blocks."""
    step = max(1 << 16, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


class _Pool:
    """Blocks that no array is over, oldest first."""

    def __init__(self, limit: int):
        self.limit = limit
        self.idle: OrderedDict[int, _Block] = OrderedDict()
        self.idle_bytes = 0
        # A lease can end anywhere, also while this very thread holds the lock: it never waits,
        # and leaves its block here if it must.
        self.returned: deque[_Block] = deque()
        self.lock = threading.Lock()

    def forked(self) -> None:
        """The child has copies of all blocks, but the lock may have been another thread's."""
        self.lock = threading.Lock()
        self.idle_bytes = sum(block.size for block in self.idle.values())  # it may be half done

    def take(self, size: int) -> _Block:
        size = _round_up(size)
        with self.lock:
            self._sort_in()
            for key, block in reversed(self.idle.items()):  # the latest is likeliest in cache
                if block.size == size:
                    del self.idle[key]
                    self.idle_bytes -= size
                    return block
        return _Block(size)

    def give_back(self, block: _Block) -> None:
        self.returned.append(block)
        if self.lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self.lock.release()

    def _sort_in(self) -> None:
        """Take in what was returned, and let go of the oldest above the limit."""
        while self.returned:
            block = self.returned.popleft()
            self.idle[block.address] = block
            self.idle_bytes += block.size
        while self.idle_bytes > self.limit:
            _, block = self.idle.popitem(last=False)
            self.idle_bytes -= block.size

    def set_limit(self, limit: int) -> None:
        with self.lock:
            self.limit = limit
            self._sort_in()

    def clear(self) -> None:
        with self.lock:
            self._sort_in()
            self.idle.clear()
            self.idle_bytes = 0


_pool = _Pool(_memory() // 8)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.forked)

_BYTES = np.dtype(np.uint8).str


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialised C-ordered array, from the pool if it is large."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALLEST or nbytes > _pool.limit or sys.is_finalizing():
        return np.empty(shape, dtype)
    lease = _Lease(_pool.take(nbytes), (nbytes,), _BYTES)
    return np.asarray(lease).view(dtype).reshape(shape)


def set_pool_limit(nbytes: int) -> None:
    """Set how much memory may be kept for later outputs.

    Parameters
    ----------
    nbytes : int
        Bytes; 0 keeps none. At first it is an eighth of the machine's RAM.

    Raises
    ------
    TypeError, ValueError
        If it is not an integer, or negative.

    Notes
    -----
    It bounds what no array uses at the moment. What arrays use is theirs.

    Examples
    --------
    >>> set_pool_limit(256 * 2**20)
    """
    if not isinstance(nbytes, numbers.Integral) or isinstance(nbytes, bool):
        raise TypeError(f"nbytes: expected an int, got {nbytes!r}")
    if int(nbytes) < 0:
        raise ValueError(f"nbytes: expected at least 0, got {nbytes}")
    _pool.set_limit(int(nbytes))


def clear_pool() -> None:
    """Give memory that is kept for later outputs back to the system.

    Examples
    --------
    >>> clear_pool()
    """
    _pool.clear()
