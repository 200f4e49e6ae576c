"""A GPU for tests: host memory that kernels reach through the interpreter of PTX.

`Device` hands arrays to the CUDA backend by their host addresses and runs its launches; the
interpreter stops at any access outside of them, any race, any read of what was not written.
"""

from collections import Counter
from contextlib import contextmanager

import numpy as np
import ptx
from ptx_cache import ptx_of

from numbabn.cuda import launch
from numbabn.cuda.arrays import NOTHING, DeviceArray, Queue

COMPUTE_CAPABILITY = (9, 0)
_entries = {}


def entry_of(kernel):
    """The kernel, parsed once in a process."""
    if kernel not in _entries:
        module = ptx.parse(ptx_of(kernel, COMPUTE_CAPABILITY))
        (_entries[kernel],) = module.entries.values()
    return _entries[kernel]


def aligned_empty(count, dtype, offset=0):
    """An array whose address is a multiple of 256, or `offset` elements past one."""
    dtype = np.dtype(dtype)
    memory = np.full((count + offset) * dtype.itemsize + 256, 0xFF, np.uint8)
    begin = -memory.ctypes.data % 256 + offset * dtype.itemsize
    return memory[begin : begin + count * dtype.itemsize].view(dtype)


class Device:
    """Arrays, a queue, and what was launched: `launches` holds (kernel, grid, block, report)."""

    def __init__(self, seed=0, check_races=True):
        self.seed, self.check_races = seed, check_races
        self.memory = ptx.Memory()
        self.launches = []
        self.queue = Queue(0, self._scratch)

    def _scratch(self, count, dtype):
        return self.lend(aligned_empty(count, dtype), writable=True)

    def lend(self, array, writable=False):
        """A `DeviceArray` over a NumPy array; None becomes nothing."""
        if array is None:
            return NOTHING
        self.memory.register(array, f"array {len(self.launches)}", writable=writable)
        dtype = array.dtype
        if dtype.itemsize == 2:
            dtype = np.dtype(np.int16 if dtype == np.float16 else np.uint16)
        return DeviceArray(array.ctypes.data, array.size, dtype, array)

    def put(self, values, dtype=None, offset=0, writable=False):
        """Copy values to new memory, `offset` elements past a multiple of 256 bytes."""
        if values is None:
            return NOTHING
        values = np.asarray(values, dtype).reshape(-1)
        array = aligned_empty(values.size, values.dtype, offset)
        array[:] = values
        return self.lend(array, writable)

    @contextmanager
    def running(self):
        """The backend's launches run here."""
        with launch.runner(self._run):
            yield self

    def _run(self, kernel, grid, block, shared_bytes, stream, arguments):
        report = ptx.run(
            entry_of(kernel), grid, block, arguments, self.memory, shared_bytes,
            seed=self.seed, check_races=self.check_races,
        )  # fmt: skip
        self.launches.append((kernel, grid, block, report))

    @property
    def launched(self):
        """How often each kernel was launched."""
        return Counter(kernel.make.__name__ for kernel, *_ in self.launches)
