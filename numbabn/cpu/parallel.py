"""The kernels of `serial` with their items shared out over threads.

Each part is one contiguous range, so that a thread stays in its own stretch of memory. Which
thread does what never changes a result: sums are cut into chunks by `schedule`, not here.
"""

import numpy as np
from numba import prange

from numbabn.cpu import serial
from numbabn.cpu.options import function, parallel_kernel

# fmt: off


@function
def share(items, parts, part):
    """Where `part` begins."""
    return items * np.int64(part) // parts


@parallel_kernel
def stats_planes(x, N, C, L, rows, segment, group, ahead, partials, items, parts):
    for part in prange(parts):
        serial.stats_planes(
            x, N, C, L, rows, segment, group, ahead, partials, share(items, parts, part),
            share(items, parts, part + 1),
        )


@parallel_kernel
def stats_columns(x, M, C, L, rows, block, ahead, partials, items, parts):
    for part in prange(parts):
        serial.stats_columns(
            x, M, C, L, rows, block, ahead, partials, share(items, parts, part),
            share(items, parts, part + 1),
        )


@parallel_kernel
def normalize_planes(
    x, residual, bits, out, C, L, segment, weight, bias, running_mean, running_var, eps, table,
    floor, streaming, items, parts,
):
    for part in prange(parts):
        serial.normalize_planes(
            x, residual, bits, out, C, L, segment, weight, bias, running_mean,
            running_var, eps, table, floor, streaming, share(items, parts, part),
            share(items, parts, part + 1),
        )


@parallel_kernel
def normalize_columns(
    x, residual, bits, out, M, C, L, rows, block, weight, bias, running_mean, running_var, eps,
    table, floor, streaming, items, parts,
):
    for part in prange(parts):
        serial.normalize_columns(
            x, residual, bits, out, M, C, L, rows, block, weight, bias, running_mean,
            running_var, eps, table, floor, streaming, share(items, parts, part),
            share(items, parts, part + 1),
        )


@parallel_kernel
def forward_planes(
    x, residual, bits, out, N, C, L, rows, segment, chunks, group, ahead, elements_ahead,
    weight, bias, running_mean, running_var, momentum, eps, table, floor, streaming, items, parts,
):
    for part in prange(parts):
        serial.forward_planes(
            x, residual, bits, out, N, C, L, rows, segment, chunks, group, ahead,
            elements_ahead, weight, bias, running_mean, running_var, momentum, eps, table, floor,
            streaming, share(items, parts, part), share(items, parts, part + 1),
        )


@parallel_kernel
def forward_columns(
    x, residual, bits, out, M, C, L, rows, block, chunks, ahead, weight, bias, running_mean,
    running_var, momentum, eps, table, floor, streaming, items, parts,
):
    for part in prange(parts):
        serial.forward_columns(
            x, residual, bits, out, M, C, L, rows, block, chunks, ahead, weight, bias, running_mean,
            running_var, momentum, eps, table, floor, streaming, share(items, parts, part),
            share(items, parts, part + 1),
        )


@parallel_kernel
def backward_sums_planes(
    grad_output, x, bits, grad_input, grad_residual, N, C, L, rows, segment, group, ahead, table,
    partials, sums, finish, relu, streaming, items, parts,
):
    for part in prange(parts):
        serial.backward_sums_planes(
            grad_output, x, bits, grad_input, grad_residual, N, C, L, rows, segment, group, ahead,
            table, partials, sums, finish, relu, streaming, share(items, parts, part),
            share(items, parts, part + 1),
        )


@parallel_kernel
def backward_sums_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, ahead, table, partials,
    sums, finish, relu, streaming, items, parts,
):
    for part in prange(parts):
        serial.backward_sums_columns(
            grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, ahead, table,
            partials, sums, finish, relu, streaming, share(items, parts, part),
            share(items, parts, part + 1),
        )


@parallel_kernel
def backward_elements_planes(
    grad_output, x, bits, grad_input, grad_residual, C, L, segment, table, slopes, relu, streaming,
    items, parts,
):
    for part in prange(parts):
        serial.backward_elements_planes(
            grad_output, x, bits, grad_input, grad_residual, C, L, segment, table, slopes, relu,
            streaming, share(items, parts, part), share(items, parts, part + 1),
        )


@parallel_kernel
def backward_elements_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, table, slopes, relu,
    streaming, items, parts,
):
    for part in prange(parts):
        serial.backward_elements_columns(
            grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, table, slopes,
            relu, streaming, share(items, parts, part), share(items, parts, part + 1),
        )


@parallel_kernel
def backward_planes(
    grad_output, x, bits, grad_input, grad_residual, N, C, L, rows, segment, chunks, group, ahead,
    elements_ahead, table, sums, slopes, relu, streaming, items, parts,
):
    for part in prange(parts):
        serial.backward_planes(
            grad_output, x, bits, grad_input, grad_residual, N, C, L, rows, segment, chunks,
            group, ahead, elements_ahead, table, sums, slopes, relu, streaming,
            share(items, parts, part), share(items, parts, part + 1),
        )


@parallel_kernel
def backward_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, chunks, ahead, table,
    sums, slopes, relu, streaming, items, parts,
):
    for part in prange(parts):
        serial.backward_columns(
            grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, chunks, ahead,
            table, sums, slopes, relu, streaming, share(items, parts, part),
            share(items, parts, part + 1),
        )


# --- both passes of training in one ---------------------------------------------------------------

# The threads meet between the sums and the elements, and one of them does what is done per channel.


@parallel_kernel
def forward_meeting_columns(
    x, residual, bits, out, M, C, L, rows, block, ahead, tall, wide, weight, bias, running_mean,
    running_var, momentum, eps, table, partials, floor, streaming, chunk_items, items, parts,
):
    for part in prange(parts):
        serial.stats_columns(
            x, M, C, L, rows, block, ahead, partials, share(chunk_items, parts, part),
            share(chunk_items, parts, part + 1),
        )
    serial.finish_stats(
        x, partials, weight, bias, running_mean, running_var, momentum, eps, table
    )
    none = weight[:0]
    for part in prange(parts):
        serial.normalize_columns(
            x, residual, bits, out, M, C, L, tall, wide, none, none, none, none, eps, table, floor,
            streaming, share(items, parts, part), share(items, parts, part + 1),
        )


@parallel_kernel
def backward_meeting_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, ahead, tall, wide,
    table, partials, sums, slopes, relu, streaming, chunk_items, items, parts,
):
    for part in prange(parts):
        serial.backward_sums_columns(
            grad_output, x, bits, None, None, M, C, L, rows, block, ahead, table, partials, sums,
            False, relu, streaming, share(chunk_items, parts, part),
            share(chunk_items, parts, part + 1),
        )
    serial.finish_sums(x, partials, table, sums, slopes)
    for part in prange(parts):
        serial.backward_elements_columns(
            grad_output, x, bits, grad_input, grad_residual, M, C, L, tall, wide, table, slopes,
            relu, streaming, share(items, parts, part), share(items, parts, part + 1),
        )
