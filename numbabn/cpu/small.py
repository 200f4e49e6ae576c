"""Eval's forward pass over arrays so small that calling it is what costs.

`eval_small` leaves even more to the kernel than `passes` does. Numba's dispatcher looks at the type
of each argument anyway, so the checks that Python would make of dtypes, layouts and write flags are
left to it: it compiles to nothing for types that do not fit, and otherwise looks at shapes as well.

The sizes go to the kernels of `serial` as a tuple, `*sizes`. Otherwise a constant among the
arguments would be a type of its own, and every kernel compiled once more for it.
"""

from typing import Any

import numpy as np
from numba.core import types
from numba.extending import overload

from numbabn.cpu import schedule, serial
from numbabn.cpu.options import kernel
from numbabn.cpu.sharing import IN_PLACE, may_write
from numbabn.layout import SHORT_PLANE, SHORTEST_PLANE, SMALL_EVAL


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
        if not (0 <= axis < x.ndim and 0 < x.size <= SMALL_EVAL and x.shape == out.shape):
            return False
        if not (0.0 <= eps < np.inf and -np.inf < momentum < np.inf):
            return False
        N, C, L = 1, x.shape[axis], 1
        for i in range(x.ndim):
            N *= x.shape[i] if i < axis else 1
            L *= x.shape[i] if i > axis else 1
        if not (weight.size == bias.size == running_mean.size == running_var.size == C):
            return False
        if not may_write(out, x, IN_PLACE, weight, bias, running_mean, running_var):
            return False
        table = np.empty((0, 0))
        if L < SHORTEST_PLANE or (N > 1 and L < SHORT_PLANE):
            block = min(C, max(16, schedule.COLUMNS_WRITTEN // L // 16 * 16))
            serial.normalize_columns(
                x, None, None, out, *(N, C, L, N, block), weight, bias, running_mean, running_var,
                eps, table, floor, False, 0, (C + block - 1) // block,
            )  # fmt: skip
        else:
            serial.normalize_planes(
                x, None, None, out, *(C, L, L), weight, bias, running_mean, running_var, eps, table,
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
