"""The eval forward pass of arrays so small that calling it is what costs, checks included.

Numba's dispatcher looks at the type of each argument anyway, so the checks that Python would make
of dtypes, layouts and write flags are left to it: `eval_small` compiles to nothing for types that
do not fit, and otherwise looks at shapes and addresses, before it writes anything. It says whether
it did the job; if not, the ordinary way does it, or finds what is wrong.
"""

from typing import Any

import numpy as np
from numba.core import types
from numba.extending import overload

from numbabn.cpu import serial
from numbabn.cpu.options import inline, kernel
from numbabn.cpu.schedule import COLUMNS
from numbabn.layout import SHORT_PLANE

# Elements up to which one thread, called like this, is done before several have been called the
# ordinary way (measured: 13 us instead of 17 for 100,000 elements on two cores).
SMALL = 1 << 17


@inline
def span(array):
    """First address, and the one after the last."""
    start = array.ctypes.data
    return start, start + array.size * array.itemsize


@inline
def apart_or_same(out, other, may_be_same):
    """Whether two arrays share no memory, or all of it where that is fine."""
    a, a_end = span(out)
    b, b_end = span(other)
    return a_end <= b or b_end <= a or (may_be_same and a == b and a_end == b_end)


@kernel
def lies_apart(out, other, may_be_same, a, b, c, d):
    """Whether `out` shares no memory with any of the others, all of them contiguous."""
    return (
        apart_or_same(out, other, may_be_same)
        and apart_or_same(out, a, False)
        and apart_or_same(out, b, False)
        and apart_or_same(out, c, False)
        and apart_or_same(out, d, False)
    )


def _fit(x: Any, out: Any, channels: tuple[Any, ...], scalars: tuple[Any, ...]) -> bool:
    """Whether the arguments have the types that kernels take as they are."""
    return (
        isinstance(x, types.Array)
        and x.layout == "C"
        and x.aligned
        and x.ndim >= 2
        and x.dtype in (types.float32, types.float64)
        and out == x.copy(readonly=False)
        and all(
            isinstance(array, types.Array)
            and (array.ndim, array.layout, array.aligned, array.mutable) == (1, "C", True, True)
            and array.dtype == x.dtype
            for array in channels
        )
        and all(scalar == types.float64 for scalar in scalars)
    )


def _eval_small(
    x: Any, out: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: Any,
    eps: Any, floor: Any, channel_axis: Any,
) -> bool:  # fmt: skip
    raise NotImplementedError("for use in @njit code only")


@overload(_eval_small)
def _eval_small_overload(
    x, out, weight, bias, running_mean, running_var, momentum, eps, floor, channel_axis
):
    channels = (weight, bias, running_mean, running_var)
    fit = _fit(x, out, channels, (momentum, eps)) and channel_axis == types.int64
    if not (fit and x.mutable):

        def refuse(
            x, out, weight, bias, running_mean, running_var, momentum, eps, floor, channel_axis
        ):
            return False

        return refuse

    def do(x, out, weight, bias, running_mean, running_var, momentum, eps, floor, channel_axis):
        axis = channel_axis + x.ndim if channel_axis < 0 else channel_axis
        if not (0 <= axis < x.ndim and 0 < x.size <= SMALL and x.shape == out.shape):
            return False
        if not (0.0 <= eps < np.inf and -np.inf < momentum < np.inf):
            return False
        N, C, L = 1, x.shape[axis], 1
        for i in range(x.ndim):
            N *= x.shape[i] if i < axis else 1
            L *= x.shape[i] if i > axis else 1
        if not (weight.size == bias.size == running_mean.size == running_var.size == C):
            return False
        if not (
            apart_or_same(out, x, True)
            and apart_or_same(out, weight, False)
            and apart_or_same(out, bias, False)
            and apart_or_same(out, running_mean, False)
            and apart_or_same(out, running_var, False)
        ):
            return False
        table = np.empty((0, 0))
        if L == 1 or (N > 1 and L < SHORT_PLANE):
            block = max(16, COLUMNS // L // 16 * 16)
            serial.normalize_columns(
                x, None, None, out, N, C, L, N, block, weight, bias, running_mean, running_var,
                eps, table, floor, False, 0, (C + block - 1) // block,
            )  # fmt: skip
        else:
            serial.normalize_planes(
                x, None, None, out, C, L, L, weight, bias, running_mean, running_var, eps, table,
                floor, False, 0, N * C,
            )  # fmt: skip
        return True

    return do


@kernel
def eval_small(x, out, weight, bias, running_mean, running_var, momentum, eps, floor, channel_axis):
    """Normalize `x` into `out` with the running statistics, if all fits; returns whether it did."""
    return _eval_small(
        x, out, weight, bias, running_mean, running_var, momentum, eps, floor, channel_axis
    )
