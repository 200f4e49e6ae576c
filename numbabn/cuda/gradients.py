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
    INVSTD,
    MEAN,
    OFFSET,
    SCALE,
    SHIFT,
    SLOPE,
    unit_of,
)
from numbabn.cuda.geometry import (
    column_part,
    plane_part,
    thread,
    threads,
    tile_columns,
)
from numbabn.cuda.indices import index, like, smaller
from numbabn.cuda.memory import decode, load_part, opaque, pointer, store_part
from numbabn.cuda.options import (
    PLANE_ROWS,
    THREADS,
    WIDEST_TILE,
    Address,
    Flag,
    Size,
    inline,
)
from numbabn.cuda.scalars import load_byte, load_float64
from numbabn.cuda.shared import get, get_vector, put, shared_like
from numbabn.cuda.vector import (
    LANES,
    fma,
    keep,
    part_bits,
    positive_bits,
    round_like,
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
def input_gradient(g, xmu, grad_mean, slope, offset, scale):
    """Training's input gradient; `channels` has the coefficients, which are scalars or vectors."""
    return ((g - grad_mean) + fma(xmu, slope, offset)) * scale


@inline
def store_if(given, target, i, lo, hi, value):
    """Store a slot's numbers, if there is such an array."""
    if given != 0:
        store_part(target, i, lo, hi, value)


@inline
def table_entry(x, table, C, row, c):
    """A number of the table, or of the slopes, in the type that is computed with."""
    return round_like(x, load_float64(table, C * row + c))


@inline
def table_unit(x, table, C, c):
    return round_like(x, unit_of(x, load_float64(table, C * INVSTD + c)))


# --- planes ---------------------------------------------------------------------------------


@inline
def element_slot(
    x, slot, grad, bits, kept, mean, scale, shift, grad_mean, slope, offset, relu, target, passed,
    grad_residual, i, lo, hi,
):  # fmt: skip
    """Store a slot of training's input gradient; its coefficients are scalars or vectors."""
    xmu = decode(x, slot) - mean
    g = cut_off(x, grad, bits, kept, xmu, scale, shift, relu)
    store_if(grad_residual, passed, i, lo, hi, g)
    store_part(target, i, lo, hi, input_gradient(g, xmu, grad_mean, slope, offset, scale))


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
        tall = index(cuda.blockDim.y)
        base, column, columns = tile_columns(K, V)
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
            dx = input_gradient(
                g, xmu, get_vector(source, middles, here), get_vector(source, factors, here),
                get_vector(source, terms, here), get_vector(source, scales, opaque(here)),
            )  # fmt: skip
            store_part(target, i, zero, hi, dx)
            m = m + tall

    return backward_elements_columns
