"""The kernels, each over a range of its items, in one thread; `parallel` shares the range out.

Arguments in order: the arrays of elements (flat; float16 and bfloat16 as int16 and uint16), the
view's shape, how it is cut up (see `schedule`), the arrays of channels (see `channels`), then
``relu`` or ``floor``, ``streaming``, and the range ``start, stop``. None stands for an array of
elements that there is no need of.

Planes are N, C, L; columns are M rows of C channels times L columns each.
"""

import numpy as np

from numbabn.cpu.channels import (
    INVSTD,
    fill_column,
    fill_slopes,
    finish_backward,
    finish_training,
    finite,
    merge_chunks,
    round_mean,
)
from numbabn.cpu.gradients import (
    Backward,
    column_elements,
    column_grad_chunk,
    plane_elements,
    plane_grad_chunk,
    spread_slopes,
)
from numbabn.cpu.memory import pointer
from numbabn.cpu.normalization import (
    Forward,
    columns_buffer,
    normalize_plane,
    normalize_rows,
    spread_affine,
)
from numbabn.cpu.options import function, kernel
from numbabn.cpu.reductions import column_chunk, first_value, plane_chunk
from numbabn.cpu.vector import LANES

# fmt: off
# The long lists of arguments below are easier to compare when they are set like text.


@kernel
def stats_planes(x, N, C, L, rows, segment, partials, start, stop):
    """Chunks start:stop of all channels' chunks, counted channel by channel."""
    chunks = partials.shape[1]
    to_x = pointer(x)
    for item in range(start, stop):
        c = item // chunks
        shift = first_value(to_x, c * L)
        plane_chunk(to_x, N, C, L, rows, segment, c, item % chunks, shift, partials, c)


@kernel
def stats_columns(x, M, C, L, rows, block, partials, start, stop):
    """Items start:stop of the grid (chunk of rows) × (block of channels)."""
    blocks = (C + block - 1) // block
    work = np.empty((4, block * L + LANES))
    for item in range(start, stop):
        k = item // blocks
        c0 = (item % blocks) * block
        column_chunk(
            pointer(x), C, L, k, k * rows, min(M, (k + 1) * rows), c0, min(C, c0 + block),
            work, partials, c0,
        )


@kernel
def finish_stats(x, partials, weight, bias, running_mean, running_var, momentum, eps, table):
    """From all chunks of all channels to the table, once the statistics were taken."""
    for c in range(partials.shape[0]):
        finish_training(
            pointer(x), partials, c, c, weight, bias,
            running_mean, running_var, momentum, eps, table,
        )


@kernel
def normalize_planes(x, residual, bits, out, C, L, segment, table, floor, streaming, start, stop):
    """Items start:stop of the segments of all planes, in the order of memory."""
    io = Forward(pointer(x), pointer(residual), pointer(bits), pointer(out))
    across = (L + segment - 1) // segment
    row_bits = (L + LANES - 1) // LANES
    for item in range(start, stop):
        row = item // across
        l0 = (item % across) * segment
        l1 = min(L, l0 + segment)
        bit = row * row_bits + l0 // LANES
        normalize_plane(io, row * L + l0, row * L + l1, bit, table, row % C, floor, streaming)


@kernel
def normalize_columns(
    x, residual, bits, out, M, C, L, rows, block, table, floor, streaming, start, stop
):
    """Items start:stop of the grid (block of channels) × (rows), a block's rows in turn."""
    io = Forward(pointer(x), pointer(residual), pointer(bits), pointer(out))
    downs = (M + rows - 1) // rows
    params = columns_buffer(pointer(x), 4, block, L)
    spread_block = -1
    for item in range(start, stop):
        c0 = (item // downs) * block
        c1 = min(C, c0 + block)
        m0 = (item % downs) * rows
        if c0 != spread_block:
            spread_affine(table, c0, c1, L, params)
            spread_block = c0
        normalize_rows(
            io, C * L, m0, min(M, m0 + rows), c0 * L, (c1 - c0) * L, params, floor, streaming
        )


@kernel
def forward_planes(
    x, residual, bits, out, N, C, L, rows, segment, chunks, weight, bias, running_mean,
    running_var, momentum, eps, table, floor, streaming, start, stop,
):
    """Training, channels start:stop: a channel is summed, then normalized while it is in cache."""
    io = Forward(pointer(x), pointer(residual), pointer(bits), pointer(out))
    partials = np.empty((1, chunks, 4))
    row_bits = (L + LANES - 1) // LANES
    for c in range(start, stop):
        shift = first_value(io.x, c * L)
        for k in range(chunks):
            plane_chunk(io.x, N, C, L, rows, segment, c, k, shift, partials, 0)
        finish_training(
            io.x, partials, 0, c, weight, bias, running_mean, running_var, momentum, eps,
            table,
        )
        for n in range(N):
            row = n * C + c
            normalize_plane(
                io, row * L, (row + 1) * L, row * row_bits, table, c, floor, streaming
            )


@kernel
def forward_columns(
    x, residual, bits, out, M, C, L, rows, block, chunks, weight, bias, running_mean, running_var,
    momentum, eps, table, floor, streaming, start, stop,
):
    """Training, blocks of channels start:stop, each summed, then normalized while in cache."""
    io = Forward(pointer(x), pointer(residual), pointer(bits), pointer(out))
    work = np.empty((4, block * L + LANES))
    params = columns_buffer(pointer(x), 4, block, L)
    partials = np.empty((block, chunks, 4))
    for item in range(start, stop):
        c0 = item * block
        c1 = min(C, c0 + block)
        for k in range(chunks):
            column_chunk(
                io.x, C, L, k, k * rows, min(M, (k + 1) * rows), c0, c1, work, partials, 0
            )
        for c in range(c0, c1):
            finish_training(
                io.x, partials, c - c0, c, weight, bias, running_mean,
                running_var, momentum, eps, table,
            )
        spread_affine(table, c0, c1, L, params)
        normalize_rows(io, C * L, 0, M, c0 * L, (c1 - c0) * L, params, floor, streaming)


@kernel
def backward_sums_planes(
    grad_output, x, bits, grad_input, grad_residual, N, C, L, rows, segment, table, partials,
    relu, streaming, start, stop,
):
    """Chunks start:stop of all channels' chunks; in eval mode, with the input gradient."""
    io = Backward(
        pointer(grad_output), pointer(x), pointer(bits), pointer(grad_input),
        pointer(grad_residual),
    )
    chunks = partials.shape[1]
    for item in range(start, stop):
        c = item // chunks
        plane_grad_chunk(
            io, N, C, L, rows, segment, c, item % chunks, table, relu, streaming, partials, c
        )


@kernel
def backward_sums_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, table, partials, relu,
    streaming, start, stop,
):
    """Items start:stop of the grid (block of channels) × (chunk of rows); see planes."""
    io = Backward(
        pointer(grad_output), pointer(x), pointer(bits), pointer(grad_input),
        pointer(grad_residual),
    )
    chunks = partials.shape[1]
    work = np.empty((2, block * L + LANES))
    params = columns_buffer(pointer(x), 4, block, L)
    spread_block = -1
    for item in range(start, stop):
        k = item % chunks
        c0 = (item // chunks) * block
        c1 = min(C, c0 + block)
        if c0 != spread_block:
            spread_affine(table, c0, c1, L, params)
            spread_block = c0
        column_grad_chunk(
            io, C, L, k, k * rows, min(M, (k + 1) * rows), c0, c1, params, relu, streaming,
            work, partials, c0,
        )


@kernel
def finish_sums(x, partials, table, sums, slopes):
    """From all chunks of all channels to ``sums`` and ``slopes``."""
    for c in range(partials.shape[0]):
        finish_backward(pointer(x), partials, c, c, table, sums, slopes)


@kernel
def backward_elements_planes(
    grad_output, x, bits, grad_input, grad_residual, C, L, segment, table, slopes, relu,
    streaming, start, stop,
):
    """Training, given the sums: items start:stop of the segments of all planes."""
    io = Backward(
        pointer(grad_output), pointer(x), pointer(bits), pointer(grad_input),
        pointer(grad_residual),
    )
    across = (L + segment - 1) // segment
    row_bits = (L + LANES - 1) // LANES
    for item in range(start, stop):
        row = item // across
        l0 = (item % across) * segment
        l1 = min(L, l0 + segment)
        bit = row * row_bits + l0 // LANES
        plane_elements(io, row * L + l0, row * L + l1, bit, table, slopes, row % C, relu, streaming)


@kernel
def backward_elements_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, table, slopes, relu,
    streaming, start, stop,
):
    """Training, given the sums: items start:stop of the grid (block of channels) × (rows)."""
    io = Backward(
        pointer(grad_output), pointer(x), pointer(bits), pointer(grad_input),
        pointer(grad_residual),
    )
    downs = (M + rows - 1) // rows
    params = columns_buffer(pointer(x), 7, block, L)
    spread_block = -1
    for item in range(start, stop):
        c0 = (item // downs) * block
        c1 = min(C, c0 + block)
        m0 = (item % downs) * rows
        if c0 != spread_block:
            spread_affine(table, c0, c1, L, params)
            spread_slopes(slopes, c0, c1, L, params)
            spread_block = c0
        column_elements(
            io, C * L, m0, min(M, m0 + rows), c0 * L, (c1 - c0) * L, params, relu, streaming
        )


@kernel
def backward_planes(
    grad_output, x, bits, grad_input, grad_residual, N, C, L, rows, segment, chunks, table, sums,
    slopes, relu, streaming, start, stop,
):
    """Training, channels start:stop: summed, then differentiated while x and dy are in cache."""
    io = Backward(
        pointer(grad_output), pointer(x), pointer(bits), pointer(grad_input),
        pointer(grad_residual),
    )
    reading = Backward(io.grad_output, io.x, io.bits, None, None)
    partials = np.empty((1, chunks, 3))
    row_bits = (L + LANES - 1) // LANES
    for c in range(start, stop):
        for k in range(chunks):
            plane_grad_chunk(
                reading, N, C, L, rows, segment, c, k, table, relu, False, partials, 0
            )
        finish_backward(io.x, partials, 0, c, table, sums, slopes)
        for n in range(N):
            row = n * C + c
            plane_elements(
                io, row * L, (row + 1) * L, row * row_bits, table, slopes, c, relu, streaming
            )


@kernel
def backward_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, chunks, table, sums,
    slopes, relu, streaming, start, stop,
):
    """Training, blocks of channels start:stop, summed, then differentiated while in cache."""
    io = Backward(
        pointer(grad_output), pointer(x), pointer(bits), pointer(grad_input),
        pointer(grad_residual),
    )
    reading = Backward(io.grad_output, io.x, io.bits, None, None)
    work = np.empty((2, block * L + LANES))
    params = columns_buffer(pointer(x), 7, block, L)
    partials = np.empty((block, chunks, 3))
    for item in range(start, stop):
        c0 = item * block
        c1 = min(C, c0 + block)
        spread_affine(table, c0, c1, L, params)
        for k in range(chunks):
            column_grad_chunk(
                reading, C, L, k, k * rows, min(M, (k + 1) * rows), c0, c1, params, relu, False,
                work, partials, 0,
            )
        for c in range(c0, c1):
            finish_backward(io.x, partials, c - c0, c, table, sums, slopes)
        spread_slopes(slopes, c0, c1, L, params)
        column_elements(io, C * L, 0, M, c0 * L, (c1 - c0) * L, params, relu, streaming)


# --- once per channel: see `channels` ---------------------------------------------------------


@kernel
def merge_stats(partials, mean, m2):
    """Mean and m2 of every channel from its chunks."""
    for c in range(mean.size):
        count, center, total, m2[c] = merge_chunks(partials, c)
        mean[c] = center + total / count


@kernel
def finish_eval(x, running_mean, running_var, weight, bias, eps, table):
    """Fill the table from the running statistics."""
    for c in range(running_mean.size):
        invstd = 1.0 / np.sqrt(np.float64(running_var[c]) + eps)
        finish_given(x, np.float64(running_mean[c]), invstd, weight, bias, table, c)


@kernel
def finish_known(x, mean, invstd, weight, bias, table):
    """Fill the table from float64 mean and invstd."""
    for c in range(mean.size):
        finish_given(x, mean[c], invstd[c], weight, bias, table, c)


@function
def finish_given(x, mean, invstd, weight, bias, table, c):
    rounded, low = round_mean(pointer(x), mean)
    fill_column(table, c, rounded, finite(low * invstd), invstd, weight, bias)


@kernel
def finish_slopes(x, count, sum_dy, sum_dy_xmu, table, slopes):
    """Fill `slopes` from sums of all workers, relative to the exact mean."""
    for c in range(sum_dy.size):
        mean_dy_xhat = sum_dy_xmu[c] * table[INVSTD, c] / count
        fill_slopes(pointer(x), c, sum_dy[c] / count, mean_dy_xhat, table, slopes)
