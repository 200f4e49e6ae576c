"""The backward sums: ``sum(g)``, which is dbias, and ``sum(g * xhat)``, which is dweight.

For eval they come with dx, in the same pass. Pairs of slots are summed in the type that is computed
with; what a thread found is merged in float64. A block leaves two numbers for each of its channels,
`SUM_DY` and `SUM_DY_XHAT` of its chunk, which `channels.finish_sums` merges. Of 16-bit arrays these
are float32, which takes half of the memory: rounding them is half an ulp of the sum of all terms.
"""

from __future__ import annotations

from numba import cuda

from numbabn.cuda.channels import INVSTD, MEAN, SCALE, SHIFT, SUM_DY, SUM_DY_XHAT, unit_of
from numbabn.cuda.geometry import (
    chunk_of,
    next_slot,
    paired,
    row_part,
    thread,
    threads,
    tile_columns,
)
from numbabn.cuda.gradients import bits_of, cut_off, spread, store_if, table_entry, table_unit
from numbabn.cuda.indices import as_float, index, like, smaller
from numbabn.cuda.memory import (
    decode,
    element,
    hidden,
    is_double,
    load,
    load_part,
    opaque,
    pointer,
    store,
)
from numbabn.cuda.options import PAIR, THREADS, WIDEST_TILE, Address, Flag, Size, inline
from numbabn.cuda.scalars import load_byte, load_float64, scalar, store_scalar, store_sum
from numbabn.cuda.shared import get, get_vector, put, put_vector, shared_float64, shared_like
from numbabn.cuda.sums import SUM_SPACE, add_up, block_sums, tile_sums
from numbabn.cuda.vector import LANES, close_sum, fma, keep, part_bits, splat, sum_lanes, widen


@inline
def keep_part(value, lo, hi, V):
    """Numbers lo:hi, and zeros."""
    if hi - lo < V:
        value = keep(value, part_bits(lo, hi))
    return value


# --- planes ---------------------------------------------------------------------------------


def backward_sums_planes(storage, aligned, wide):
    V = LANES[storage]

    def backward_sums_planes(
        grad_output: Address, x: Address, bits: Address, grad_input: Address,
        grad_residual: Address, N: Size, C: Size, L: Size, slots: Size, chunk: Size,
        table: Address, partials: Address, relu: Flag,
    ) -> None:  # fmt: skip
        C, L, slots = index(C), index(L), index(slots)
        source = pointer(storage, aligned, wide, x)
        gradient = pointer(storage, aligned, wide, grad_output)
        target = pointer(storage, aligned, wide, grad_input)
        passed = pointer(storage, aligned, wide, grad_residual)
        c, k = index(cuda.blockIdx.x), index(cuda.blockIdx.y)
        u = k * index(chunk) + thread()
        end = smaller(k * index(chunk) + index(chunk), index(N) * slots)
        mean, unit = table_entry(source, table, C, MEAN, c), table_unit(source, table, C, c)
        scale = table_entry(source, table, C, SCALE, c)
        shift = table_entry(source, table, C, SHIFT, c)
        n, v = u // slots, u % slots
        total = as_float(source, like(L, 0))
        products, lost, lost_products = total, total, total
        while u < end:
            row = n * C + c
            w = paired(n, row, v, slots)
            i, lo, hi = row_part(source, row, w, True, L, V)
            bit = row * slots + w
            n, v = next_slot(n, v, slots, like(L, THREADS))
            row = n * C + c
            w = paired(n, row, v, slots)
            j, lo_j, hi_j = row_part(source, row, w, u + THREADS < end, L, V)
            bit_j = row * slots + w
            a, b = load_part(source, i, lo, hi), load_part(source, j, lo_j, hi_j)
            da, db = load_part(gradient, i, lo, hi), load_part(gradient, j, lo_j, hi_j)
            kept = bits_of(bits, bit, lo, hi)
            kept_j = bits_of(bits, bit_j, lo_j, hi_j)
            n, v = next_slot(n, v, slots, like(L, THREADS))
            xmu = decode(source, a) - mean
            g = cut_off(source, da, bits, kept, xmu, scale, shift, relu)
            store_if(grad_residual, passed, i, lo, hi, g)
            store_if(grad_input, target, i, lo, hi, g * scale)
            g, xhat = keep_part(g, lo, hi, V), keep_part(xmu * unit, lo, hi, V)
            xmu = decode(source, b) - mean
            h = cut_off(source, db, bits, kept_j, xmu, scale, shift, relu)
            store_if(grad_residual, passed, j, lo_j, hi_j, h)
            store_if(grad_input, target, j, lo_j, hi_j, h * scale)
            h, xhat_j = keep_part(h, lo_j, hi_j, V), keep_part(xmu * unit, lo_j, hi_j, V)
            total, lost = add_up(source, total, lost, sum_lanes(g + h))
            more = sum_lanes(fma(h, xhat_j, g * xhat))
            products, lost_products = add_up(source, products, lost_products, more)
            u = u + PAIR * THREADS
        scratch = shared_float64(SUM_SPACE)
        total, products = close_sum(total, lost), close_sum(products, lost_products)
        sum_dy, sum_dy_xhat = block_sums(widen(total), widen(products), scratch)
        if thread() == 0:
            at = c * index(cuda.gridDim.y) + k
            store_sum(source, partials, at * 2 + SUM_DY, sum_dy)
            store_sum(source, partials, at * 2 + SUM_DY_XHAT, sum_dy_xhat)

    return backward_sums_planes


# --- columns --------------------------------------------------------------------------------


@inline
def spread_unit(x, table, C, first, columns, L, K, out):
    """`unit_of`, for each column of a tile."""
    j = thread()
    while j < columns and first + j < K:
        put(out, j, unit_of(x, load_float64(table, C * INVSTD + ((first + j) // L) % C)))
        j = j + threads()


@inline
def one_number(x, gradient, bits, i, j, V, given, column, relu):
    """Number j of the slot that begins at i, which is of `column` of the tile: g and xhat."""
    means, units, scales, shifts = given
    xmu, g = scalar(x, i + j) - get(means, column), scalar(gradient, i + j)
    off = False
    if bits != 0:
        off = load_byte(bits, i // V) & part_bits(j, j + 1) == 0
    elif relu != 0:
        off = fma(xmu, get(scales, column), get(shifts, column)) <= as_float(x, like(j, 0))
    if off:
        g = as_float(x, like(j, 0))
    return g, xmu * get(units, column)


def backward_sums_columns(storage, aligned, wide):
    V = LANES[storage]
    SPACE = WIDEST_TILE * LANES[storage]
    WORK = THREADS * LANES[storage]

    def backward_sums_columns(
        grad_output: Address, x: Address, bits: Address, grad_input: Address,
        grad_residual: Address, C: Size, L: Size, K: Size, height: Size, left: Size, rows: Size,
        table: Address, partials: Address, relu: Flag,
    ) -> None:  # fmt: skip
        C, L, K, left, height = index(C), index(L), index(K), index(left), index(height)
        source = pointer(storage, aligned, wide, x)
        gradient = pointer(storage, aligned, wide, grad_output)
        target = pointer(storage, aligned, wide, grad_input)
        passed = pointer(storage, aligned, wide, grad_residual)
        part, parts = index(cuda.blockIdx.y), index(cuda.gridDim.y)
        down, tall = index(cuda.threadIdx.y), index(cuda.blockDim.y)
        base, column, columns = tile_columns(K, V)
        k = base + column
        means, units = shared_like(source, SPACE), shared_like(source, SPACE)
        scales, shifts = shared_like(source, SPACE), shared_like(source, SPACE)
        work = shared_float64(WORK)
        spread(source, table, C, MEAN, base, columns, L, K, means)
        spread_unit(source, table, C, base, columns, L, K, units)
        spread(source, table, C, SCALE, base, columns, L, K, scales)
        spread(source, table, C, SHIFT, base, columns, L, K, shifts)
        cuda.syncthreads()
        zero = like(K, 0)
        m = part * index(rows) + down
        end = smaller(part * index(rows) + index(rows), height)
        if k >= K:
            end = zero
        total = splat(source, as_float(source, zero))
        products, lost, lost_products = total, total, total
        while m < end:
            i = element(source, m, K, k)
            slot, grad = load(source, i), load(gradient, i)
            if not aligned:  # they came one by one: not in a register each till they are decoded
                slot, grad = opaque(slot), opaque(grad)
            kept = bits_of(bits, i // V, zero, like(K, V))
            here = opaque(column)  # read again for each row: registers are dearer
            xmu = decode(source, slot) - get_vector(source, means, here)
            scale, shift = get_vector(source, scales, here), get_vector(source, shifts, here)
            g = cut_off(source, grad, bits, kept, xmu, scale, shift, relu)
            if grad_residual != 0:
                store(passed, i, g)
            if grad_input != 0:
                store(target, i, g * scale)
            if V == 8:  # decoded anew, as eight numbers take more registers than their slot
                xmu = decode(source, hidden(slot)) - get_vector(source, means, hidden(column))
            xhat = xmu * get_vector(source, units, here)
            total, lost = add_up(source, total, lost, g)
            if is_double(source):
                products, lost_products = add_up(source, products, lost_products, g * xhat)
            else:
                products = fma(g, xhat, products)
            m = m + tall

        # A last row that is not whole is one number more for some columns. Its gradients are stored
        # in the second turn, as they may take the place of what is read. Where the thread stands is
        # found anew: on sm_100 it was spilled before the loop.
        base, column, columns = tile_columns(opaque(K), V)
        down, k = opaque(index(cuda.threadIdx.y)), base + column
        more = like(K, 0)
        if part == parts - 1 and down == 0 and k < left:
            more = smaller(left - k, like(K, V))
        given = (means, units, scales, shifts)
        copies, at = K // (C * L), down * columns + column
        turn = like(K, 0)
        while turn < 2:
            if k < K:
                if turn == 0:
                    put_vector(work, at, widen(close_sum(products, lost_products)))
                else:
                    put_vector(work, at, widen(close_sum(total, lost)))
            j = like(K, 0)
            while j < more:
                i = element(source, height, K, k)
                g, xhat = one_number(
                    source, gradient, bits, i, like(i, j), V, given, column + j, relu
                )
                value = widen(g)
                if turn == 0:
                    value = value * widen(xhat)
                else:
                    i = i + j
                    if grad_residual != 0:
                        store_scalar(passed, i, g)
                    if grad_input != 0:
                        store_scalar(target, i, g * get(scales, column + j))
                put(work, at + j, get(work, at + j) + value)
                j = opaque(j + 1)
            tile_sums(source, work, columns, tall, L)
            q = thread()
            while q * L < columns and base + q * L < K:
                chunk = chunk_of(base // L + q, C, copies, part, parts) * 2
                chunk = chunk + (SUM_DY_XHAT if turn == 0 else SUM_DY)
                store_sum(source, partials, chunk, get(work, q * L))
                q = q + threads()
            cuda.syncthreads()
            turn = opaque(turn + 1)

    return backward_sums_columns
