"""Whole passes over arrays so small that calling them is what costs: one kernel each.

They look at addresses themselves, before they write anything, and say whether they did the job; if
not, the ordinary way finds what is wrong.

The sizes come as a tuple, `*sizes`, to the kernels of `serial`. Otherwise a constant among the
arguments would be a type of its own, and every kernel compiled once more for it.

`eval_small` leaves even more to the kernel. Numba's dispatcher looks at the type of each argument
anyway, so the checks that Python would make of dtypes, layouts and write flags are left to it: it
compiles to nothing for types that do not fit, and otherwise looks at shapes as well.
"""

from typing import Any, NamedTuple

import numpy as np
from numba.core import types
from numba.extending import overload

from numbabn.cpu import schedule, serial
from numbabn.cpu.channels import BACKWARD_FIELDS, SLOPE_ROWS, TABLE_ROWS
from numbabn.cpu.memory import address
from numbabn.cpu.options import inline, kernel
from numbabn.layout import SHORT_PLANE, SHORTEST_PLANE, SMALL_EVAL, View


@inline
def span(array):
    """First address, and the one after the last."""
    start = address(array)
    return start, start + array.size * array.itemsize


@inline
def apart_or_same(out, other, may_be_same):
    """Whether two arrays share no memory, or all of it where that is fine."""
    a, a_end = span(out)
    b, b_end = span(other)
    return a_end <= b or b_end <= a or (may_be_same and a == b and a_end == b_end)


@inline
def all_apart(out, x, same, weight, bias, running_mean, running_var):
    """Whether `out` shares no memory with any of the others, or is all of x if it may be."""
    return (
        apart_or_same(out, x, same)
        and apart_or_same(out, weight, False)
        and apart_or_same(out, bias, False)
        and apart_or_same(out, running_mean, False)
        and apart_or_same(out, running_var, False)
    )


@kernel
def lies_apart(out, x, same, a, b, c, d):
    """`all_apart`, for any arrays in place of those of channels."""
    return all_apart(out, x, same, a, b, c, d)


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
        if not all_apart(out, x, True, weight, bias, running_mean, running_var):
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


# --- training, and what goes back -------------------------------------------------------------


class Passes(NamedTuple):
    """The kernels for arrays that lie like some view, what they are told about its sizes, and more.

    The arrays are those of `serial`, flat and dense; `out` may be `same` as the first of them.
    `backward` is None where that pass is worth several threads, or takes several kernels.
    """

    forward: Any
    backward: Any
    sizes: tuple[int, ...]
    table_shape: tuple[int, int]
    sums_shape: tuple[int, int]


def passes(view: View, itemsize: int) -> Passes | None:
    """The kernels for small arrays that lie like `view`; None if it is not small."""
    plan, size = schedule.plan(view, itemsize, 1), view.C * view.per_channel
    if size >= schedule.shared_from(view, itemsize, backward=False) or not plan.forward_items:
        return None
    small = size < schedule.shared_from(view, itemsize, backward=True) and plan.backward_items > 0
    forward, backward = forward_planes, backward_planes
    if view.columns:
        forward, backward = forward_columns, backward_columns
    shapes = (TABLE_ROWS, view.C), (2, view.C)
    return Passes(forward, backward if small else None, plan.forward_sizes, *shapes)


@kernel
def forward_planes(
    x, out, same, weight, bias, running_mean, running_var, training, momentum, eps, table, floor,
    sizes,
):  # fmt: skip
    """The forward pass, if `out` lies apart from the rest; returns whether it does."""
    if not all_apart(out, x, same, weight, bias, running_mean, running_var):
        return False
    N, C, L, _, segment = sizes[:5]
    if training:
        serial.forward_planes(
            x, None, None, out, *sizes, weight, bias, running_mean, running_var, momentum, eps,
            table, floor, False, 0, C,
        )  # fmt: skip
    else:
        none = weight[:0]
        serial.finish_eval(x, weight, bias, running_mean, running_var, eps, table)
        serial.normalize_planes(
            x, None, None, out, *(C, L, segment), none, none, none, none, eps, table, floor, False,
            0, N * C * ((L + segment - 1) // segment),
        )  # fmt: skip
    return True


@kernel
def forward_columns(
    x, out, same, weight, bias, running_mean, running_var, training, momentum, eps, table, floor,
    sizes,
):  # fmt: skip
    """The forward pass, if `out` lies apart from the rest; returns whether it does."""
    if not all_apart(out, x, same, weight, bias, running_mean, running_var):
        return False
    M, C, L, _, block = sizes[:5]
    blocks = (C + block - 1) // block
    if training:
        serial.forward_columns(
            x, None, None, out, *sizes, weight, bias, running_mean, running_var, momentum, eps,
            table, floor, False, 0, blocks,
        )  # fmt: skip
    else:
        none = weight[:0]
        serial.finish_eval(x, weight, bias, running_mean, running_var, eps, table)
        serial.normalize_columns(
            x, None, None, out, *(M, C, L, M, block), none, none, none, none, eps, table, floor,
            False, 0, blocks,
        )  # fmt: skip
    return True


@kernel
def backward_planes(grad_output, x, out, same, training, table, sums, relu, sizes):
    """The backward pass, if `out` lies apart from the rest; returns whether it does."""
    if not (apart_or_same(out, grad_output, same) and apart_or_same(out, x, False)):
        return False
    N, C, L, rows, segment, chunks, group, ahead, _ = sizes
    if training:
        slopes = np.empty((SLOPE_ROWS, C))
        serial.backward_planes(
            grad_output, x, None, out, None, *sizes, table, sums, slopes, relu, False, 0, C
        )
    else:
        partials = np.empty((chunks, BACKWARD_FIELDS, C))
        serial.backward_sums_planes(
            grad_output, x, None, out, None, *(N, C, L, rows, segment, group, ahead), table,
            partials, sums, True, relu, False, 0, (C + group - 1) // group,
        )  # fmt: skip
    return True


@kernel
def backward_columns(grad_output, x, out, same, training, table, sums, relu, sizes):
    """The backward pass, if `out` lies apart from the rest; returns whether it does."""
    if not (apart_or_same(out, grad_output, same) and apart_or_same(out, x, False)):
        return False
    M, C, L, rows, block, chunks, ahead = sizes
    blocks = (C + block - 1) // block
    if training:
        slopes = np.empty((SLOPE_ROWS, C))
        serial.backward_columns(
            grad_output, x, None, out, None, *sizes, table, sums, slopes, relu, False, 0, blocks
        )
    else:
        partials = np.empty((chunks, BACKWARD_FIELDS, C))
        serial.backward_sums_columns(
            grad_output, x, None, out, None, *(M, C, L, rows, block, ahead), table, partials, sums,
            True, relu, False, 0, blocks,
        )  # fmt: skip
    return True
