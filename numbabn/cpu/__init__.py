"""The CPU backend: what `functional` asks for, done by the kernels of `serial` and `parallel`.

Arguments are those of the kernels: flat arrays of elements in the order of a `View`, arrays of
channels as described in `channels`. Every function picks the kernel for the view, cuts the work
up as `schedule` says, and runs it on as many threads as pay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbabn.cpu import launch, narrow, schedule, serial
from numbabn.cpu.channels import BACKWARD_FIELDS as BACKWARD_FIELDS
from numbabn.cpu.channels import FORWARD_FIELDS as FORWARD_FIELDS
from numbabn.cpu.channels import SLOPE_ROWS as SLOPE_ROWS
from numbabn.cpu.channels import TABLE_ROWS as TABLE_ROWS
from numbabn.cpu.small import eval_small as eval_small
from numbabn.cpu.small import lies_apart as lies_apart
from numbabn.cpu.small import passes as passes
from numbabn.layout import View

Array = NDArray[Any]

_FLOAT32: np.dtype[Any] = np.dtype(np.float32)
_FLOAT64: np.dtype[Any] = np.dtype(np.float64)

# Stands for channels that are not given, in the type that goes with float32 and with float64 x.
NOTHING = {False: np.empty(0, np.float32), True: np.empty(0, np.float64)}


def known_table(x: Array, mean: Array, invstd: Array, weight: Array, bias: Array) -> Array:
    """The table for given float64 mean, invstd, weight and bias; the latter two may be empty."""
    table = np.empty((TABLE_ROWS, mean.size))
    serial.finish_known(x, mean, invstd, weight, bias, table)
    return table


def forward_eval(
    x: Array, residual: Array | None, bits: Array | None, out: Array, view: View, weight: Array,
    bias: Array, running_mean: Array, running_var: Array, eps: float, relu: bool,
) -> None:  # fmt: skip
    """Normalize with the running statistics."""
    if narrow.rows_as_one(view) > 1:
        table = eval_table(x, weight, bias, running_mean, running_var, eps)
        return normalize(x, residual, bits, out, view, table, relu)
    channels = (weight, bias, running_mean, running_var, eps, _NO_TABLE)
    _normalize(x, residual, bits, out, view, channels, relu)


_NO_TABLE = np.empty((0, 0))


def eval_table(
    x: Array, weight: Array, bias: Array, running_mean: Array, running_var: Array, eps: float
) -> Array:
    """The table for the running statistics, which the backward pass needs."""
    table = np.empty((TABLE_ROWS, running_mean.size))
    serial.finish_eval(x, weight, bias, running_mean, running_var, eps, table)
    return table


def normalize(
    x: Array, residual: Array | None, bits: Array | None, out: Array, view: View, table: Array,
    relu: bool,
) -> None:  # fmt: skip
    """``out = relu((x - mean) * scale + shift + residual)``, with the table's numbers."""
    nothing = NOTHING[x.dtype == np.float64]
    view, times = narrow.widen(view)
    channels = (nothing, nothing, nothing, nothing, 0.0, narrow.repeat(table, times))
    _normalize(x, residual, bits, out, view, channels, relu)


def _normalize(
    x: Array, residual: Array | None, bits: Array | None, out: Array, view: View,
    channels: tuple[Any, ...], relu: bool,
) -> None:  # fmt: skip
    plan = schedule.plan_for(x, view, backward=False)
    floor = 0.0 if relu else -np.inf
    reads = 1 if residual is None else 2
    streaming = schedule.streams(view, x.nbytes, reads, bits is not None, out)
    launch.run(
        "normalize_", plan, plan.element_items, x, residual, bits, out,
        *plan.element_sizes, *channels, floor, streaming,
    )  # fmt: skip


def batch_stats(x: Array, view: View) -> Array:
    """Sums of all chunks, shape ``(chunks, 4, C)``."""
    view, times = narrow.widen(view)
    plan = schedule.plan_for(x, view, backward=False)
    partials = np.empty((plan.chunks, FORWARD_FIELDS, view.C))
    launch.run("stats_", plan, plan.chunk_items, x, *plan.stats_sizes, partials)
    return narrow.merge_stats(partials, times)


def stats(x: Array, view: View) -> tuple[Array, Array]:
    """Mean and m2 of each channel."""
    partials = batch_stats(x, view)
    mean, m2 = np.empty(view.C), np.empty(view.C)
    serial.merge_stats(x, partials, mean, m2)
    return mean, m2


def forward_train(
    x: Array, residual: Array | None, bits: Array | None, out: Array, view: View, weight: Array,
    bias: Array, running_mean: Array, running_var: Array, momentum: float, eps: float, relu: bool,
) -> Array:  # fmt: skip
    """Normalize with the batch's own statistics; returns the table."""
    table = np.empty((TABLE_ROWS, view.C))
    channels = (weight, bias, running_mean, running_var, momentum, eps, table)
    plan = schedule.training_plan(x, view, backward=False)
    floor = 0.0 if relu else -np.inf
    reads = 1 if residual is None else 2
    streaming = schedule.streams(view, x.nbytes, reads, bits is not None, out)
    if not plan.forward_items:
        if not plan.repeats:
            partials = np.empty((plan.chunks, FORWARD_FIELDS, view.C))
            sizes = (plan.stats_sizes, plan.element_sizes)
            arrays = (x, residual, bits, out)
            if launch.run_meeting(
                "forward_meeting_", plan, *arrays, *sizes, *channels, partials, floor, streaming
            ):
                return table
        serial.finish_stats(x, batch_stats(x, view), *channels)
        normalize(x, residual, bits, out, view, table, relu)
        return table
    launch.run(
        "forward_", plan, plan.forward_items, x, residual, bits, out,
        *plan.forward_sizes, *channels, floor, streaming,
    )  # fmt: skip
    return table


def _backward_sums(
    grad_output: Array, x: Array, bits: Array | None, grad_input: Array | None,
    grad_residual: Array | None, view: View, table: Array, relu: bool, sums: Array | None,
) -> Array | None:  # fmt: skip
    """The sums of all chunks, shape ``(chunks, 3, C)``; None if each channel's are in `sums`."""
    view, times = narrow.widen(view)
    plan = schedule.plan_for(x, view, backward=True)
    own_type = _FLOAT64 if x.dtype == _FLOAT64 else _FLOAT32
    finish = sums is not None and times == 1 and plan.finish_items > 0 and sums.dtype == own_type
    sizes, items = plan.sums_sizes, plan.chunk_items
    if finish:
        sizes, items = plan.finish_sizes, plan.finish_items
    else:
        sums = np.empty((0, 0), own_type)
    partials = np.empty((plan.chunks, BACKWARD_FIELDS, view.C))
    streaming = schedule.streams_while_summed(view, x, bits is not None, grad_input, grad_residual)
    launch.run(
        "backward_sums_", plan, items, grad_output, x, bits, grad_input, grad_residual, *sizes,
        narrow.repeat(table, times), partials, sums, finish, relu, streaming,
    )  # fmt: skip
    return None if finish else narrow.merge_sums(partials, times)


def backward_eval(
    grad_output: Array, x: Array, bits: Array | None, grad_input: Array | None,
    grad_residual: Array | None, view: View, table: Array, relu: bool,
    dtype: np.dtype[Any] = _FLOAT64,
) -> Array:  # fmt: skip
    """One pass: ``sums = (dbias, dweight)``, shape (2, C), and eval's input gradient if wanted.

    Without `grad_input` it serves training too, where only the sums are wanted. `dtype` is that
    of the sums, float32 or float64.
    """
    arrays = (grad_output, x, bits, grad_input, grad_residual)
    sums = np.empty((2, view.C), dtype)
    partials = _backward_sums(*arrays, view, table, relu, sums)
    if partials is not None:
        serial.finish_sums(x, partials, table, sums, np.empty((SLOPE_ROWS, view.C)))
    return sums


def backward_elements(
    grad_output: Array, x: Array, bits: Array | None, grad_input: Array,
    grad_residual: Array | None, view: View, table: Array, slopes: Array, relu: bool,
) -> None:  # fmt: skip
    """Training's input gradient, from sums that are known already."""
    view, times = narrow.widen(view)
    table, slopes = narrow.repeat(table, times), narrow.repeat(slopes, times)
    plan = schedule.plan_for(x, view, backward=True)
    streaming = schedule.streams(view, x.nbytes, 2, bits is not None, grad_input, grad_residual)
    launch.run(
        "backward_elements_", plan, plan.element_items, grad_output, x, bits,
        grad_input, grad_residual, *plan.element_sizes, table, slopes, relu, streaming,
    )  # fmt: skip


def backward_train(
    grad_output: Array, x: Array, bits: Array | None, grad_input: Array,
    grad_residual: Array | None, view: View, table: Array, relu: bool,
    dtype: np.dtype[Any] = _FLOAT64,
) -> Array:  # fmt: skip
    """Training's input gradient and ``sums = (dbias, dweight)``, shape (2, C)."""
    arrays = (grad_output, x, bits, grad_input, grad_residual)
    sums, slopes = np.empty((2, view.C), dtype), np.empty((SLOPE_ROWS, view.C))
    plan = schedule.training_plan(x, view, backward=True)
    streaming = schedule.streams(view, x.nbytes, 2, bits is not None, grad_input, grad_residual)
    if not plan.backward_items:
        if not plan.repeats:
            numbers = np.empty((plan.chunks, BACKWARD_FIELDS, view.C))
            sizes = (plan.sums_sizes, plan.element_sizes)
            rest = (table, numbers, sums, slopes, relu, streaming)
            if launch.run_meeting("backward_meeting_", plan, *arrays, *sizes, *rest):
                return sums
        partials = _backward_sums(grad_output, x, bits, None, None, view, table, relu, None)
        serial.finish_sums(x, partials, table, sums, slopes)
        backward_elements(*arrays, view, table, slopes, relu)
        return sums
    launch.run(
        "backward_", plan, plan.backward_items, *arrays, *plan.backward_sizes, table,
        sums, slopes, relu, streaming,
    )  # fmt: skip
    return sums


def slopes_from_sums(
    x: Array, count: float, sum_dy: Array, sum_dy_xmu: Array, table: Array
) -> Array:
    """The coefficients of training's input gradient, from sums over all workers."""
    slopes = np.empty((SLOPE_ROWS, sum_dy.size))
    serial.finish_slopes(x, count, sum_dy, sum_dy_xmu, table, slopes)
    return slopes
