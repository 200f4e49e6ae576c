"""The kernels of `serial` for the backward pass."""

import numpy as np

from numbabn.cpu.channels import (
    BACKWARD_FIELDS,
    INVSTD,
    Partials,
    fill_slopes,
    finish_backward,
    lanes_at,
    read,
)
from numbabn.cpu.chunks import chunk_at, keep_alive, next_chunk, partials_of, room
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
from numbabn.cpu.normalization import COLUMN_ROWS, affine_of, columns_of, spread_affine
from numbabn.cpu.options import inline, kernel
from numbabn.cpu.reductions import reach_of
from numbabn.cpu.vector import LANES, splat64

# fmt: off
# The long lists of arguments below are easier to compare when they are set like text.


@inline
def backward_io(grad_output, x, bits, grad_input, grad_residual, ahead):
    return Backward(
        pointer(grad_output), pointer(x), pointer(bits), pointer(grad_input),
        pointer(grad_residual), ahead,
    )


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
