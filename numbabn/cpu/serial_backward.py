"""The kernels of `serial` for the backward pass."""

import numpy as np

from numbabn.cpu.boundaries import onward
from numbabn.cpu.channels import (
    BACKWARD_FIELDS,
    INVSTD,
    Partials,
    fill_slopes,
    finish_backward,
    lanes_at,
    read,
)
from numbabn.cpu.chunks import chunk_of, keep_alive, partials_of, room
from numbabn.cpu.gradient_columns import (
    column_grad_chunk,
    grad_lead,
    gradient_rows,
    spread_slopes,
    written,
)
from numbabn.cpu.gradient_planes import gradient_run, gradient_runs, plane_grad_chunk
from numbabn.cpu.gradients import backward_io, only_read, with_hints
from numbabn.cpu.memory import (
    empty_like_computed,
    if_needed,
    offset,
    pointer,
    values_ahead,
)
from numbabn.cpu.normalization import (
    COLUMN_ROWS,
    aligned_after,
    columns_of,
    piece_of,
    runs_on,
    shift_of,
    spread_affine,
)
from numbabn.cpu.options import kernel
from numbabn.cpu.reduction_columns import Ahead
from numbabn.cpu.reduction_planes import PLANE_FEW, PLANE_WORK, plane_scratch, reach_of
from numbabn.cpu.runs import asks_for_targets, fits_cache
from numbabn.cpu.serial_forward import add_carefully
from numbabn.cpu.vector import LANES, splat64

# fmt: off
# The long lists of arguments below are easier to compare when they are set like text.


@kernel
def backward_sums_planes(
    grad_output, x, bits, grad_input, grad_residual, N, C, L, rows, segment, group, ahead, table,
    numbers, sums, finish, relu, streaming, start, stop,
):
    """Items start:stop of (group of channels) × (chunk); in eval mode, with the input gradient.

    To `finish` an item is a group of channels, which comes to its results in `sums`.
    """
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, None)
    partials = partials_of(numbers)
    work = np.empty(PLANE_WORK + LANES)
    few = empty_like_computed(io.x, PLANE_FEW + LANES)
    each = partials.chunks if finish else 1
    ask_targets = asks_for_targets(io.x, N * C * L, streaming)
    for item in range(start * each, stop * each):
        k = item % partials.chunks
        c0 = (item // partials.chunks) * group
        c1 = min(C, c0 + group)
        n0, l0 = chunk_of(k, rows, L, segment)
        plane_grad_chunk(
            io, reach_of(ahead, N, C * L, (c1 - c0) * L), C, L, c0, c1, k, n0, min(N, n0 + rows),
            l0, min(L, l0 + segment), pointer(table), relu, ask_targets, streaming,
            plane_scratch(few, work), partials, c0,
        )
        if finish and k == partials.chunks - 1:
            finish_backward(
                io.x, partials, C, c0, c0, c1 - c0, pointer(table), pointer(sums), None
            )
    return keep_alive(work) + keep_alive(few)


@kernel
def backward_sums_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, ahead, table, numbers,
    sums, finish, relu, streaming, start, stop,
):
    """Items start:stop of the grid (chunk of rows) × (block of channels); see planes."""
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, None)
    partials = partials_of(numbers)
    shift = shift_of(written(io), io.bits, C, L) if finish else 0
    space = room(block * L)
    work = np.empty(2 * space + 2 * LANES)
    few = empty_like_computed(io.x, 4 * space + 2 * LANES)
    buffer = empty_like_computed(io.x, COLUMN_ROWS * space + 2 * LANES)
    lead, columns = 0, columns_of(pointer(buffer), space, 0)
    spread_block = -1
    blocks = (C + block - 1) // block
    each = 2 * partials.chunks if finish else 1
    for item in range(start * each, stop * each):
        k = item % partials.chunks if finish else item // blocks
        step = item // partials.chunks if finish else 2 * (item % blocks)
        c0, c1 = piece_of(step, block, C, shift)
        if c0 == c1:
            continue
        if c0 != spread_block:
            lead = grad_lead(io, C * L, c0 * L, False)
            columns = columns_of(pointer(buffer), space, lead)
            spread_affine(pointer(table), C, c0, c1 - c0, L, columns)
            spread_block = c0
        column_grad_chunk(
            io, C, L, k, k * rows, min(M, (k + 1) * rows), c0, c1, lead, Ahead(ahead, M), columns,
            relu, streaming, aligned_after(pointer(work), lead), aligned_after(pointer(few), lead),
            space, partials, c0,
        )
        if finish and k == partials.chunks - 1:
            for c in range(c0, c1, LANES):
                finish_backward(
                    io.x, partials, C, c, c, lanes_at(c, c1), pointer(table), pointer(sums), None
                )
    return keep_alive(work) + keep_alive(few) + keep_alive(buffer)


@kernel
def merge_repeated_sums(numbers, merged):
    """Chunks of channels from chunks in which each has several columns; see `narrow`."""
    chunks, fields, C = merged.shape
    columns = numbers.shape[2]
    for k in range(chunks):
        for field in range(fields):  # the count as well
            for c in range(C):
                total, lost = 0.0, 0.0
                for j in range(c, columns, C):
                    total, lost = add_carefully(total, lost, numbers[k, field, j])
                merged[k, field, c] = total + lost


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
    ahead = if_needed(values_ahead(pointer(x)))
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, ahead)
    across = (L + segment - 1) // segment
    row_bits = (L + LANES - 1) // LANES
    row, l0 = start // across, (start % across) * segment
    end = (stop // across) * L + (stop % across) * segment
    gradient_run(
        io, row * L + l0, end, (row + 1) * L, L, row * row_bits + l0 // LANES, pointer(table),
        pointer(slopes), C, row % C, relu, streaming,
    )


@kernel
def backward_elements_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, table, slopes, relu,
    streaming, start, stop,
):
    """Training, given the sums: items start:stop of the grid (block of channels) × (rows)."""
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, None)
    io = with_hints(io, if_needed(onward(io, values_ahead(io.x))), None)
    downs = (M + rows - 1) // rows
    space = room(block * L)
    buffer = empty_like_computed(io.x, COLUMN_ROWS * space + 2 * LANES)
    lead, columns = 0, columns_of(pointer(buffer), space, 0)
    in_runs, in_cache = runs_on(io.bits, L), fits_cache(io.x, M * C * L)
    spread_block = -1
    for item in range(start, stop):
        c0 = (item // downs) * block
        c1 = min(C, c0 + block)
        m0 = (item % downs) * rows
        m1 = min(M, m0 + rows)
        k0, width = c0 * L, (c1 - c0) * L
        if in_runs:
            gradient_runs(
                io, C * L, m0, m1, k0, width, L, pointer(table), pointer(slopes), C, c0, relu,
                streaming,
            )
        else:
            if c0 != spread_block:
                lead = grad_lead(io, C * L, k0, streaming)
                columns = columns_of(pointer(buffer), space, lead)
                spread_affine(pointer(table), C, c0, c1 - c0, L, columns)
                spread_slopes(pointer(slopes), C, c0, c1, L, columns)
                spread_block = c0
            gradient_rows(
                io, C * L, m0, m1, k0, lead, width, columns, relu, in_cache, streaming
            )
    return keep_alive(buffer)


@kernel
def backward_planes(
    grad_output, x, bits, grad_input, grad_residual, N, C, L, rows, segment, chunks, group,
    ahead, elements_ahead, table, sums, slopes, relu, streaming, start, stop,
):
    """Training, channels start:stop: a group is summed, then differentiated while in cache."""
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, elements_ahead)
    reading = only_read(io, None)
    numbers = np.empty(chunks * BACKWARD_FIELDS * LANES)
    partials = Partials(pointer(numbers), BACKWARD_FIELDS, LANES, chunks)
    work = np.empty(PLANE_WORK + LANES)
    few = empty_like_computed(io.x, PLANE_FEW + LANES)
    row_bits = (L + LANES - 1) // LANES
    ask_targets = asks_for_targets(io.x, N * C * L, streaming)
    for c0 in range(start, stop, group):
        c1 = min(stop, c0 + group)
        reach = reach_of(ahead, N, C * L, (c1 - c0) * L)
        for k in range(chunks):
            n0, l0 = chunk_of(k, rows, L, segment)
            plane_grad_chunk(
                reading, reach, C, L, c0, c1, k, n0, min(N, n0 + rows), l0, min(L, l0 + segment),
                pointer(table), relu, False, False, plane_scratch(few, work), partials, 0,
            )
        finish_backward(
            io.x, partials, C, 0, c0, c1 - c0, pointer(table), pointer(sums), pointer(slopes)
        )
        for n in range(N - 1, -1, -1):
            row = n * C + c0
            asking = with_hints(io, io.ahead, -C * L if ask_targets and n > 0 else 0)
            gradient_run(
                asking, row * L, (row + c1 - c0) * L, (row + 1) * L, L, row * row_bits,
                pointer(table), pointer(slopes), C, c0, relu, streaming,
            )
    return keep_alive(numbers) + keep_alive(work) + keep_alive(few)


@kernel
def backward_columns(
    grad_output, x, bits, grad_input, grad_residual, M, C, L, rows, block, chunks, ahead, table,
    sums, slopes, relu, streaming, start, stop,
):
    """Training, blocks of channels start:stop, summed, then differentiated while in cache."""
    io = backward_io(grad_output, x, bits, grad_input, grad_residual, if_needed(block * L))
    reading = only_read(io, None)
    shift = shift_of(written(io), io.bits, C, L)
    space = room(block * L)
    work = np.empty(2 * space + 2 * LANES)
    few = empty_like_computed(io.x, 4 * space + 2 * LANES)
    buffer = empty_like_computed(io.x, COLUMN_ROWS * space + 2 * LANES)
    numbers = np.empty(chunks * BACKWARD_FIELDS * block)
    partials = Partials(pointer(numbers), BACKWARD_FIELDS, block, chunks)
    for step in range(2 * start, 2 * stop):
        c0, c1 = piece_of(step, block, C, shift)
        if c0 == c1:
            continue
        lead = grad_lead(io, C * L, c0 * L, streaming)
        columns = columns_of(pointer(buffer), space, lead)
        spread_affine(pointer(table), C, c0, c1 - c0, L, columns)
        for k in range(chunks):
            column_grad_chunk(
                reading, C, L, k, k * rows, min(M, (k + 1) * rows), c0, c1, lead, Ahead(ahead, M),
                columns, relu, False, aligned_after(pointer(work), lead),
                aligned_after(pointer(few), lead), space, partials, 0,
            )
        for c in range(c0, c1, LANES):
            finish_backward(
                io.x, partials, C, c - c0, c, lanes_at(c, c1), pointer(table), pointer(sums),
                pointer(slopes),
            )
        k0, width = c0 * L, (c1 - c0) * L
        if runs_on(io.bits, L):
            gradient_runs(
                io, C * L, 0, M, k0, width, L, pointer(table), pointer(slopes), C, c0, relu,
                streaming,
            )
        else:
            spread_slopes(pointer(slopes), C, c0, c1, L, columns)
            gradient_rows(io, C * L, 0, M, k0, lead, width, columns, relu, True, streaming)
    return keep_alive(work) + keep_alive(few) + keep_alive(buffer) + keep_alive(numbers)
