"""What happens once per channel: from sums to the few numbers that the big loops need.

Everything here is scalar float64; `x` is a pointer, and only its type matters. The rows of
`table` and `slopes` and the numbers of `partials` are those of the CPU backend:

========== ===========================================================================
MEAN       the mean, rounded to the type that the kernels compute with
REST       what that rounding left out, in standard deviations: mean = MEAN + REST / INVSTD
INVSTD     r = 1 / sqrt(var + eps)
SCALE      a = weight * r
SHIFT      b = bias - weight * REST, so that y = (x - MEAN) * a + b
GRAD_MEAN  and SLOPE, OFFSET: dx = SCALE * ((g - GRAD_MEAN) + ((x - MEAN) * SLOPE + OFFSET))
========== ===========================================================================

An address of 0 stands for a weight, bias or running statistic that was not given. `kinds` holds
in two bits each how weight, bias, running_mean and running_var are stored.
"""

from __future__ import annotations

import math

from numba import cuda

from numbabn.cuda.indices import index
from numbabn.cuda.memory import element, is_double, pointer
from numbabn.cuda.options import Address, Double, Flag, Size, inline
from numbabn.cuda.scalars import load_any, load_float64, load_sum, store_any, store_float64
from numbabn.cuda.shared import put
from numbabn.cuda.sums import warp_sum
from numbabn.cuda.vector import round_like, widen

MEAN, REST, INVSTD, SCALE, SHIFT = range(5)
TABLE_ROWS = 5
GRAD_MEAN, SLOPE, OFFSET = range(3)
SLOPE_ROWS = 3

COUNT, CENTER, SUM, M2 = range(4)
SUM_DY, SUM_DY_XHAT = range(2)

LARGEST_UNIT = 2.0**126  # in float32, with room for what it is multiplied by


@inline
def finite(correction):
    """A small correction, or nothing where infinity or NaN make it meaningless."""
    return correction if math.isfinite(correction) else 0.0


@inline
def weight_of(weight, kinds, c):
    return load_any(weight, kinds & 3, c) if weight != 0 else 1.0


@inline
def bias_of(bias, kinds, c):
    return load_any(bias, (kinds >> 2) & 3, c) if bias != 0 else 0.0


@inline
def fill_column(table, C, c, mean, rest, invstd, scale, shift):
    """Write channel c's column of the table."""
    store_float64(table, c, mean)
    store_float64(table, C * REST + c, rest)
    store_float64(table, C * INVSTD + c, invstd)
    store_float64(table, C * SCALE + c, scale)
    store_float64(table, C * SHIFT + c, shift)


@inline
def running_affine(x, weight, bias, running_mean, running_var, kinds, eps, c):
    """MEAN, REST, INVSTD, SCALE and SHIFT from running statistics."""
    mean = load_any(running_mean, (kinds >> 4) & 3, c)
    invstd = 1.0 / math.sqrt(load_any(running_var, (kinds >> 6) & 3, c) + eps)
    gamma, beta = weight_of(weight, kinds, c), bias_of(bias, kinds, c)
    rounded = widen(round_like(x, mean))
    rest = finite(finite(mean - rounded) * invstd)
    return rounded, rest, invstd, gamma * invstd, beta - finite(gamma * rest)


@inline
def put_affine(
    x, weight, bias, running_mean, running_var, kinds, eps, table, C, c, write, means, scales,
    shifts, q,
):  # fmt: skip
    """Number `q` of means, scales and shifts for channel c.

    From the table, or, where `running_var` is given, from that; the table is then written.
    """
    if running_var != 0:
        mean, rest, invstd, scale, shift = running_affine(
            x, weight, bias, running_mean, running_var, kinds, eps, c
        )
        if write and table != 0:
            fill_column(table, C, c, mean, rest, invstd, scale, shift)
    else:
        mean = load_float64(table, c)
        scale = load_float64(table, C * SCALE + c)
        shift = load_float64(table, C * SHIFT + c)
    put(means, q, mean)
    put(scales, q, scale)
    put(shifts, q, shift)


@inline
def update_running_mean(count, center, total, running_mean, kinds, momentum, c):
    """Update channel c's running mean."""
    if running_mean != 0:
        kind = (kinds >> 4) & 3
        old = (1.0 - momentum) * load_any(running_mean, kind, c)
        store_any(running_mean, kind, c, old + momentum * (center + total / count))


@inline
def update_running_var(count, m2, running_var, kinds, momentum, c):
    """Update channel c's running variance."""
    if running_var != 0:
        kind = (kinds >> 6) & 3
        old = (1.0 - momentum) * load_any(running_var, kind, c)
        store_any(running_var, kind, c, old + momentum * (m2 / (count - 1.0)))


@inline
def finish_training(x, count, center, total, m2, weight, bias, kinds, eps, table, C, c):
    """Fill channel c's column of the table; gives MEAN, SCALE and SHIFT.

    From the count, ``sum(x - center)`` and m2 of all its values.
    """
    invstd = 1.0 / math.sqrt(m2 / count + eps)
    rounded = widen(round_like(x, center + total / count))
    # sum(x - rounded), so that nothing underflows even if all of x is subnormal.
    left = total - (rounded - center) * count
    rest = finite(left * invstd / count)
    gamma = weight_of(weight, kinds, c)
    shift = bias_of(bias, kinds, c) - finite(gamma * rest)
    fill_column(table, C, c, rounded, rest, invstd, gamma * invstd, shift)
    return rounded, gamma * invstd, shift


@inline
def unit_of(x, invstd):
    """INVSTD as the backward sums multiply by it: rounded, and never infinite if it is not."""
    if not is_double(x) and invstd > LARGEST_UNIT and math.isfinite(invstd):
        return LARGEST_UNIT
    return widen(round_like(x, invstd))


@inline
def finish_backward(x, count, sum_dy, sum_dy_xhat, table, C, c):
    """From a channel's sums to dbias and dweight; `sum_dy_xhat` is in terms of `unit_of`."""
    invstd, rest = load_float64(table, C * INVSTD + c), load_float64(table, C * REST + c)
    correction = invstd / unit_of(x, invstd)
    if math.isfinite(correction):
        sum_dy_xhat = sum_dy_xhat * correction
    return sum_dy, sum_dy_xhat - finite(rest * sum_dy)


@inline
def slopes_of(x, mean_dy, mean_dy_xhat, table, C, c):
    """Channel c's GRAD_MEAN, SLOPE and OFFSET."""
    invstd, rest = load_float64(table, C * INVSTD + c), load_float64(table, C * REST + c)
    rounded = widen(round_like(x, mean_dy))
    low = finite(mean_dy - rounded)
    return rounded, -mean_dy_xhat * invstd, finite(mean_dy_xhat * rest) - low


@inline
def fill_slopes(slopes, C, c, grad_mean, slope, offset):
    """Write channel c's column of `slopes`."""
    store_float64(slopes, c, grad_mean)
    store_float64(slopes, C * SLOPE + c, slope)
    store_float64(slopes, C * OFFSET + c, offset)


# --- kernels: a warp for each channel, or a thread -----------------------------------------------


def finish_stats(storage, aligned, wide):
    """Merge the chunks of statistics; with a table, finish the channels, too."""

    def finish_stats(
        partials: Address, chunks: Size, C: Size, weight: Address, bias: Address,
        running_mean: Address, running_var: Address, kinds: Flag, momentum: Double, eps: Double,
        table: Address, means: Address, squares: Address,
    ) -> None:  # fmt: skip
        x = pointer(storage, aligned, wide, partials)
        C, chunks = index(C), index(chunks)
        lane = index(cuda.threadIdx.x)
        c = index(cuda.blockIdx.x) * index(cuda.blockDim.y) + index(cuda.threadIdx.y)
        if c < C:  # the whole warp, or none of it
            first = c * chunks
            center = load_float64(partials, element(x, first, 4, CENTER))
            count, total, m2 = 0.0, 0.0, 0.0
            k = lane
            while k < chunks:
                at = element(x, first + k, 4, 0)
                n = load_float64(partials, at + COUNT)
                apart = load_float64(partials, at + CENTER) - center
                count = count + n
                total = total + (apart * n + load_float64(partials, at + SUM))
                k = k + 32
            count, total = warp_sum(count), warp_sum(total)
            mean = total / count
            k = lane
            while k < chunks:
                at = element(x, first + k, 4, 0)
                n = load_float64(partials, at + COUNT)
                if n > 0.0:
                    apart = load_float64(partials, at + CENTER) - center - mean
                    apart = apart + load_float64(partials, at + SUM) / n
                    m2 = m2 + (load_float64(partials, at + M2) + n * (apart * apart))
                k = k + 32
            m2 = warp_sum(m2)
            if lane == 0:
                if table != 0:
                    update_running_mean(count, center, total, running_mean, kinds, momentum, c)
                    update_running_var(count, m2, running_var, kinds, momentum, c)
                    finish_training(
                        x, count, center, total, m2, weight, bias, kinds, eps, table, C, c
                    )
                else:
                    store_float64(means, c, center + mean)
                    store_float64(squares, c, m2)

    return finish_stats


def finish_known(storage, aligned, wide):
    """Fill the table from float64 means (or 0) and inverse standard deviations (or 1)."""

    def finish_known(
        mean: Address, invstd: Address, C: Size, weight: Address, bias: Address, kinds: Flag,
        table: Address,
    ) -> None:  # fmt: skip
        x = pointer(storage, aligned, wide, mean)
        C = index(C)
        c = index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x)
        if c < C:
            middle = load_float64(mean, c) if mean != 0 else 0.0
            unit = load_float64(invstd, c) if invstd != 0 else 1.0
            rounded = widen(round_like(x, middle))
            rest = finite(finite(middle - rounded) * unit)
            gamma = weight_of(weight, kinds, c)
            shift = bias_of(bias, kinds, c) - finite(gamma * rest)
            fill_column(table, C, c, rounded, rest, unit, gamma * unit, shift)

    return finish_known


def finish_mean(storage, aligned, wide):
    """The means that the table was made with, in float64."""

    def finish_mean(table: Address, C: Size, mean: Address) -> None:
        C = index(C)
        c = index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x)
        if c < C:
            middle, rest = load_float64(table, c), load_float64(table, C * REST + c)
            apart = rest / load_float64(table, C * INVSTD + c) if rest != 0.0 else 0.0
            store_float64(mean, c, middle + apart)

    return finish_mean


def finish_sums(storage, aligned, wide):
    """Merge the chunks of backward sums into dbias and dweight, and `slopes`."""

    def finish_sums(
        partials: Address, chunks: Size, C: Size, count: Double, table: Address, sums: Address,
        kinds: Flag, slopes: Address,
    ) -> None:  # fmt: skip
        x = pointer(storage, aligned, wide, partials)
        C, chunks = index(C), index(chunks)
        lane = index(cuda.threadIdx.x)
        c = index(cuda.blockIdx.x) * index(cuda.blockDim.y) + index(cuda.threadIdx.y)
        if c < C:
            first = c * chunks
            sum_dy, sum_dy_xhat = 0.0, 0.0
            k = lane
            while k < chunks:
                at = element(x, first + k, 2, 0)
                sum_dy = sum_dy + load_sum(x, partials, at + SUM_DY)
                sum_dy_xhat = sum_dy_xhat + load_sum(x, partials, at + SUM_DY_XHAT)
                k = k + 32
            sum_dy, sum_dy_xhat = warp_sum(sum_dy), warp_sum(sum_dy_xhat)
            if lane == 0:
                dbias, dweight = finish_backward(x, count, sum_dy, sum_dy_xhat, table, C, c)
                store_any(sums, kinds & 3, c, dbias)
                store_any(sums, kinds & 3, C + c, dweight)
                if slopes != 0:
                    mean_dy, mean_dy_xhat = dbias / count, dweight / count
                    a, b, offset = slopes_of(x, mean_dy, mean_dy_xhat, table, C, c)
                    fill_slopes(slopes, C, c, a, b, offset)

    return finish_sums


def finish_slopes(storage, aligned, wide):
    """Fill `slopes` from float64 sums over all workers, of dy and of ``dy * (x - mean)``."""

    def finish_slopes(
        sum_dy: Address, sum_dy_xmu: Address, count: Double, C: Size, table: Address,
        slopes: Address,
    ) -> None:  # fmt: skip
        x = pointer(storage, aligned, wide, sum_dy)
        C = index(C)
        c = index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x)
        if c < C:
            mean_dy = load_float64(sum_dy, c) / count
            invstd = load_float64(table, C * INVSTD + c)
            mean_dy_xhat = load_float64(sum_dy_xmu, c) * invstd / count
            grad_mean, slope, offset = slopes_of(x, mean_dy, mean_dy_xhat, table, C, c)
            fill_slopes(slopes, C, c, grad_mean, slope, offset)

    return finish_slopes
