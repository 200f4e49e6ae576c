"""The backward pass: the two sums per channel, and the input gradient of either mode.

g is the gradient before the ReLU: `grad_output`, and zero where the forward pass cut off, which
is read from `bits` where there was a residual and recomputed from x otherwise. The sums are
``sum(g)``, which is dbias, and ``sum(g * xhat)``, which is dweight; pairs of slots are summed in
the type that is computed with, and what a thread found is merged in float64. Then

* eval: mean and variance are constants, so ``dx = g * scale``, in the same pass as the sums;
* training: they depend on x, so ``dx = scale * (g - mean(g) - xhat * mean(g * xhat))``, in a
  second pass over x and g (see `channels` for the coefficients).
"""

from __future__ import annotations

from numba import cuda

from numbabn.cuda.channels import (
    COUNT,
    INVSTD,
    MEAN,
    OFFSET,
    SCALE,
    SHIFT,
    SLOPE,
    SUM_DY,
    SUM_DY_XHAT,
    unit_of,
)
from numbabn.cuda.geometry import (
    column_part,
    next_slot,
    plane_part,
    row_part,
    thread,
    threads,
    tile_columns,
)
from numbabn.cuda.indices import as_float, as_float64, index, like, smaller
from numbabn.cuda.memory import (
    decode,
    is_double,
    load_byte,
    load_float64,
    load_part,
    opaque,
    pointer,
    store_float64,
    store_part,
)
from numbabn.cuda.options import (
    PAIR,
    PLANE_ROWS,
    THREADS,
    WIDEST_TILE,
    Address,
    Flag,
    Size,
    inline,
)
from numbabn.cuda.shared import get, get_vector, put, put_vector, shared_float64, shared_like
from numbabn.cuda.sums import SUM_SPACE, add_up, block_sums, tile_sums
from numbabn.cuda.vector import (
    LANES,
    close_sum,
    fma,
    keep,
    part_bits,
    positive_bits,
    round_like,
    splat,
    sum_lanes,
    widen,
)


@inline
def bits_of(bits, at, lo, hi):
    """The ReLU's bits of a slot, or none where there are none."""
    return load_byte(bits, at) if bits != 0 and lo < hi else part_bits(lo, lo)


@inline
def cut_off(x, slot, bits, kept, xmu, scale, shift, relu):
    """g, of a slot of grad_output: zero where the ReLU was."""
    g = decode(x, slot)
    if bits != 0:
        g = keep(g, kept)
    elif relu != 0:
        g = keep(g, positive_bits(fma(xmu, scale, shift)))
    return g


@inline
def store_if(given, target, i, lo, hi, value):
    """Store a slot's numbers, if there is such an array."""
    if given != 0:
        store_part(target, i, lo, hi, value)


@inline
def store_chunk_sums(partials, at, count, sum_dy, sum_dy_xhat):
    """Chunk number `at` of all channels' chunks."""
    store_float64(partials, at * 3 + COUNT, count)
    store_float64(partials, at * 3 + SUM_DY, sum_dy)
    store_float64(partials, at * 3 + SUM_DY_XHAT, sum_dy_xhat)


@inline
def table_entry(x, table, C, row, c):
    """A number of the table, or of the slopes, in the type that is computed with."""
    return round_like(x, load_float64(table, C * row + c))


@inline
def table_unit(x, table, C, c):
    return round_like(x, unit_of(x, load_float64(table, C * INVSTD + c)))


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
        products, lost, lost_products, count = total, total, total, like(L, 0)
        while u < end:
            row = n * C + c
            i, lo, hi = row_part(source, row, v, True, L, V)
            bit = row * slots + v
            n, v = next_slot(n, v, slots, like(L, THREADS))
            row_j = n * C + c
            j, lo_j, hi_j = row_part(source, row_j, v, u + THREADS < end, L, V)
            a, b = load_part(source, i, lo, hi), load_part(source, j, lo_j, hi_j)
            da, db = load_part(gradient, i, lo, hi), load_part(gradient, j, lo_j, hi_j)
            kept = bits_of(bits, bit, lo, hi)
            kept_j = bits_of(bits, row_j * slots + v, lo_j, hi_j)
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
            count = count + (hi - lo) + (hi_j - lo_j)
            u = u + PAIR * THREADS
        scratch = shared_float64(SUM_SPACE)
        total, products = close_sum(total, lost), close_sum(products, lost_products)
        sum_dy, sum_dy_xhat = block_sums(widen(total), widen(products), scratch)
        number, _ = block_sums(as_float64(count), 0.0, scratch)
        if thread() == 0:
            at = c * index(cuda.gridDim.y) + k
            store_chunk_sums(partials, at, number, sum_dy, sum_dy_xhat)

    return backward_sums_planes


@inline
def keep_part(value, lo, hi, V):
    """Numbers lo:hi, and zeros."""
    if hi - lo < V:
        value = keep(value, part_bits(lo, hi))
    return value


@inline
def element_slot(
    x, slot, grad, bits, kept, mean, scale, shift, grad_mean, slope, offset, relu, target, passed,
    grad_residual, i, lo, hi,
):  # fmt: skip
    """Store a slot of training's input gradient; its coefficients are scalars or vectors."""
    xmu = decode(x, slot) - mean
    g = cut_off(x, grad, bits, kept, xmu, scale, shift, relu)
    store_if(grad_residual, passed, i, lo, hi, g)
    store_part(target, i, lo, hi, ((g - grad_mean) + fma(xmu, slope, offset)) * scale)


def backward_elements_planes(storage, aligned, wide):
    V = LANES[storage]

    def backward_elements_planes(
        grad_output: Address, x: Address, bits: Address, grad_input: Address,
        grad_residual: Address, rows: Size, C: Size, L: Size, slots: Size, chunk: Size,
        table: Address, slopes: Address, relu: Flag,
    ) -> None:  # fmt: skip
        C, L, slots = index(C), index(L), index(slots)
        source = pointer(storage, aligned, wide, x)
        gradient = pointer(storage, aligned, wide, grad_output)
        target = pointer(storage, aligned, wide, grad_input)
        passed = pointer(storage, aligned, wide, grad_residual)
        begin = index(cuda.blockIdx.x) * index(chunk)
        end = smaller(begin + index(chunk), index(rows) * slots)
        u = begin + thread()
        means, scales = shared_like(source, PLANE_ROWS), shared_like(source, PLANE_ROWS)
        shifts, middles = shared_like(source, PLANE_ROWS), shared_like(source, PLANE_ROWS)
        factors, terms = shared_like(source, PLANE_ROWS), shared_like(source, PLANE_ROWS)
        first = begin // slots
        row = first + thread()
        while row * slots < end:
            c = row % C
            put(means, row - first, load_float64(table, C * MEAN + c))
            put(scales, row - first, load_float64(table, C * SCALE + c))
            put(shifts, row - first, load_float64(table, C * SHIFT + c))
            put(middles, row - first, load_float64(slopes, c))
            put(factors, row - first, load_float64(slopes, C * SLOPE + c))
            put(terms, row - first, load_float64(slopes, C * OFFSET + c))
            row = row + THREADS
        cuda.syncthreads()
        while u < end:
            w = u + THREADS
            i, lo, hi = plane_part(source, u, end, slots, L, V)
            j, lo_j, hi_j = plane_part(source, w, end, slots, L, V)
            a, b = load_part(source, i, lo, hi), load_part(source, j, lo_j, hi_j)
            da, db = load_part(gradient, i, lo, hi), load_part(gradient, j, lo_j, hi_j)
            kept, kept_j = bits_of(bits, u, lo, hi), bits_of(bits, w, lo_j, hi_j)
            q = u // slots - first
            element_slot(
                source, a, da, bits, kept, get(means, q), get(scales, q), get(shifts, q),
                get(middles, q), get(factors, q), get(terms, q), relu, target, passed,
                grad_residual, i, lo, hi,
            )  # fmt: skip
            if w < end:
                q = w // slots - first
                element_slot(
                    source, b, db, bits, kept_j, get(means, q), get(scales, q), get(shifts, q),
                    get(middles, q), get(factors, q), get(terms, q), relu, target, passed,
                    grad_residual, j, lo_j, hi_j,
                )  # fmt: skip
            u = w + THREADS

    return backward_elements_planes


# --- columns --------------------------------------------------------------------------------


@inline
def spread(x, table, C, row, first, columns, L, K, out):
    """A row of the table, or of the slopes, for each column of a tile."""
    j = thread()
    while j < columns and first + j < K:
        put(out, j, load_float64(table, C * row + ((first + j) // L) % C))
        j = j + threads()


@inline
def spread_unit(x, table, C, first, columns, L, K, out):
    """`unit_of`, for each column of a tile."""
    j = thread()
    while j < columns and first + j < K:
        put(out, j, unit_of(x, load_float64(table, C * INVSTD + ((first + j) // L) % C)))
        j = j + threads()


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
        end = part * index(rows) + index(rows)
        end = smaller(end, height + like(K, 1) if left > 0 else height)
        if k >= K:
            end = zero
        total = splat(source, as_float(source, zero))
        products, lost, lost_products = total, total, total
        while m < end:
            i, hi = column_part(source, m, end, height, left, K, k, V)
            slot, grad = load_part(source, i, zero, hi), load_part(gradient, i, zero, hi)
            kept = bits_of(bits, i // V, zero, hi)
            here = opaque(column)  # read again for each row: registers are dearer
            xmu = decode(source, slot) - get_vector(source, means, here)
            scale, shift = get_vector(source, scales, here), get_vector(source, shifts, here)
            g = cut_off(source, grad, bits, kept, xmu, scale, shift, relu)
            store_if(grad_residual, passed, i, zero, hi, g)
            store_if(grad_input, target, i, zero, hi, g * scale)
            xhat = keep_part(xmu * get_vector(source, units, here), zero, hi, V)
            total, lost = add_up(source, total, lost, g)
            if is_double(source):
                products, lost_products = add_up(source, products, lost_products, g * xhat)
            else:
                products = fma(g, xhat, products)
            m = m + tall
        at = down * columns + column
        if k < K:
            put_vector(work, at, widen(close_sum(total, lost)))
        tile_sums(source, work, columns, tall, L)
        copies = K // (C * L)
        q = thread()
        while q * L < columns and base + q * L < K:
            c = base // L + q
            store_float64(
                partials, (((c % C) * copies + c // C) * parts + part) * 3 + SUM_DY,
                get(work, q * L),
            )  # fmt: skip
            q = q + threads()
        cuda.syncthreads()
        if k < K:
            put_vector(work, at, widen(close_sum(products, lost_products)))
        tile_sums(source, work, columns, tall, L)
        begin = smaller(part * index(rows), height)
        whole = smaller(begin + index(rows), height) - begin
        q = thread()
        while q * L < columns and base + q * L < K:
            c = base // L + q
            count = whole + 1 if part == parts - 1 and c * L < left else whole
            chunk = (((c % C) * copies + c // C) * parts + part) * 3
            store_float64(partials, chunk + COUNT, as_float64(count * L))
            store_float64(partials, chunk + SUM_DY_XHAT, get(work, q * L))
            q = q + threads()

    return backward_sums_columns


def backward_elements_columns(storage, aligned, wide):
    V = LANES[storage]
    SPACE = WIDEST_TILE * LANES[storage]

    def backward_elements_columns(
        grad_output: Address, x: Address, bits: Address, grad_input: Address,
        grad_residual: Address, C: Size, L: Size, K: Size, height: Size, left: Size, rows: Size,
        table: Address, slopes: Address, relu: Flag,
    ) -> None:  # fmt: skip
        C, L, K, left, height = index(C), index(L), index(K), index(left), index(height)
        source = pointer(storage, aligned, wide, x)
        gradient = pointer(storage, aligned, wide, grad_output)
        target = pointer(storage, aligned, wide, grad_input)
        passed = pointer(storage, aligned, wide, grad_residual)
        columns, tall = index(cuda.blockDim.x) * V, index(cuda.blockDim.y)
        column = index(cuda.threadIdx.x) * V  # of the tile
        base = index(cuda.blockIdx.x) * columns
        k = base + column
        means, scales = shared_like(source, SPACE), shared_like(source, SPACE)
        shifts, middles = shared_like(source, SPACE), shared_like(source, SPACE)
        factors, terms = shared_like(source, SPACE), shared_like(source, SPACE)
        spread(source, table, C, MEAN, base, columns, L, K, means)
        spread(source, table, C, SCALE, base, columns, L, K, scales)
        spread(source, table, C, SHIFT, base, columns, L, K, shifts)
        spread(source, slopes, C, 0, base, columns, L, K, middles)
        spread(source, slopes, C, SLOPE, base, columns, L, K, factors)
        spread(source, slopes, C, OFFSET, base, columns, L, K, terms)
        cuda.syncthreads()
        zero = like(K, 0)
        m = index(cuda.blockIdx.y) * index(rows) + index(cuda.threadIdx.y)
        end = index(cuda.blockIdx.y) * index(rows) + index(rows)
        end = smaller(end, height + like(K, 1) if left > 0 else height)
        if k >= K:
            end = zero
        while m < end:
            i, hi = column_part(source, m, end, height, left, K, k, V)
            slot, grad = load_part(source, i, zero, hi), load_part(gradient, i, zero, hi)
            kept = bits_of(bits, i // V, zero, hi)
            here = opaque(column)
            xmu = decode(source, slot) - get_vector(source, means, here)
            scale, shift = get_vector(source, scales, here), get_vector(source, shifts, here)
            g = cut_off(source, grad, bits, kept, xmu, scale, shift, relu)
            store_if(grad_residual, passed, i, zero, hi, g)
            here = opaque(here)
            factor, term = get_vector(source, factors, here), get_vector(source, terms, here)
            dx = (g - get_vector(source, middles, here)) + fma(xmu, factor, term)
            store_part(target, i, zero, hi, dx * get_vector(source, scales, opaque(here)))
            m = m + tall

    return backward_elements_columns
