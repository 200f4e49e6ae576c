"""The kernels, each over a range of its items, in one thread; `parallel` shares the range out.

Arguments in order: the arrays of elements (flat; float16 and bfloat16 as int16 and uint16), the
view's shape, how it is cut up (see `schedule`), the arrays of channels (see `channels`), then
``relu`` or ``floor``, ``streaming``, and the range ``start, stop``. None stands for an array of
elements that there is no need of.

Planes are N, C, L; columns are M rows of C channels times L columns each.
"""

import numpy as np

from numbabn.cpu.channels import (
    BACKWARD_FIELDS,
    FORWARD_FIELDS,
    INVSTD,
    TABLE_ROWS,
    Partials,
    channels_of,
    fill_slopes,
    finish_backward,
    finish_given,
    finish_running,
    finish_training,
    lanes_at,
    merge_chunks,
    read,
    write,
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
from numbabn.cpu.memory import aligned, empty_like_computed, offset, pointer, values_ahead
from numbabn.cpu.normalization import (
    COLUMN_ROWS,
    Forward,
    affine_of,
    columns_of,
    normalize_plane,
    normalize_rows,
    spread_affine,
)
from numbabn.cpu.options import inline, kernel
from numbabn.cpu.reductions import column_chunk, first_value, plane_chunk, reach_of
from numbabn.cpu.vector import LANES, splat64

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
def room(width):
    """Numbers to set aside for `width` columns: whole vectors, and one that begins at the last."""
    return (width + 2 * LANES - 1) // LANES * LANES


@inline
def partials_of(numbers):
    """All chunks of all channels: an array of shape (chunks, fields, C)."""
    chunks, fields, space = numbers.shape
    return Partials(pointer(numbers), fields, space, chunks)


@inline
def chunk_at(item, chunks, rows, L, segment):
    """Channel, number, first row and first column of a chunk of planes."""
    across = (L + segment - 1) // segment
    k = item % chunks
    return item // chunks, k, (k // across) * rows, (k % across) * segment


@inline
def next_chunk(c, k, n0, l0, chunks, rows, L, segment):
    """The chunk after that; divisions would take longer than a short chunk's sums."""
    k += 1
    if k == chunks:
        return c + 1, 0, 0, 0
    if l0 + segment < L:
        return c, k, n0, l0 + segment
    return c, k, n0 + rows, 0


# --- statistics -------------------------------------------------------------------------------


@kernel
def stats_planes(x, N, C, L, rows, segment, numbers, start, stop):
    """Chunks start:stop of all channels' chunks, counted channel by channel."""
    to_x, partials = pointer(x), partials_of(numbers)
    reach = reach_of(to_x, N, C, L)
    c, k, n0, l0 = chunk_at(start, partials.chunks, rows, L, segment)
    for _ in range(start, stop):
        plane_chunk(
            to_x, C, L, c, k, n0, min(N, n0 + rows), l0, min(L, l0 + segment),
            first_value(to_x, c * L), reach, partials, c,
        )
        c, k, n0, l0 = next_chunk(c, k, n0, l0, partials.chunks, rows, L, segment)


@kernel
def stats_columns(x, M, C, L, rows, block, numbers, start, stop):
    """Items start:stop of the grid (block of channels) × (chunk of rows)."""
    partials = partials_of(numbers)
    space = room(block * L)
    work = np.empty(4 * space + LANES)
    for item in range(start, stop):
        k = item % partials.chunks
        c0 = (item // partials.chunks) * block
        column_chunk(
            pointer(x), C, L, k, k * rows, min(M, (k + 1) * rows), c0, min(C, c0 + block),
            aligned(pointer(work)), space, partials, c0,
        )
    return keep_alive(work)


@kernel
def finish_stats(x, numbers, weight, bias, running_mean, running_var, momentum, eps, table):
    """From all chunks of all channels to the table, once the statistics were taken."""
    channels = channels_of(weight, bias, running_mean, running_var, momentum, eps, table)
    partials = partials_of(numbers)
    C = table.shape[1]
    for c in range(0, C, LANES):
        finish_training(pointer(x), partials, channels, c, c, lanes_at(c, C))


@kernel
def merge_stats(x, numbers, mean, m2):
    """Mean and m2 of every channel from its chunks."""
    partials = partials_of(numbers)
    for c in range(0, mean.size, LANES):
        lanes = lanes_at(c, mean.size)
        count, center, total, squares = merge_chunks(pointer(x), partials, c, lanes)
        write(pointer(mean), c, lanes, center + total / count)
        write(pointer(m2), c, lanes, squares)


# --- forward ----------------------------------------------------------------------------------


@kernel
def finish_known(x, mean, invstd, weight, bias, table):
    """Fill the table from float64 mean and invstd."""
    channels = channels_of(weight, bias, mean, invstd, 0.0, 0.0, table)
    for c in range(0, mean.size, LANES):
        lanes = lanes_at(c, mean.size)
        finish_given(
            pointer(x), read(pointer(mean), c, lanes), read(pointer(invstd), c, lanes), channels,
            c, lanes, c,
        )


@kernel
def finish_eval(x, weight, bias, running_mean, running_var, eps, table):
    """Fill the table from the running statistics."""
    channels = channels_of(weight, bias, running_mean, running_var, 0.0, eps, table)
    for c in range(0, running_mean.size, LANES):
        finish_running(pointer(x), channels, c, lanes_at(c, running_mean.size), c)


@kernel
def normalize_planes(
    x, residual, bits, out, C, L, segment, weight, bias, running_mean, running_var, eps, table,
    floor, streaming, start, stop,
):
    """Items start:stop of the segments of all planes, in the order of memory.

    With running statistics, the table has room for 16 channels, which are worked out as they come:
    that is cheaper than to have one thread do it for all.
    """
    known = running_mean.size == 0
    io = forward_io(x, residual, bits, out, values_ahead(pointer(x)))
    own_table = np.empty((TABLE_ROWS, LANES))
    channels = channels_of(weight, bias, running_mean, running_var, 0.0, eps, own_table)
    across = (L + segment - 1) // segment
    row_bits = (L + LANES - 1) // LANES
    row = start // across
    l0 = (start % across) * segment
    c = row % C
    at = LANES
    affine = affine_of(io.x, channels.table, LANES, 0)
    ahead = True
    for _ in range(start, stop):
        if ahead:
            if known:
                affine = affine_of(io.x, pointer(table), C, c)
            else:
                if at == LANES or c == 0:
                    finish_running(io.x, channels, c, lanes_at(c, C), 0)
                    at = 0
                affine = affine_of(io.x, channels.table, LANES, at)
                at += 1
        l1 = min(L, l0 + segment)
        bit = row * row_bits + l0 // LANES
        normalize_plane(io, row * L + l0, row * L + l1, bit, affine, floor, streaming)
        l0 = l1
        ahead = l0 == L
        if ahead:
            l0 = 0
            row += 1
            c = c + 1 if c + 1 < C else 0
    return keep_alive(table) + keep_alive(own_table)


@kernel
def normalize_columns(
    x, residual, bits, out, M, C, L, rows, block, weight, bias, running_mean, running_var, eps,
    table, floor, streaming, start, stop,
):
    """Items start:stop of the grid (block of channels) × (rows), a block's rows in turn."""
    known = running_mean.size == 0
    io = forward_io(x, residual, bits, out, values_ahead(pointer(x)))
    own_table = np.empty((TABLE_ROWS, LANES))
    channels = channels_of(weight, bias, running_mean, running_var, 0.0, eps, own_table)
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
            if known:
                spread_affine(pointer(table), C, c0, c1 - c0, L, columns, 0)
            else:
                for c in range(c0, c1, LANES):
                    lanes = lanes_at(c, c1)
                    finish_running(io.x, channels, c, lanes, 0)
                    spread_affine(channels.table, LANES, 0, lanes, L, columns, (c - c0) * L)
            spread_block = c0
        normalize_rows(
            io, C * L, m0, min(M, m0 + rows), c0 * L, (c1 - c0) * L, columns, floor, streaming
        )
    return keep_alive(buffer) + keep_alive(table) + keep_alive(own_table)


@kernel
def forward_planes(
    x, residual, bits, out, N, C, L, rows, segment, chunks, group, elements_ahead, weight, bias,
    running_mean, running_var, momentum, eps, table, floor, streaming, start, stop,
):
    """Training, channels start:stop: a group is summed, then normalized while it is in cache."""
    io = forward_io(x, residual, bits, out, elements_ahead)
    reach = reach_of(io.x, N, C, L)
    channels = channels_of(weight, bias, running_mean, running_var, momentum, eps, table)
    numbers = np.empty(chunks * FORWARD_FIELDS * LANES)
    partials = Partials(pointer(numbers), FORWARD_FIELDS, LANES, chunks)
    row_bits = (L + LANES - 1) // LANES
    for c0 in range(start, stop, group):
        c1 = min(stop, c0 + group)
        for c in range(c0, c1):
            shift = first_value(io.x, c * L)
            k, n0, l0 = 0, 0, 0
            for _ in range(chunks):
                plane_chunk(
                    io.x, C, L, c, k, n0, min(N, n0 + rows), l0, min(L, l0 + segment), shift,
                    reach, partials, c - c0,
                )
                _, k, n0, l0 = next_chunk(c, k, n0, l0, chunks, rows, L, segment)
        finish_training(io.x, partials, channels, 0, c0, c1 - c0)
        for c in range(c0, c1):
            affine = affine_of(io.x, channels.table, C, c)
            for row in range((N - 1) * C + c, -1, -C):  # what was summed last is still in cache
                normalize_plane(
                    io, row * L, (row + 1) * L, row * row_bits, affine, floor, streaming
                )
    return keep_alive(numbers)


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
    numbers = np.empty(chunks * FORWARD_FIELDS * block)
    partials = Partials(pointer(numbers), FORWARD_FIELDS, block, chunks)
    for item in range(start, stop):
        c0 = item * block
        c1 = min(C, c0 + block)
        for k in range(chunks):
            column_chunk(
                io.x, C, L, k, k * rows, min(M, (k + 1) * rows), c0, c1, aligned(pointer(work)),
                space, partials, 0,
            )
        for c in range(c0, c1, LANES):
            finish_training(io.x, partials, channels, c - c0, c, lanes_at(c, c1))
        spread_affine(channels.table, C, c0, c1 - c0, L, columns, 0)
        normalize_rows(io, C * L, 0, M, c0 * L, (c1 - c0) * L, columns, floor, streaming)
    return keep_alive(work) + keep_alive(buffer) + keep_alive(numbers)


# --- backward ---------------------------------------------------------------------------------


@kernel
def backward_sums_planes(
    grad_output, x, bits, grad_input, grad_residual, N, C, L, rows, segment, table, numbers,
    relu, streaming, start, stop,
):
    """Chunks start:stop of all channels' chunks; in eval mode, with the input gradient."""
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, None)
    reach = reach_of(io.x, N, C, L)
    partials = partials_of(numbers)
    c, k, n0, l0 = chunk_at(start, partials.chunks, rows, L, segment)
    for _ in range(start, stop):
        affine = affine_of(io.x, pointer(table), C, c)
        plane_grad_chunk(
            io, reach, C, L, c, k, n0, min(N, n0 + rows), l0, min(L, l0 + segment), affine, relu,
            streaming, partials, c,
        )
        c, k, n0, l0 = next_chunk(c, k, n0, l0, partials.chunks, rows, L, segment)


@kernel
def backward_sums_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, table, numbers, relu,
    streaming, start, stop,
):
    """Items start:stop of the grid (block of channels) × (chunk of rows); see planes."""
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, None)
    partials = partials_of(numbers)
    space = room(block * L)
    work = np.empty(2 * space + LANES)
    buffer = empty_like_computed(io.x, COLUMN_ROWS * space + LANES)
    columns = columns_of(pointer(buffer), space)
    spread_block = -1
    for item in range(start, stop):
        k = item % partials.chunks
        c0 = (item // partials.chunks) * block
        c1 = min(C, c0 + block)
        if c0 != spread_block:
            spread_affine(pointer(table), C, c0, c1 - c0, L, columns, 0)
            spread_block = c0
        column_grad_chunk(
            io, C, L, k, k * rows, min(M, (k + 1) * rows), c0, c1, columns, relu, streaming,
            aligned(pointer(work)), space, partials, c0,
        )
    return keep_alive(work) + keep_alive(buffer)


@kernel
def finish_sums(x, numbers, table, sums, slopes):
    """From all chunks of all channels to ``sums`` and ``slopes``."""
    partials = partials_of(numbers)
    C = table.shape[1]
    for c in range(0, C, LANES):
        finish_backward(
            pointer(x), partials, C, c, c, lanes_at(c, C), pointer(table), pointer(sums),
            pointer(slopes),
        )


@kernel
def finish_slopes(x, count, sum_dy, sum_dy_xmu, table, slopes):
    """Fill `slopes` from sums of all workers, relative to the exact mean."""
    C = sum_dy.size
    for c in range(0, C, LANES):
        lanes = lanes_at(c, C)
        invstd = read(offset(pointer(table), INVSTD * C), c, lanes)
        mean_dy_xhat = read(pointer(sum_dy_xmu), c, lanes) * invstd / splat64(count)
        mean_dy = read(pointer(sum_dy), c, lanes) / splat64(count)
        fill_slopes(
            pointer(x), C, c, lanes, mean_dy, mean_dy_xhat, pointer(table), pointer(slopes)
        )


@kernel
def backward_elements_planes(
    grad_output, x, bits, grad_input, grad_residual, C, L, segment, table, slopes, relu,
    streaming, start, stop,
):
    """Training, given the sums: items start:stop of the segments of all planes."""
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, values_ahead(pointer(x)))
    across = (L + segment - 1) // segment
    row_bits = (L + LANES - 1) // LANES
    row = start // across
    l0 = (start % across) * segment
    c = row % C
    for _ in range(start, stop):
        l1 = min(L, l0 + segment)
        bit = row * row_bits + l0 // LANES
        affine = affine_of(io.x, pointer(table), C, c)
        own = slopes_of(io.x, pointer(slopes), C, c)
        plane_elements(io, row * L + l0, row * L + l1, bit, affine, own, relu, streaming)
        l0 = l1
        if l0 == L:
            l0 = 0
            row += 1
            c = c + 1 if c + 1 < C else 0


@kernel
def backward_elements_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, table, slopes, relu,
    streaming, start, stop,
):
    """Training, given the sums: items start:stop of the grid (block of channels) × (rows)."""
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, values_ahead(pointer(x)))
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
            spread_affine(pointer(table), C, c0, c1 - c0, L, columns, 0)
            spread_slopes(pointer(slopes), C, c0, c1, L, columns)
            spread_block = c0
        column_elements(
            io, C * L, m0, min(M, m0 + rows), c0 * L, (c1 - c0) * L, columns, relu, streaming
        )
    return keep_alive(buffer)


@kernel
def backward_planes(
    grad_output, x, bits, grad_input, grad_residual, N, C, L, rows, segment, chunks, group,
    elements_ahead, table, sums, slopes, relu, streaming, start, stop,
):
    """Training, channels start:stop: a group is summed, then differentiated while in cache."""
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, elements_ahead)
    reading = Backward(io.grad_output, io.x, io.bits, None, None, None)
    reach = reach_of(io.x, N, C, L)
    numbers = np.empty(chunks * BACKWARD_FIELDS * LANES)
    partials = Partials(pointer(numbers), BACKWARD_FIELDS, LANES, chunks)
    row_bits = (L + LANES - 1) // LANES
    for c0 in range(start, stop, group):
        c1 = min(stop, c0 + group)
        for c in range(c0, c1):
            affine = affine_of(io.x, pointer(table), C, c)
            k, n0, l0 = 0, 0, 0
            for _ in range(chunks):
                plane_grad_chunk(
                    reading, reach, C, L, c, k, n0, min(N, n0 + rows), l0, min(L, l0 + segment),
                    affine, relu, False, partials, c - c0,
                )
                _, k, n0, l0 = next_chunk(c, k, n0, l0, chunks, rows, L, segment)
        finish_backward(
            io.x, partials, C, 0, c0, c1 - c0, pointer(table), pointer(sums), pointer(slopes)
        )
        for c in range(c0, c1):
            affine = affine_of(io.x, pointer(table), C, c)
            own = slopes_of(io.x, pointer(slopes), C, c)
            for row in range((N - 1) * C + c, -1, -C):
                plane_elements(
                    io, row * L, (row + 1) * L, row * row_bits, affine, own, relu, streaming
                )
    return keep_alive(numbers)


@kernel
def backward_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, chunks, table, sums,
    slopes, relu, streaming, start, stop,
):
    """Training, blocks of channels start:stop, summed, then differentiated while in cache."""
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, block * L)
    reading = Backward(io.grad_output, io.x, io.bits, None, None, None)
    space = room(block * L)
    work = np.empty(2 * space + LANES)
    buffer = empty_like_computed(io.x, COLUMN_ROWS * space + LANES)
    columns = columns_of(pointer(buffer), space)
    numbers = np.empty(chunks * BACKWARD_FIELDS * block)
    partials = Partials(pointer(numbers), BACKWARD_FIELDS, block, chunks)
    for item in range(start, stop):
        c0 = item * block
        c1 = min(C, c0 + block)
        spread_affine(pointer(table), C, c0, c1 - c0, L, columns, 0)
        for k in range(chunks):
            column_grad_chunk(
                reading, C, L, k, k * rows, min(M, (k + 1) * rows), c0, c1, columns, relu, False,
                aligned(pointer(work)), space, partials, 0,
            )
        for c in range(c0, c1, LANES):
            finish_backward(
                io.x, partials, C, c - c0, c, lanes_at(c, c1), pointer(table), pointer(sums),
                pointer(slopes),
            )
        spread_slopes(pointer(slopes), C, c0, c1, L, columns)
        column_elements(io, C * L, 0, M, c0 * L, (c1 - c0) * L, columns, relu, streaming)
    return keep_alive(work) + keep_alive(buffer) + keep_alive(numbers)
