"""The forward pass over the elements: ``y = relu((x - mean) * scale + shift + residual)``.

The ReLU is a lower limit on y, `floor`: 0, or -inf for none. Where the backward pass will need to
know what the ReLU cut off and cannot recompute it (there was a residual), `bits` takes one byte
for each slot, a bit for each of its elements. Slots are loaded before anything is known of their
channels, whose numbers come by way of shared memory while the slots are on their way.
"""

from __future__ import annotations

from numba import cuda

from numbabn.cuda.channels import put_affine
from numbabn.cuda.geometry import column_part, plane_part, thread, threads, tile_columns
from numbabn.cuda.indices import index, like, smaller
from numbabn.cuda.memory import decode, load_part, pointer, store_part
from numbabn.cuda.options import (
    PAIR,
    PLANE_ROWS,
    THREADS,
    TILE_WIDTH,
    Address,
    Double,
    Flag,
    Number,
    Size,
    inline,
)
from numbabn.cuda.scalars import store_byte
from numbabn.cuda.shared import get, get_columns, shared_like
from numbabn.cuda.vector import LANES, clip_below, fma, positive_bits


@inline
def finish_slot(x, residual, added, bits, bit, out, i, lo, hi, slot, mean, scale, shift, floor):
    """Normalize a slot and store it; `bit` is its number among the bits."""
    value = fma(decode(x, slot) - mean, scale, shift)
    if residual != 0:
        value = value + decode(x, added)
    if bits != 0 and lo < hi:
        store_byte(bits, bit, positive_bits(value))
    store_part(out, i, lo, hi, clip_below(value, floor))


@inline
def load_if(given, source, i, lo, hi):
    """A slot, or zeros where there is no such array."""
    return load_part(source, i, lo, hi if given != 0 else lo)


# --- planes ---------------------------------------------------------------------------------


def normalize_planes(storage, aligned, wide):
    V = LANES[storage]

    def normalize_planes(
        x: Address, residual: Address, bits: Address, out: Address, rows: Size, C: Size, L: Size,
        slots: Size, chunk: Size, weight: Address, bias: Address, running_mean: Address,
        running_var: Address, kinds: Flag, eps: Double, table: Address, floor: Number,
    ) -> None:  # fmt: skip
        C, L, slots = index(C), index(L), index(slots)
        source = pointer(storage, aligned, wide, x)
        target = pointer(storage, aligned, wide, out)
        other = pointer(storage, aligned, wide, residual)
        begin = index(cuda.blockIdx.x) * index(chunk)
        end = smaller(begin + index(chunk), index(rows) * slots)
        a = begin + thread()
        b = a + THREADS
        i, lo, hi = plane_part(source, a, end, slots, L, V)
        j, lo_j, hi_j = plane_part(source, b, end, slots, L, V)
        slot = load_part(source, i, lo, hi)
        slot_j = load_part(source, j, lo_j, hi_j)

        means = shared_like(source, PLANE_ROWS)
        scales = shared_like(source, PLANE_ROWS)
        shifts = shared_like(source, PLANE_ROWS)
        first = begin // slots
        row = first + thread()
        while row * slots < end:
            # The first sample's rows are the channels; whoever has a channel's begin, writes.
            put_affine(
                source, weight, bias, running_mean, running_var, kinds, eps, table, C, row % C,
                row < C and row * slots >= begin, means, scales, shifts, row - first,
            )  # fmt: skip
            row = row + THREADS
        cuda.syncthreads()

        while a < end:
            added = load_if(residual, other, i, lo, hi)
            added_j = load_if(residual, other, j, lo_j, hi_j)
            q = a // slots - first
            finish_slot(
                source, residual, added, bits, a, target, i, lo, hi, slot,
                get(means, q), get(scales, q), get(shifts, q), floor,
            )  # fmt: skip
            if b < end:
                q = b // slots - first
                finish_slot(
                    source, residual, added_j, bits, b, target, j, lo_j, hi_j, slot_j,
                    get(means, q), get(scales, q), get(shifts, q), floor,
                )  # fmt: skip
            a = b + THREADS
            b = a + THREADS
            i, lo, hi = plane_part(source, a, end, slots, L, V)
            j, lo_j, hi_j = plane_part(source, b, end, slots, L, V)
            slot = load_part(source, i, lo, hi)
            slot_j = load_part(source, j, lo_j, hi_j)

    return normalize_planes


# --- columns --------------------------------------------------------------------------------


def normalize_columns(storage, aligned, wide):
    V = LANES[storage]
    SPACE = TILE_WIDTH * LANES[storage]  # channels that a tile can have

    def normalize_columns(
        x: Address, residual: Address, bits: Address, out: Address, C: Size, L: Size, K: Size,
        height: Size, left: Size, rows: Size, weight: Address, bias: Address,
        running_mean: Address, running_var: Address, kinds: Flag, eps: Double, table: Address,
        floor: Number,
    ) -> None:  # fmt: skip
        C, L, K, left, height = index(C), index(L), index(K), index(left), index(height)
        source = pointer(storage, aligned, wide, x)
        target = pointer(storage, aligned, wide, out)
        other = pointer(storage, aligned, wide, residual)
        tall = index(cuda.blockDim.y)
        base, column, columns = tile_columns(K, V)
        k = base + column
        m = index(cuda.blockIdx.y) * index(rows) + index(cuda.threadIdx.y)
        end = index(cuda.blockIdx.y) * index(rows) + index(rows)
        end = smaller(end, height + (like(K, 1) if left > 0 else like(K, 0)))
        if k >= K:
            end = like(K, 0)
        zero = like(K, 0)
        i, hi = column_part(source, m, end, height, left, K, k, V)
        j, hi_j = column_part(source, m + tall, end, height, left, K, k, V)
        slot = load_part(source, i, zero, hi)
        slot_j = load_part(source, j, zero, hi_j)

        means = shared_like(source, SPACE)
        scales = shared_like(source, SPACE)
        shifts = shared_like(source, SPACE)
        first = base // L
        q = thread()
        while q < columns // L:
            c = first + q
            put_affine(
                source, weight, bias, running_mean, running_var, kinds, eps, table, C, c % C,
                c < C and cuda.blockIdx.y == 0, means, scales, shifts, q,
            )  # fmt: skip
            q = q + threads()
        cuda.syncthreads()

        if m < end:
            mean = get_columns(source, means, column, L)
            scale = get_columns(source, scales, column, L)
            shift = get_columns(source, shifts, column, L)
            while m < end:
                added = load_if(residual, other, i, zero, hi)
                added_j = load_if(residual, other, j, zero, hi_j)
                finish_slot(
                    source, residual, added, bits, i // V, target, i, zero, hi, slot,
                    mean, scale, shift, floor,
                )  # fmt: skip
                finish_slot(
                    source, residual, added_j, bits, j // V, target, j, zero, hi_j, slot_j,
                    mean, scale, shift, floor,
                )  # fmt: skip
                m = m + tall * PAIR
                i, hi = column_part(source, m, end, height, left, K, k, V)
                j, hi_j = column_part(source, m + tall, end, height, left, K, k, V)
                slot = load_part(source, i, zero, hi)
                slot_j = load_part(source, j, zero, hi_j)

    return normalize_columns
