"""The kernels of `serial` for the statistics and the forward pass."""

import numpy as np

from numbabn.cpu.boundaries import onward
from numbabn.cpu.channels import (
    CENTER,
    COUNT,
    FORWARD_FIELDS,
    M2,
    SUM,
    TABLE_ROWS,
    Partials,
    channels_of,
    finish_given,
    finish_running,
    finish_training,
    lanes_at,
    merge_chunks,
    read,
    write,
)
from numbabn.cpu.chunks import chunk_of, keep_alive, partials_of, room
from numbabn.cpu.memory import empty_like_computed, if_needed, pointer, values_ahead
from numbabn.cpu.normalization import (
    COLUMN_ROWS,
    aligned_after,
    columns_of,
    forward_io,
    lead_of,
    normalize_rows,
    normalize_run,
    normalize_runs,
    piece_of,
    runs_on,
    shift_of,
    spread_affine,
    with_ahead,
    with_target_ahead,
)
from numbabn.cpu.options import inline, kernel
from numbabn.cpu.reduction_columns import Ahead, centers_from, column_chunk
from numbabn.cpu.reduction_planes import (
    PLANE_FEW,
    PLANE_WORK,
    plane_chunk,
    plane_scratch,
    reach_of,
)
from numbabn.cpu.runs import asks_for_targets, fits_cache
from numbabn.cpu.vector import LANES, splat64

# fmt: off
# The long lists of arguments below are easier to compare when they are set like text.


# --- statistics -------------------------------------------------------------------------------


@kernel
def stats_planes(x, N, C, L, rows, segment, group, ahead, numbers, start, stop):
    """Items start:stop of the grid (group of channels) × (chunk)."""
    to_x, partials = pointer(x), partials_of(numbers)
    work = np.empty(PLANE_WORK + LANES)
    few = empty_like_computed(to_x, PLANE_FEW + LANES)
    for item in range(start, stop):
        k = item % partials.chunks
        c0 = (item // partials.chunks) * group
        c1 = min(C, c0 + group)
        n0, l0 = chunk_of(k, rows, L, segment)
        plane_chunk(
            to_x, C, L, c0, c1, k, n0, min(N, n0 + rows), l0, min(L, l0 + segment),
            reach_of(ahead, N, C * L, (c1 - c0) * L), plane_scratch(few, work), partials, c0,
        )
    return keep_alive(work) + keep_alive(few)


@kernel
def stats_columns(x, M, C, L, rows, block, ahead, numbers, start, stop):
    """Items start:stop of the grid (chunk of rows) × (block of channels)."""
    partials = partials_of(numbers)
    space = room(block * L)
    work = np.empty(6 * space + 2 * LANES)
    blocks = (C + block - 1) // block
    for item in range(start, stop):
        k = item // blocks
        c0 = (item % blocks) * block
        lead = lead_of(pointer(x), None, C * L, c0 * L, False)
        column_chunk(
            pointer(x), C, L, k, k * rows, min(M, (k + 1) * rows), c0, min(C, c0 + block),
            centers_from(pointer(x), M), blocks == 1 and item > start, lead, Ahead(ahead, M),
            aligned_after(pointer(work), lead), space, partials, c0,
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
        write(pointer(mean), c, lanes, center + total / splat64(count))
        write(pointer(m2), c, lanes, squares)


@inline
def add_carefully(total, lost, value):
    """`channels.add_compensated` for single numbers; infinity and NaN stay what they are."""
    new = total + value
    error = (total - new) + value if abs(total) >= abs(value) else (value - new) + total
    return new, lost + (error if np.isfinite(error) else 0.0)


@kernel
def merge_repeated_stats(numbers, merged):
    """Chunks of channels from chunks in which each has several columns; see `narrow`.

    By the pooled form, as in `channels.merge_chunks`.
    """
    chunks, _, C = merged.shape
    columns = numbers.shape[2]
    for k in range(chunks):
        n = numbers[k, COUNT, 0]
        count = n * (columns // C)
        for c in range(C):
            center = numbers[k, CENTER, c]
            total, lost = 0.0, 0.0
            for j in range(c, columns, C):
                total, lost = add_carefully(total, lost, (numbers[k, CENTER, j] - center) * n)
                total, lost = add_carefully(total, lost, numbers[k, SUM, j])
            total += lost
            m2, lost = 0.0, 0.0
            for j in range(c, columns, C):
                apart = numbers[k, SUM, j] / n + (numbers[k, CENTER, j] - center) - total / count
                m2, lost = add_carefully(m2, lost, numbers[k, M2, j] + n * apart * apart)
            merged[k, COUNT, c] = count
            merged[k, CENTER, c] = center
            merged[k, SUM, c] = total
            merged[k, M2, c] = m2 + lost


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

    With running statistics, these are looked up 16 channels at a time as they come, or all of them
    at first if they come more than once.
    """
    io = forward_io(x, residual, bits, out, if_needed(values_ahead(pointer(x))))
    across = (L + segment - 1) // segment
    row_bits = (L + LANES - 1) // LANES
    row, l0 = start // across, (start % across) * segment
    i, end = row * L + l0, (stop // across) * L + (stop % across) * segment
    c = row % C
    known = running_mean.size == 0
    at_first = not known and stop - start > C * across
    own_table = np.empty((TABLE_ROWS, C if at_first else LANES))
    channels = channels_of(weight, bias, running_mean, running_var, 0.0, eps, own_table)
    if known or at_first:
        for first in range(0, C if at_first else 0, LANES):
            finish_running(io.x, channels, first, lanes_at(first, C), first)
        bit = row * row_bits + l0 // LANES
        numbers = pointer(table) if known else channels.table
        normalize_run(
            io, i, end, (row + 1) * L, L, bit, numbers, None, C, c, floor, streaming
        )
        return keep_alive(table) + keep_alive(own_table)
    while i < end:
        lanes = lanes_at(c, C)
        finish_running(io.x, channels, c, lanes, 0)
        last = min(end, (row + lanes) * L)
        bit = row * row_bits + (i - row * L) // LANES
        normalize_run(
            io, i, last, (row + 1) * L, L, bit, channels.table, None, LANES, 0, floor, streaming
        )
        i = last
        row += lanes
        c = c + lanes if c + lanes < C else 0
    return keep_alive(own_table)


@kernel
def normalize_columns(
    x, residual, bits, out, M, C, L, rows, block, weight, bias, running_mean, running_var, eps,
    table, floor, streaming, start, stop,
):
    """Items start:stop of the grid (block of channels) × (rows), a block's rows in turn."""
    known = running_mean.size == 0
    io = forward_io(x, residual, bits, out, None)
    io = with_ahead(io, if_needed(onward(io, values_ahead(io.x))))
    own_table = np.empty((TABLE_ROWS, 0 if known else block))
    channels = channels_of(weight, bias, running_mean, running_var, 0.0, eps, own_table)
    downs = (M + rows - 1) // rows
    space = room(block * L)
    buffer = empty_like_computed(io.x, COLUMN_ROWS * space + 2 * LANES)
    lead, columns = 0, columns_of(pointer(buffer), space, 0)
    in_runs, in_cache = runs_on(io.bits, L), fits_cache(io.x, M * C * L)
    columns_c0 = -1
    for item in range(start, stop):
        c0 = (item // downs) * block
        c1 = min(C, c0 + block)
        m0 = (item % downs) * rows
        m1 = min(M, m0 + rows)
        if c0 != columns_c0:
            lead = lead_of(io.out, io.bits, C * L, c0 * L, streaming)
            columns = columns_of(pointer(buffer), space, lead)
            if not known:
                for c in range(c0, c1, LANES):
                    finish_running(io.x, channels, c, lanes_at(c, c1), c - c0)
                if not in_runs:
                    spread_affine(channels.table, block, 0, c1 - c0, L, columns)
            elif not in_runs:
                spread_affine(pointer(table), C, c0, c1 - c0, L, columns)
            columns_c0 = c0
        k0, width = c0 * L, (c1 - c0) * L
        if not in_runs:
            normalize_rows(
                io, C * L, m0, m1, k0, lead, width, columns, floor, in_cache, streaming
            )
        elif known:
            normalize_runs(
                io, C * L, m0, m1, k0, width, L, pointer(table), None, C, c0, floor, streaming
            )
        else:
            normalize_runs(
                io, C * L, m0, m1, k0, width, L, channels.table, None, block, 0, floor, streaming
            )
    return keep_alive(buffer) + keep_alive(table) + keep_alive(own_table)


@kernel
def forward_planes(
    x, residual, bits, out, N, C, L, rows, segment, chunks, group, ahead, elements_ahead, weight,
    bias, running_mean, running_var, momentum, eps, table, floor, streaming, start, stop,
):
    """Training, channels start:stop: a group is summed, then normalized while it is in cache."""
    io = forward_io(x, residual, bits, out, elements_ahead)
    channels = channels_of(weight, bias, running_mean, running_var, momentum, eps, table)
    numbers = np.empty(chunks * FORWARD_FIELDS * LANES)
    partials = Partials(pointer(numbers), FORWARD_FIELDS, LANES, chunks)
    work = np.empty(PLANE_WORK + LANES)
    few = empty_like_computed(io.x, PLANE_FEW + LANES)
    row_bits = (L + LANES - 1) // LANES
    ask_targets = asks_for_targets(io.x, N * C * L, streaming)
    for c0 in range(start, stop, group):
        c1 = min(stop, c0 + group)
        reach = reach_of(ahead, N, C * L, (c1 - c0) * L)
        for k in range(chunks):
            n0, l0 = chunk_of(k, rows, L, segment)
            plane_chunk(
                io.x, C, L, c0, c1, k, n0, min(N, n0 + rows), l0, min(L, l0 + segment), reach,
                plane_scratch(few, work), partials, 0,
            )
        finish_training(io.x, partials, channels, 0, c0, c1 - c0)
        for n in range(N - 1, -1, -1):  # what was summed last is still in cache
            row = n * C + c0
            asking = with_target_ahead(io, -C * L if ask_targets and n > 0 else 0)
            normalize_run(
                asking, row * L, (row + c1 - c0) * L, (row + 1) * L, L, row * row_bits,
                channels.table, None, C, c0, floor, streaming,
            )
    return keep_alive(numbers) + keep_alive(work) + keep_alive(few)


@kernel
def forward_columns(
    x, residual, bits, out, M, C, L, rows, block, chunks, ahead, weight, bias, running_mean,
    running_var, momentum, eps, table, floor, streaming, start, stop,
):
    """Training, blocks of channels start:stop, each summed, then normalized while in cache."""
    io = forward_io(x, residual, bits, out, if_needed(block * L))
    channels = channels_of(weight, bias, running_mean, running_var, momentum, eps, table)
    shift = shift_of(io.out, io.bits, C, L)
    space = room(block * L)
    work = np.empty(6 * space + 2 * LANES)
    buffer = empty_like_computed(io.x, COLUMN_ROWS * space + 2 * LANES)
    numbers = np.empty(chunks * FORWARD_FIELDS * block)
    partials = Partials(pointer(numbers), FORWARD_FIELDS, block, chunks)
    for step in range(2 * start, 2 * stop):
        c0, c1 = piece_of(step, block, C, shift)
        if c0 == c1:
            continue
        x_lead = lead_of(io.x, None, C * L, c0 * L, False)
        lead = lead_of(io.out, io.bits, C * L, c0 * L, streaming)
        columns = columns_of(pointer(buffer), space, lead)
        for k in range(chunks):
            column_chunk(
                io.x, C, L, k, k * rows, min(M, (k + 1) * rows), c0, c1, centers_from(io.x, M),
                k > 0, x_lead, Ahead(ahead, M), aligned_after(pointer(work), x_lead), space,
                partials, 0,
            )
        for c in range(c0, c1, LANES):
            finish_training(io.x, partials, channels, c - c0, c, lanes_at(c, c1))
        k0, width = c0 * L, (c1 - c0) * L
        if runs_on(io.bits, L):
            normalize_runs(
                io, C * L, 0, M, k0, width, L, channels.table, None, C, c0, floor, streaming
            )
        else:
            spread_affine(channels.table, C, c0, c1 - c0, L, columns)
            normalize_rows(io, C * L, 0, M, k0, lead, width, columns, floor, True, streaming)
    return keep_alive(work) + keep_alive(buffer) + keep_alive(numbers)
