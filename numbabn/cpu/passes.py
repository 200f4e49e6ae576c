"""What Python calls: whole passes, each one kernel from the look at addresses to the last result.

A call from Python costs as much as some thousand elements, and each array passed on as much as some
tens, so nothing is left to a second call that the first can do. The kernels of a pass return
whether they did it, which depends on what memory is shared, see `sharing`.

Arguments in order: the number of parts (see `parallel`), the arrays of elements and of channels as
`serial` has them, and how the work is cut up, in the order of the fields of a `schedule.Plan`.

Training goes one of two ways. Where a channel's values, or those of a block of channels, stay in a
core's cache, each is summed, then gone over again before the next is begun. The others, which go
`twice` through all, sum everything first; the threads meet, and one of them does what is done per
channel.
"""

import numpy as np

from numbabn.cpu import parallel, serial
from numbabn.cpu.channels import BACKWARD_FIELDS, FORWARD_FIELDS, SLOPE_ROWS
from numbabn.cpu.options import inline, kernel
from numbabn.cpu.sharing import may_train, may_write, may_write_back

# fmt: off
# The long lists of arguments below are easier to compare when they are set like text.


# --- training, forward ------------------------------------------------------------------------


@kernel
def forward_planes(
    parts, x, residual, bits, out, sharing, weight, bias, running_mean, running_var, momentum, eps,
    table, floor, streaming, items, sizes,
):
    if not may_train(out, x, sharing, weight, bias, running_mean, running_var):
        return False
    parallel.forward_planes(
        parts, items, x, residual, bits, out, *sizes, weight, bias, running_mean, running_var,
        momentum, eps, table, floor, streaming,
    )
    return True


@kernel
def forward_columns(
    parts, x, residual, bits, out, sharing, weight, bias, running_mean, running_var, momentum, eps,
    table, floor, streaming, items, sizes,
):
    if not may_train(out, x, sharing, weight, bias, running_mean, running_var):
        return False
    parallel.forward_columns(
        parts, items, x, residual, bits, out, *sizes, weight, bias, running_mean, running_var,
        momentum, eps, table, floor, streaming,
    )
    return True


@kernel
def forward_twice_planes(
    parts, x, residual, bits, out, sharing, weight, bias, running_mean, running_var, momentum, eps,
    table, floor, streaming, chunks, chunk_items, stats_sizes, element_items, element_sizes,
):
    if not may_train(out, x, sharing, weight, bias, running_mean, running_var):
        return False
    partials = np.empty((chunks, FORWARD_FIELDS, table.shape[1]))
    parallel.stats_planes(parts, chunk_items, x, *stats_sizes, partials)
    serial.finish_stats(x, partials, weight, bias, running_mean, running_var, momentum, eps, table)
    none = weight[:0]
    parallel.normalize_planes(
        parts, element_items, x, residual, bits, out, *element_sizes, none, none, none, none, eps,
        table, floor, streaming,
    )
    return True


@kernel
def forward_twice_columns(
    parts, x, residual, bits, out, sharing, weight, bias, running_mean, running_var, momentum, eps,
    table, floor, streaming, chunks, chunk_items, stats_sizes, element_items, element_sizes,
):
    if not may_train(out, x, sharing, weight, bias, running_mean, running_var):
        return False
    partials = np.empty((chunks, FORWARD_FIELDS, table.shape[1]))
    parallel.stats_columns(parts, chunk_items, x, *stats_sizes, partials)
    serial.finish_stats(x, partials, weight, bias, running_mean, running_var, momentum, eps, table)
    none = weight[:0]
    parallel.normalize_columns(
        parts, element_items, x, residual, bits, out, *element_sizes, none, none, none, none, eps,
        table, floor, streaming,
    )
    return True


# --- eval, forward ----------------------------------------------------------------------------


@inline
def no_channels(x, weight, bias, running_mean, running_var, eps, table):
    """Fill the table, if it is there to be kept and there are running statistics to fill it from.

    Returns the channels that are left for the kernel to look at: none then.
    """
    if table.size > 0 and running_mean.size > 0:
        serial.finish_eval(x, weight, bias, running_mean, running_var, eps, table)
        none = weight[:0]
        return none, none, none, none
    return weight, bias, running_mean, running_var


@kernel
def normalize_planes(
    parts, x, residual, bits, out, sharing, weight, bias, running_mean, running_var, eps, table,
    floor, streaming, items, sizes,
):
    """With the running statistics, or what the table holds where none are given."""
    if not may_write(out, x, sharing, weight, bias, running_mean, running_var):
        return False
    channels = no_channels(x, weight, bias, running_mean, running_var, eps, table)
    parallel.normalize_planes(
        parts, items, x, residual, bits, out, *sizes, *channels, eps, table, floor, streaming
    )
    return True


@kernel
def normalize_columns(
    parts, x, residual, bits, out, sharing, weight, bias, running_mean, running_var, eps, table,
    floor, streaming, items, sizes,
):
    """With the running statistics, or what the table holds where none are given."""
    if not may_write(out, x, sharing, weight, bias, running_mean, running_var):
        return False
    channels = no_channels(x, weight, bias, running_mean, running_var, eps, table)
    parallel.normalize_columns(
        parts, items, x, residual, bits, out, *sizes, *channels, eps, table, floor, streaming
    )
    return True


# --- training, backward -----------------------------------------------------------------------


@kernel
def backward_planes(
    parts, grad_output, x, bits, grad_input, grad_residual, sharing, table, sums, relu, streaming,
    items, sizes,
):
    if not may_write_back(grad_input, grad_output, x, sharing):
        return False
    slopes = np.empty((SLOPE_ROWS, table.shape[1]))
    parallel.backward_planes(
        parts, items, grad_output, x, bits, grad_input, grad_residual, *sizes, table, sums, slopes,
        relu, streaming,
    )
    return True


@kernel
def backward_columns(
    parts, grad_output, x, bits, grad_input, grad_residual, sharing, table, sums, relu, streaming,
    items, sizes,
):
    if not may_write_back(grad_input, grad_output, x, sharing):
        return False
    slopes = np.empty((SLOPE_ROWS, table.shape[1]))
    parallel.backward_columns(
        parts, items, grad_output, x, bits, grad_input, grad_residual, *sizes, table, sums, slopes,
        relu, streaming,
    )
    return True


@kernel
def backward_twice_planes(
    parts, grad_output, x, bits, grad_input, grad_residual, sharing, table, sums, relu, streaming,
    chunks, chunk_items, sums_sizes, element_items, element_sizes,
):
    if not may_write_back(grad_input, grad_output, x, sharing):
        return False
    partials = np.empty((chunks, BACKWARD_FIELDS, table.shape[1]))
    slopes = np.empty((SLOPE_ROWS, table.shape[1]))
    parallel.backward_sums_planes(
        parts, chunk_items, grad_output, x, bits, None, None, *sums_sizes, table, partials, sums,
        False, relu, streaming,
    )
    serial.finish_sums(x, partials, table, sums, slopes)
    parallel.backward_elements_planes(
        parts, element_items, grad_output, x, bits, grad_input, grad_residual, *element_sizes,
        table, slopes, relu, streaming,
    )
    return True


@kernel
def backward_twice_columns(
    parts, grad_output, x, bits, grad_input, grad_residual, sharing, table, sums, relu, streaming,
    chunks, chunk_items, sums_sizes, element_items, element_sizes,
):
    if not may_write_back(grad_input, grad_output, x, sharing):
        return False
    partials = np.empty((chunks, BACKWARD_FIELDS, table.shape[1]))
    slopes = np.empty((SLOPE_ROWS, table.shape[1]))
    parallel.backward_sums_columns(
        parts, chunk_items, grad_output, x, bits, None, None, *sums_sizes, table, partials, sums,
        False, relu, streaming,
    )
    serial.finish_sums(x, partials, table, sums, slopes)
    parallel.backward_elements_columns(
        parts, element_items, grad_output, x, bits, grad_input, grad_residual, *element_sizes,
        table, slopes, relu, streaming,
    )
    return True


# --- eval, backward; and the sums of weight and bias alone, in either mode --------------------


@kernel
def backward_eval_planes(
    parts, grad_output, x, bits, grad_input, grad_residual, sharing, table, sums, relu, streaming,
    chunks, finish, items, sizes,
):
    """To `finish`, an item is a group of channels, which comes to its results; see `serial`."""
    if not may_write_back(grad_input, grad_output, x, sharing):
        return False
    partials = np.empty((chunks, BACKWARD_FIELDS, table.shape[1]))
    parallel.backward_sums_planes(
        parts, items, grad_output, x, bits, grad_input, grad_residual, *sizes, table, partials,
        sums, finish, relu, streaming,
    )
    if not finish:
        serial.finish_sums(x, partials, table, sums, np.empty((SLOPE_ROWS, table.shape[1])))
    return True


@kernel
def backward_eval_columns(
    parts, grad_output, x, bits, grad_input, grad_residual, sharing, table, sums, relu, streaming,
    chunks, finish, items, sizes,
):
    """See planes."""
    if not may_write_back(grad_input, grad_output, x, sharing):
        return False
    partials = np.empty((chunks, BACKWARD_FIELDS, table.shape[1]))
    parallel.backward_sums_columns(
        parts, items, grad_output, x, bits, grad_input, grad_residual, *sizes, table, partials,
        sums, finish, relu, streaming,
    )
    if not finish:
        serial.finish_sums(x, partials, table, sums, np.empty((SLOPE_ROWS, table.shape[1])))
    return True


# --- parts of passes --------------------------------------------------------------------------


@kernel
def stats_planes(parts, items, *arguments):
    parallel.stats_planes(parts, items, *arguments)


@kernel
def stats_columns(parts, items, *arguments):
    parallel.stats_columns(parts, items, *arguments)


@kernel
def backward_sums_planes(parts, items, *arguments):
    parallel.backward_sums_planes(parts, items, *arguments)


@kernel
def backward_sums_columns(parts, items, *arguments):
    parallel.backward_sums_columns(parts, items, *arguments)


@kernel
def backward_elements_planes(parts, items, *arguments):
    parallel.backward_elements_planes(parts, items, *arguments)


@kernel
def backward_elements_columns(parts, items, *arguments):
    parallel.backward_elements_columns(parts, items, *arguments)
