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

import math

from numbabn.cuda.options import inline
from numbabn.cuda.vector import (
    load_any,
    load_float64,
    put,
    round_like,
    store_float64,
    widen,
)

MEAN, REST, INVSTD, SCALE, SHIFT = range(5)
TABLE_ROWS = 5
GRAD_MEAN, SLOPE, OFFSET = range(3)
SLOPE_ROWS = 3

COUNT, CENTER, SUM, M2 = range(4)
SUM_DY, SUM_DY_XHAT = 1, 2


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
