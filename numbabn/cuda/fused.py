"""Training of channels that fit a block: everything is read once, and kept in registers.

A thread holds up to four slots of x in the forward pass, two of x and of grad_output in the
backward pass. What a channel sums to is finished by one of the block's threads, as `channels`
has it, and reaches the others by way of shared memory. Only whole slots come here: rows begin
and end on multiples of 16 bytes. The order of sums is that of these kernels, not of those that
share a channel out over blocks.
"""

from __future__ import annotations

from numba import cuda

from numbabn.cuda.channels import (
    MEAN,
    SCALE,
    SHIFT,
    finish_backward,
    finish_training,
    slopes_of,
    update_running_mean,
    update_running_var,
)
from numbabn.cuda.geometry import next_slot, paired, thread, threads
from numbabn.cuda.gradients import (
    bits_of,
    cut_off,
    input_gradient,
    table_entry,
    table_unit,
)
from numbabn.cuda.indices import as_float, as_float64, index, like
from numbabn.cuda.memory import decode, element, hidden, load, load_wanted, opaque, pointer, store
from numbabn.cuda.options import (
    Address,
    Double,
    Flag,
    Number,
    Size,
    inline,
)
from numbabn.cuda.reductions import common_center, merge_threads
from numbabn.cuda.scalars import scalar, store_any, store_byte
from numbabn.cuda.shared import get, put, shared_float64, shared_like
from numbabn.cuda.sums import SUM_SPACE, block_sums
from numbabn.cuda.vector import (
    LANES,
    clip_below,
    doubtful,
    fma,
    lane,
    positive_bits,
    sum_lanes,
    widen,
)


@inline
def finish_found(
    x, found, at, weight, bias, running_mean, running_var, kinds, momentum, eps, table, C, c,
    affine, to, stride,
):  # fmt: skip
    """Finish channel c, of which four numbers were found; its affine goes to shared memory.

    What was found is read again when it is needed: registers are full of x.
    """
    j = opaque(at)
    update_running_mean(
        get(found, j), get(found, j + 1), get(found, j + 2), running_mean, kinds, momentum, c
    )
    j = opaque(at)
    update_running_var(get(found, j), get(found, j + 3), running_var, kinds, momentum, c)
    j = opaque(at)
    mean, scale, shift = finish_training(
        x, get(found, j), get(found, j + 1), get(found, j + 2), get(found, j + 3), weight, bias,
        kinds, eps, table, C, c,
    )  # fmt: skip
    put(affine, to, mean)
    put(affine, to + stride, scale)
    put(affine, to + stride + stride, shift)


# --- planes ---------------------------------------------------------------------------------


@inline
def slot_number(x, n, v, c, C, slots):
    """The number of the slot, of all of the array, that is `paired` number v of a channel's row."""
    row = n * C + c
    return element(x, row, slots, paired(n, row, v, slots))


@inline
def fetch(x, n, v, c, C, slots, V, step, wanted):
    """Slot v of sample n, if it is wanted, and where the thread's next slot is."""
    slot = load_wanted(x, slot_number(x, n, v, c, C, slots) * V, wanted)
    n, v = next_slot(n, v, slots, step)
    return slot, n, v


@inline
def merge_slot(x, slot, shift, wanted, before, V, total, mean, m2):
    """Sum, mean and m2 of the thread's values less `shift`, after a slot more, if it is wanted.

    `before` is how many slots came before it.
    """
    if wanted:
        value = decode(x, opaque(slot)) - shift
        sum_ = sum_lanes(value)
        middle = sum_ / as_float(x, V)
        apart = value - middle
        gap = middle - mean
        share = as_float(x, like(V, 1)) / as_float(x, like(V, before + 1))
        weight = share * as_float(x, like(V, before) * V)
        m2 = (m2 + sum_lanes(apart * apart)) + (gap * gap) * weight
        total, mean = total + sum_, fma(gap, share, mean)
    return total, mean, m2


def forward_planes(storage, aligned, wide):
    V = LANES[storage]

    def forward_planes(
        x: Address, residual: Address, bits: Address, out: Address, N: Size, C: Size, slots: Size,
        weight: Address, bias: Address, running_mean: Address, running_var: Address,
        kinds: Flag, momentum: Double, eps: Double, table: Address, floor: Number,
    ) -> None:  # fmt: skip
        C, slots = index(C), index(slots)
        source = pointer(storage, aligned, wide, x)
        target = pointer(storage, aligned, wide, out)
        other = pointer(storage, aligned, wide, residual)
        c, step = index(cuda.blockIdx.x), threads()
        end = index(N) * slots
        mine = (end + step - 1 - thread()) // step  # slots
        n, v = thread() // slots, thread() % slots
        s0, n, v = fetch(source, n, v, c, C, slots, V, step, mine > 0)
        s1, n, v = fetch(source, n, v, c, C, slots, V, step, mine > 1)
        s2, n, v = fetch(source, n, v, c, C, slots, V, step, mine > 2)
        s3, n, v = fetch(source, n, v, c, C, slots, V, step, mine > 3)

        mine = opaque(mine)  # lest a slot be loaded only after the one before was dealt with
        zero = as_float(source, like(C, 0))
        count = as_float(source, mine * V)
        shift, total, mean, m2 = zero, zero, zero, zero
        if mine > 0:
            shift = first_lane(source, s0)
        lanes = like(C, V)
        total, mean, m2 = merge_slot(source, s0, shift, mine > 0, 0, lanes, total, mean, m2)
        total, mean, m2 = merge_slot(source, s1, shift, mine > 1, 1, lanes, total, mean, m2)
        total, mean, m2 = merge_slot(source, s2, shift, mine > 2, 2, lanes, total, mean, m2)
        total, mean, m2 = merge_slot(source, s3, shift, mine > 3, 3, lanes, total, mean, m2)
        scratch, affine = shared_float64(SUM_SPACE), shared_like(source, 3)
        center = common_center(shift, scratch)
        number, near, offset, squares = widen(count), widen(shift), widen(mean), widen(m2)
        sum_ = widen(total)
        if mine > 0 and doubtful(m2, shift):
            sum_, squares = 0.0, 0.0
            u = thread()
            while u < end:
                at = slot_number(source, u // slots, u % slots, c, C, slots) * V
                j = like(C, 0)
                while j < V:  # one by one: in float64 a slot's numbers would take many registers
                    apart = widen(scalar(source, at + j)) - center
                    sum_, squares = sum_ + apart, squares + apart * apart
                    j = opaque(j + 1)
                u = opaque(u + step)
            near, offset = center, sum_ / number
            squares = squares - offset * sum_
        found = shared_float64(4)
        number, center, all_, squares = merge_threads(
            number, near, sum_, offset, squares, center, scratch
        )
        if thread() == 0:
            put(found, like(C, 0), number)
            put(found, like(C, 1), center)
            put(found, like(C, 2), all_)
            put(found, like(C, 3), squares)
            finish_found(
                source, found, like(C, 0), weight, bias, running_mean, running_var, kinds,
                momentum, eps, table, C, c, affine, like(C, 0), 1,
            )  # fmt: skip
        cuda.syncthreads()
        mean, scale = get(affine, like(C, 0)), get(affine, like(C, 1))
        bias_ = get(affine, like(C, 2))
        io = (source, residual, other, bits, target)
        again, step = opaque(thread()), opaque(step)  # computed anew, not kept till here
        mine = (index(N) * slots + step - 1 - again) // step
        n, v = again // slots, again % slots
        n, v = finish(io, s0, n, v, c, C, slots, V, step, mine > 0, mean, scale, bias_, floor)
        n, v = finish(io, s1, n, v, c, C, slots, V, step, mine > 1, mean, scale, bias_, floor)
        n, v = finish(io, s2, n, v, c, C, slots, V, step, mine > 2, mean, scale, bias_, floor)
        n, v = finish(io, s3, n, v, c, C, slots, V, step, mine > 3, mean, scale, bias_, floor)

    return forward_planes


@inline
def first_lane(x, slot):
    """A slot's first number."""
    return lane(decode(x, slot), 0)


@inline
def finish(io, slot, n, v, c, C, slots, V, step, wanted, mean, scale, shift, floor):
    """Normalize and store a slot, if it is wanted; and where the next one is."""
    source, residual, other, bits, target = io
    if wanted:
        at = slot_number(source, n, v, c, C, slots)
        finish_whole(source, residual, other, bits, target, at, V, slot, mean, scale, shift, floor)
    return next_slot(n, v, slots, step)


@inline
def finish_whole(x, residual, other, bits, out, at, V, slot, mean, scale, shift, floor):
    """Normalize slot number `at`, and store it."""
    value = fma(decode(x, hidden(slot)) - mean, scale, shift)
    if residual != 0:
        value = value + decode(x, load(other, at * V))
    if bits != 0:
        store_byte(bits, at, positive_bits(value))
    store(out, at * V, clip_below(value, floor))


@inline
def add_gradient(
    x, slot, grad, bits, at, V, mean, unit, scale, shift, relu, wanted, total, products
):  # fmt: skip
    """Sums of g and of ``g * xhat``, and those of a slot, if it is wanted."""
    if wanted:
        kept = bits_of(bits, at, like(V, 0), V)
        xmu = decode(x, opaque(slot)) - mean
        g = cut_off(x, opaque(grad), bits, kept, xmu, scale, shift, relu)
        total = total + sum_lanes(g)
        products = products + sum_lanes(g * (xmu * unit))
    return total, products


@inline
def store_gradient(
    io, slot, grad, at, V, mean, scale, shift, grad_mean, slope, offset, relu, wanted
):  # fmt: skip
    """Store slot number `at` of the input gradient, if it is wanted."""
    x, bits, target, passed, grad_residual = io
    if wanted:
        kept = bits_of(bits, at, like(V, 0), V)
        xmu = decode(x, hidden(slot)) - mean
        g = cut_off(x, hidden(grad), bits, kept, xmu, scale, shift, relu)
        if grad_residual != 0:
            store(passed, at * V, g)
        store(target, at * V, input_gradient(g, xmu, grad_mean, slope, offset, scale))


def backward_planes(storage, aligned, wide):
    V = LANES[storage]

    def backward_planes(
        grad_output: Address, x: Address, bits: Address, grad_input: Address,
        grad_residual: Address, N: Size, C: Size, slots: Size, table: Address, sums: Address,
        kinds: Flag, relu: Flag,
    ) -> None:  # fmt: skip
        C, slots = index(C), index(slots)
        source = pointer(storage, aligned, wide, x)
        gradient = pointer(storage, aligned, wide, grad_output)
        target = pointer(storage, aligned, wide, grad_input)
        passed = pointer(storage, aligned, wide, grad_residual)
        c, step, lanes = index(cuda.blockIdx.x), threads(), like(C, V)
        mine = (index(N) * slots + step - 1 - thread()) // step  # slots
        n, v = thread() // slots, thread() % slots
        n1, v1 = next_slot(n, v, slots, step)
        a = slot_number(source, n, v, c, C, slots)
        b = slot_number(source, n1, v1, c, C, slots)
        s0, g0 = load_wanted(source, a * V, mine > 0), load_wanted(gradient, a * V, mine > 0)
        s1, g1 = load_wanted(source, b * V, mine > 1), load_wanted(gradient, b * V, mine > 1)
        mean, unit = table_entry(source, table, C, MEAN, c), table_unit(source, table, C, c)
        scale = table_entry(source, table, C, SCALE, c)
        shift = table_entry(source, table, C, SHIFT, c)

        total = as_float(source, like(C, 0))
        products = total
        total, products = add_gradient(
            source, s0, g0, bits, a, lanes, mean, unit, scale, shift, relu, mine > 0, total,
            products,
        )  # fmt: skip
        total, products = add_gradient(
            source, s1, g1, bits, b, lanes, mean, unit, scale, shift, relu, mine > 1, total,
            products,
        )  # fmt: skip
        scratch, coefficients = shared_float64(SUM_SPACE), shared_like(source, 3)
        sum_dy, sum_dy_xhat = block_sums(widen(total), widen(products), scratch)
        if thread() == 0:
            count = as_float64(index(N) * slots * V)
            finish_sums_found(
                source, count, sum_dy, sum_dy_xhat, table, sums, kinds, C, c, coefficients,
                like(C, 0), 1,
            )  # fmt: skip
        cuda.syncthreads()
        grad_mean, slope = get(coefficients, like(C, 0)), get(coefficients, like(C, 1))
        offset = get(coefficients, like(C, 2))
        io = (source, bits, target, passed, grad_residual)
        again, step = opaque(thread()), opaque(step)  # computed anew, not kept till here
        n, v = again // slots, again % slots
        n1, v1 = next_slot(n, v, slots, step)
        a = slot_number(source, n, v, c, C, slots)
        b = slot_number(source, n1, v1, c, C, slots)
        store_gradient(
            io, s0, g0, a, lanes, mean, scale, shift, grad_mean, slope, offset, relu, mine > 0
        )
        store_gradient(
            io, s1, g1, b, lanes, mean, scale, shift, grad_mean, slope, offset, relu, mine > 1
        )

    return backward_planes


@inline
def finish_sums_found(
    x, count, sum_dy, sum_dy_xhat, table, sums, kinds, C, c, coefficients, to, stride
):  # fmt: skip
    """Finish channel c's sums; the coefficients of its dx go to shared memory."""
    dbias, dweight = finish_backward(x, count, sum_dy, sum_dy_xhat, table, C, c)
    store_any(sums, kinds & 3, c, dbias)
    store_any(sums, kinds & 3, C + c, dweight)
    grad_mean, slope, offset = slopes_of(x, dbias / count, dweight / count, table, C, c)
    put(coefficients, to, grad_mean)
    put(coefficients, to + stride, slope)
    put(coefficients, to + stride + stride, offset)
