"""The functions of `serial` with their items shared out over threads.

Each part is one contiguous range, so that a thread stays in its own stretch of memory. Which
thread does what never changes a result: sums are cut into chunks by `schedule`, not here.

Arguments are the number of parts, that of items, and all that the function of that name in `serial`
takes before its range. (Numba compiles such a list of arguments as if it were written out.)
"""

from typing import Any

import numpy as np
from numba import prange

from numbabn.cpu import serial
from numbabn.cpu.options import function, parallel_function


@function
def share(items, parts, part):
    """The range of items that `part` has."""
    return items * np.int64(part) // parts, items * np.int64(part + 1) // parts


def shared(alone: Any) -> Any:
    """`alone` by as many threads as there are parts; a single part, or item, wakes none."""

    @parallel_function
    def run(parts, items, *arguments):
        parts = min(parts, items)
        if parts <= 1:
            alone(*arguments, 0, items)
        else:
            for part in prange(parts):
                alone(*arguments, *share(items, parts, part))

    return run


stats_planes = shared(serial.stats_planes)
stats_columns = shared(serial.stats_columns)
normalize_planes = shared(serial.normalize_planes)
normalize_columns = shared(serial.normalize_columns)
forward_planes = shared(serial.forward_planes)
forward_columns = shared(serial.forward_columns)
backward_sums_planes = shared(serial.backward_sums_planes)
backward_sums_columns = shared(serial.backward_sums_columns)
backward_elements_planes = shared(serial.backward_elements_planes)
backward_elements_columns = shared(serial.backward_elements_columns)
backward_planes = shared(serial.backward_planes)
backward_columns = shared(serial.backward_columns)
