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
    TABLE_ROWS,
    channels_of,
    fill_slopes,
    finish_backward,
    finish_given,
    finish_training,
    merge_chunks,
)
from numbabn.cpu.gradients import (
    Backward,
    column_elements,
    column_grad_chunk,
    plane_elements,
    plane_grad_chunk,
    slopes_of,
    spread_slopes,
)
from numbabn.cpu.memory import aligned, empty_like_computed, offset, pointer
from numbabn.cpu.normalization import (
    COLUMN_ROWS,
    Forward,
    affine_of,
    columns_of,
    normalize_plane,
    normalize_rows,
    spread_affine,
)
from numbabn.cpu.options import function, inline, kernel
from numbabn.cpu.reductions import column_chunk, first_value, plane_chunk
from numbabn.cpu.vector import LANES

# Values of a channel of which two arrays fit L2 twice.
SMALL_CHANNEL = 1 << 15
# Elements of one array beyond which it pays to prefetch rows of columns.
BEYOND_L2 = 1 << 21

# fmt: off
# The long lists of arguments below are easier to compare when they are set like text.


@inline
def forward_io(x, residual, bits, out, ahead):
    return Forward(pointer(x), pointer(residual), pointer(bits), pointer(out), ahead)


@inline
def backward_io(grad_output, x, bits, grad_input, grad_residual, ahead):
    return Backward(
        pointer(grad_output), pointer(x), pointer(bits), pointer(grad_input),
        pointer(grad_residual), ahead,
    )


# A buffer is made by the kernel and used through a pointer; reading it afterwards, as this does,
# is what keeps it alive until then.
@inline
def keep_alive(buffer):
    return buffer.size


@inline
def ahead_of_channel(N, L):
    """How far to prefetch while a channel is summed, and while it is written.

    Either way L elements on is the same row of the next channel. A channel that fits L2 beside
    the next is fetched while this one is summed; of a larger one the fetching is spread over the
    writing, which keeps memory busy in both directions.
    """
    return (L, 0) if N * L <= SMALL_CHANNEL else (0, L)


@inline
def room(width):
    """Numbers to set aside for `width` columns: whole vectors, and one that begins at the last."""
    return (width + 2 * LANES - 1) // LANES * LANES


# --- statistics -------------------------------------------------------------------------------


@kernel
def stats_planes(x, N, C, L, rows, segment, partials, start, stop):
    """Chunks start:stop of all channels' chunks, counted channel by channel."""
    to_x, chunk = pointer(x), pointer(partials)
    chunks = partials.shape[1]
    for item in range(start, stop):
        c = item // chunks
        shift = first_value(to_x, c * L)
        plane_chunk(
            to_x, N, C, L, rows, segment, c, item % chunks, shift, L, offset(chunk, 4 * item)
        )


@kernel
def stats_columns(x, M, C, L, rows, block, partials, start, stop):
    """Items start:stop of the grid (block of channels) × (chunk of rows)."""
    chunks = partials.shape[1]
    space = room(block * L)
    work = np.empty(4 * space + LANES)
    for item in range(start, stop):
        k = item % chunks
        c0 = (item // chunks) * block
        column_chunk(
            pointer(x), C, L, k, k * rows, min(M, (k + 1) * rows), c0, min(C, c0 + block),
            aligned(pointer(work)), space, offset(pointer(partials), 4 * chunks * c0), chunks,
        )
    return keep_alive(work)


@kernel
def finish_stats(x, partials, weight, bias, running_mean, running_var, momentum, eps, table):
    """From all chunks of all channels to the table, once the statistics were taken."""
    channels = channels_of(weight, bias, running_mean, running_var, momentum, eps, table)
    C, chunks, _ = partials.shape
    for c in range(C):
        chunk = offset(pointer(partials), 4 * chunks * c)
        finish_training(pointer(x), chunk, chunks, channels, c)


@kernel
def merge_stats(x, partials, mean, m2):
    """Mean and m2 of every channel from its chunks."""
    C, chunks, _ = partials.shape
    for c in range(C):
        chunk = offset(pointer(partials), 4 * chunks * c)
        count, center, total, m2[c] = merge_chunks(pointer(x), chunk, chunks)
        mean[c] = center + total / count


# --- forward ----------------------------------------------------------------------------------


@function
def ready_table(x, weight, bias, running_mean, running_var, eps, table):
    """The table: as it is, or filled (and made, if empty) from running statistics if given."""
    C = running_mean.size
    if C:
        if not table.size:
            table = np.empty((TABLE_ROWS, C))
        channels = channels_of(weight, bias, running_mean, running_var, 0.0, eps, table)
        for c in range(C):
            mean = np.float64(channels.running_mean[c])
            invstd = 1.0 / np.sqrt(np.float64(channels.running_var[c]) + eps)
            finish_given(pointer(x), mean, invstd, channels, c)
    return table


@kernel
def finish_known(x, mean, invstd, weight, bias, table):
    """Fill the table from float64 mean and invstd."""
    channels = channels_of(weight, bias, mean, invstd, 0.0, 0.0, table)
    for c in range(mean.size):
        finish_given(
            pointer(x), channels.running_mean[c], channels.running_var[c], channels, c
        )


@kernel
def normalize_planes(
    x, residual, bits, out, C, L, segment, weight, bias, running_mean, running_var, eps, table,
    floor, streaming, start, stop,
):
    """Items start:stop of the segments of all planes, in the order of memory."""
    table = ready_table(x, weight, bias, running_mean, running_var, eps, table)
    io = forward_io(x, residual, bits, out, 0)
    to_table = pointer(table)
    across = (L + segment - 1) // segment
    row_bits = (L + LANES - 1) // LANES
    row = start // across
    l0 = (start % across) * segment
    c = row % C
    affine = affine_of(io.x, to_table, C, c)
    for _ in range(start, stop):
        l1 = min(L, l0 + segment)
        bit = row * row_bits + l0 // LANES
        normalize_plane(io, row * L + l0, row * L + l1, bit, affine, floor, streaming)
        l0 = l1
        if l0 == L:
            l0 = 0
            row += 1
            c = c + 1 if c + 1 < C else 0
            affine = affine_of(io.x, to_table, C, c)
    return keep_alive(table)


@kernel
def normalize_columns(
    x, residual, bits, out, M, C, L, rows, block, weight, bias, running_mean, running_var, eps,
    table, floor, streaming, start, stop,
):
    """Items start:stop of the grid (block of channels) × (rows), a block's rows in turn."""
    table = ready_table(x, weight, bias, running_mean, running_var, eps, table)
    io = forward_io(x, residual, bits, out, 0)
    downs = (M + rows - 1) // rows
    space = room(block * L)
    buffer = empty_like_computed(io.x, COLUMN_ROWS * space + LANES)
    columns = columns_of(pointer(buffer), space)
    spread_block = -1
    for item in range(start, stop):
        c0 = (item // downs) * block
        c1 = min(C, c0 + block)
        m0 = (item % downs) * rows
        if c0 != spread_block:
            spread_affine(pointer(table), C, c0, c1, L, columns)
            spread_block = c0
        normalize_rows(
            io, C * L, m0, min(M, m0 + rows), c0 * L, (c1 - c0) * L, columns, floor, streaming
        )
    return keep_alive(buffer) + keep_alive(table)


@kernel
def forward_planes(
    x, residual, bits, out, N, C, L, rows, segment, chunks, weight, bias, running_mean,
    running_var, momentum, eps, table, floor, streaming, start, stop,
):
    """Training, channels start:stop: a channel is summed, then normalized while it is in cache."""
    sums_ahead, elements_ahead = ahead_of_channel(N, L)
    io = forward_io(x, residual, bits, out, elements_ahead)
    channels = channels_of(weight, bias, running_mean, running_var, momentum, eps, table)
    partials = np.empty(4 * chunks)
    chunk = pointer(partials)
    row_bits = (L + LANES - 1) // LANES
    for c in range(start, stop):
        shift = first_value(io.x, c * L)
        for k in range(chunks):
            plane_chunk(io.x, N, C, L, rows, segment, c, k, shift, sums_ahead, offset(chunk, 4 * k))
        finish_training(io.x, chunk, chunks, channels, c)
        affine = affine_of(io.x, channels.table, C, c)
        for n in range(N):
            row = n * C + c
            normalize_plane(
                io, row * L, (row + 1) * L, row * row_bits, affine, floor, streaming
            )
    return keep_alive(partials)


@kernel
def forward_columns(
    x, residual, bits, out, M, C, L, rows, block, chunks, weight, bias, running_mean, running_var,
    momentum, eps, table, floor, streaming, start, stop,
):
    """Training, blocks of channels start:stop, each summed, then normalized while in cache."""
    io = forward_io(x, residual, bits, out, block * L)
    channels = channels_of(weight, bias, running_mean, running_var, momentum, eps, table)
    space = room(block * L)
    work = np.empty(4 * space + LANES)
    buffer = empty_like_computed(io.x, COLUMN_ROWS * space + LANES)
    columns = columns_of(pointer(buffer), space)
    partials = np.empty(4 * block * chunks)
    chunk = pointer(partials)
    for item in range(start, stop):
        c0 = item * block
        c1 = min(C, c0 + block)
        for k in range(chunks):
            column_chunk(
                io.x, C, L, k, k * rows, min(M, (k + 1) * rows), c0, c1, aligned(pointer(work)),
                space, chunk, chunks,
            )
        for c in range(c0, c1):
            finish_training(io.x, offset(chunk, 4 * chunks * (c - c0)), chunks, channels, c)
        spread_affine(channels.table, C, c0, c1, L, columns)
        normalize_rows(io, C * L, 0, M, c0 * L, (c1 - c0) * L, columns, floor, streaming)
    return keep_alive(work) + keep_alive(buffer) + keep_alive(partials)


# --- backward ---------------------------------------------------------------------------------


@kernel
def backward_sums_planes(
    grad_output, x, bits, grad_input, grad_residual, N, C, L, rows, segment, table, partials,
    relu, streaming, start, stop,
):
    """Chunks start:stop of all channels' chunks; in eval mode, with the input gradient."""
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, L)
    chunks = partials.shape[1]
    for item in range(start, stop):
        c = item // chunks
        affine = affine_of(io.x, pointer(table), C, c)
        plane_grad_chunk(
            io, N, C, L, rows, segment, c, item % chunks, affine, relu, streaming,
            offset(pointer(partials), 3 * item),
        )


@kernel
def backward_sums_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, table, partials, relu,
    streaming, start, stop,
):
    """Items start:stop of the grid (block of channels) × (chunk of rows); see planes."""
    ahead = 4 * C * L if M * C * L > BEYOND_L2 else 0
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, ahead)
    chunks = partials.shape[1]
    space = room(block * L)
    work = np.empty(2 * space + LANES)
    buffer = empty_like_computed(io.x, COLUMN_ROWS * space + LANES)
    columns = columns_of(pointer(buffer), space)
    spread_block = -1
    for item in range(start, stop):
        k = item % chunks
        c0 = (item // chunks) * block
        c1 = min(C, c0 + block)
        if c0 != spread_block:
            spread_affine(pointer(table), C, c0, c1, L, columns)
            spread_block = c0
        column_grad_chunk(
            io, C, L, k, k * rows, min(M, (k + 1) * rows), c0, c1, columns, relu, streaming,
            aligned(pointer(work)), space, offset(pointer(partials), 3 * chunks * c0), chunks,
        )
    return keep_alive(work) + keep_alive(buffer)


@kernel
def finish_sums(x, partials, table, sums, slopes):
    """From all chunks of all channels to ``sums`` and ``slopes``."""
    C, chunks, _ = partials.shape
    for c in range(C):
        finish_backward(
            pointer(x), offset(pointer(partials), 3 * chunks * c), chunks, C, c, pointer(table),
            pointer(sums), pointer(slopes),
        )


@kernel
def finish_slopes(x, count, sum_dy, sum_dy_xmu, table, slopes):
    """Fill `slopes` from sums of all workers, relative to the exact mean."""
    C = sum_dy.size
    for c in range(C):
        mean_dy_xhat = sum_dy_xmu[c] * table[INVSTD, c] / count
        mean_dy = sum_dy[c] / count
        fill_slopes(pointer(x), C, c, mean_dy, mean_dy_xhat, pointer(table), pointer(slopes))


@kernel
def backward_elements_planes(
    grad_output, x, bits, grad_input, grad_residual, C, L, segment, table, slopes, relu,
    streaming, start, stop,
):
    """Training, given the sums: items start:stop of the segments of all planes."""
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, 0)
    across = (L + segment - 1) // segment
    row_bits = (L + LANES - 1) // LANES
    for item in range(start, stop):
        row = item // across
        l0 = (item % across) * segment
        l1 = min(L, l0 + segment)
        bit = row * row_bits + l0 // LANES
        affine = affine_of(io.x, pointer(table), C, row % C)
        own = slopes_of(io.x, pointer(slopes), C, row % C)
        plane_elements(io, row * L + l0, row * L + l1, bit, affine, own, relu, streaming)


@kernel
def backward_elements_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, table, slopes, relu,
    streaming, start, stop,
):
    """Training, given the sums: items start:stop of the grid (block of channels) × (rows)."""
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, 0)
    downs = (M + rows - 1) // rows
    space = room(block * L)
    buffer = empty_like_computed(io.x, COLUMN_ROWS * space + LANES)
    columns = columns_of(pointer(buffer), space)
    spread_block = -1
    for item in range(start, stop):
        c0 = (item // downs) * block
        c1 = min(C, c0 + block)
        m0 = (item % downs) * rows
        if c0 != spread_block:
            spread_affine(pointer(table), C, c0, c1, L, columns)
            spread_slopes(pointer(slopes), C, c0, c1, L, columns)
            spread_block = c0
        column_elements(
            io, C * L, m0, min(M, m0 + rows), c0 * L, (c1 - c0) * L, columns, relu, streaming
        )
    return keep_alive(buffer)


@kernel
def backward_planes(
    grad_output, x, bits, grad_input, grad_residual, N, C, L, rows, segment, chunks, table, sums,
    slopes, relu, streaming, start, stop,
):
    """Training, channels start:stop: summed, then differentiated while x and dy are in cache."""
    sums_ahead, elements_ahead = ahead_of_channel(N, L)
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, elements_ahead)
    reading = Backward(io.grad_output, io.x, io.bits, None, None, sums_ahead)
    partials = np.empty(3 * chunks)
    chunk = pointer(partials)
    row_bits = (L + LANES - 1) // LANES
    for c in range(start, stop):
        affine = affine_of(io.x, pointer(table), C, c)
        for k in range(chunks):
            plane_grad_chunk(
                reading, N, C, L, rows, segment, c, k, affine, relu, False, offset(chunk, 3 * k)
            )
        finish_backward(
            io.x, chunk, chunks, C, c, pointer(table), pointer(sums), pointer(slopes)
        )
        own = slopes_of(io.x, pointer(slopes), C, c)
        for n in range(N):
            row = n * C + c
            plane_elements(
                io, row * L, (row + 1) * L, row * row_bits, affine, own, relu, streaming
            )
    return keep_alive(partials)


@kernel
def backward_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, chunks, table, sums,
    slopes, relu, streaming, start, stop,
):
    """Training, blocks of channels start:stop, summed, then differentiated while in cache."""
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, block * L)
    reading = Backward(io.grad_output, io.x, io.bits, None, None, 0)
    space = room(block * L)
    work = np.empty(2 * space + LANES)
    buffer = empty_like_computed(io.x, COLUMN_ROWS * space + LANES)
    columns = columns_of(pointer(buffer), space)
    partials = np.empty(3 * block * chunks)
    chunk = pointer(partials)
    for item in range(start, stop):
        c0 = item * block
        c1 = min(C, c0 + block)
        spread_affine(pointer(table), C, c0, c1, L, columns)
        for k in range(chunks):
            column_grad_chunk(
                reading, C, L, k, k * rows, min(M, (k + 1) * rows), c0, c1, columns, relu, False,
                aligned(pointer(work)), space, chunk, chunks,
            )
        for c in range(c0, c1):
            finish_backward(
                io.x, offset(chunk, 3 * chunks * (c - c0)), chunks, C, c, pointer(table),
                pointer(sums), pointer(slopes),
            )
        spread_slopes(pointer(slopes), C, c0, c1, L, columns)
        column_elements(io, C * L, 0, M, c0 * L, (c1 - c0) * L, columns, relu, streaming)
    return keep_alive(work) + keep_alive(buffer) + keep_alive(partials)
