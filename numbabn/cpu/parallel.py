"""The kernels of `serial` with their items shared out over threads.

Each part is one contiguous range, so that a thread stays in its own stretch of memory. Which
thread does what never changes a result: sums are cut into chunks by `schedule`, not here.

Arguments are the number of items, that of parts, and all that the kernel of that name in `serial`
takes before its range. (Numba compiles such a list of arguments as if it were written out.)
"""

import numpy as np
from numba import prange

from numbabn.cpu import serial
from numbabn.cpu.options import function, parallel_kernel


@function
def share(items, parts, part):
    """The range of items that `part` has."""
    return items * np.int64(part) // parts, items * np.int64(part + 1) // parts


@parallel_kernel
def stats_planes(items, parts, *arguments):
    for part in prange(parts):
        serial.stats_planes(*arguments, *share(items, parts, part))


@parallel_kernel
def stats_columns(items, parts, *arguments):
    for part in prange(parts):
        serial.stats_columns(*arguments, *share(items, parts, part))


@parallel_kernel
def normalize_planes(items, parts, *arguments):
    for part in prange(parts):
        serial.normalize_planes(*arguments, *share(items, parts, part))


@parallel_kernel
def normalize_columns(items, parts, *arguments):
    for part in prange(parts):
        serial.normalize_columns(*arguments, *share(items, parts, part))


@parallel_kernel
def forward_planes(items, parts, *arguments):
    for part in prange(parts):
        serial.forward_planes(*arguments, *share(items, parts, part))


@parallel_kernel
def forward_columns(items, parts, *arguments):
    for part in prange(parts):
        serial.forward_columns(*arguments, *share(items, parts, part))


@parallel_kernel
def backward_sums_planes(items, parts, *arguments):
    for part in prange(parts):
        serial.backward_sums_planes(*arguments, *share(items, parts, part))


@parallel_kernel
def backward_sums_columns(items, parts, *arguments):
    for part in prange(parts):
        serial.backward_sums_columns(*arguments, *share(items, parts, part))


@parallel_kernel
def backward_elements_planes(items, parts, *arguments):
    for part in prange(parts):
        serial.backward_elements_planes(*arguments, *share(items, parts, part))


@parallel_kernel
def backward_elements_columns(items, parts, *arguments):
    for part in prange(parts):
        serial.backward_elements_columns(*arguments, *share(items, parts, part))


@parallel_kernel
def backward_planes(items, parts, *arguments):
    for part in prange(parts):
        serial.backward_planes(*arguments, *share(items, parts, part))


@parallel_kernel
def backward_columns(items, parts, *arguments):
    for part in prange(parts):
        serial.backward_columns(*arguments, *share(items, parts, part))


# --- both passes of training in one ---------------------------------------------------------------

# The threads meet between the sums and the elements, and one of them does what is done per channel.


@parallel_kernel
def forward_meeting_columns(
    chunk_items, items, parts, x, residual, bits, out, stats_sizes, element_sizes, weight, bias,
    running_mean, running_var, momentum, eps, table, partials, floor, streaming,
):  # fmt: skip
    for part in prange(parts):
        serial.stats_columns(x, *stats_sizes, partials, *share(chunk_items, parts, part))
    serial.finish_stats(x, partials, weight, bias, running_mean, running_var, momentum, eps, table)
    none = weight[:0]
    for part in prange(parts):
        serial.normalize_columns(
            x, residual, bits, out, *element_sizes, none, none, none, none, eps, table, floor,
            streaming, *share(items, parts, part),
        )  # fmt: skip


@parallel_kernel
def backward_meeting_columns(
    chunk_items, items, parts, grad_output, x, bits, grad_input, grad_residual, sums_sizes,
    element_sizes, table, partials, sums, slopes, relu, streaming,
):  # fmt: skip
    for part in prange(parts):
        serial.backward_sums_columns(
            grad_output, x, bits, None, None, *sums_sizes, table, partials, sums, False, relu,
            streaming, *share(chunk_items, parts, part),
        )  # fmt: skip
    serial.finish_sums(x, partials, table, sums, slopes)
    for part in prange(parts):
        serial.backward_elements_columns(
            grad_output, x, bits, grad_input, grad_residual, *element_sizes, table, slopes, relu,
            streaming, *share(items, parts, part),
        )  # fmt: skip
