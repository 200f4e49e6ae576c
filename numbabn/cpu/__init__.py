"""The CPU backend: what `functional` asks for, done by the kernels of `passes`.

Arguments are those of the kernels: flat arrays of elements in the order of a `View`, arrays of
channels as described in `channels`, and `sharing`, which says what memory they may share. Every
function cuts the work up as `schedule` says, and has it done by as many threads as pay. Passes
return None where nothing was written, as memory is shared that must not be.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbabn.cpu import narrow, serial
from numbabn.cpu.channels import BACKWARD_FIELDS as BACKWARD_FIELDS
from numbabn.cpu.channels import FORWARD_FIELDS as FORWARD_FIELDS
from numbabn.cpu.channels import SLOPE_ROWS as SLOPE_ROWS
from numbabn.cpu.channels import TABLE_ROWS as TABLE_ROWS
from numbabn.cpu.sharing import APART as APART
from numbabn.cpu.sharing import CHECKED as CHECKED
from numbabn.cpu.sharing import IN_PLACE as IN_PLACE
from numbabn.cpu.small import eval_small as eval_small
from numbabn.cpu.ways import Ways as Ways
from numbabn.cpu.ways import ways_of as ways_of

Array = NDArray[Any]

_FLOAT32: np.dtype[Any] = np.dtype(np.float32)
_FLOAT64: np.dtype[Any] = np.dtype(np.float64)

# Stands for channels that are not given, in the type that goes with float32 and with float64 x.
NOTHING: dict[bool, Array] = {False: np.empty(0, np.float32), True: np.empty(0, np.float64)}
_NO_TABLE = np.empty((0, 0))


def _own_type(x: Array) -> np.dtype[Any]:
    """The type that kernels compute with."""
    return _FLOAT64 if x.dtype == _FLOAT64 else _FLOAT32


def _floor(relu: bool) -> float:
    return 0.0 if relu else -math.inf


def _apart(out: Array, sharing: int, *read: Array) -> bool:
    """What `sharing.may_write` says, before several kernels that do not ask."""
    if sharing == CHECKED:
        return True
    others = read[1:] if sharing == IN_PLACE else read
    return not any(np.may_share_memory(out, other) for other in others)


def known_table(x: Array, mean: Array, invstd: Array, weight: Array, bias: Array) -> Array:
    """The table for given float64 mean, invstd, weight and bias; the latter two may be empty."""
    table = np.empty((TABLE_ROWS, mean.size))
    serial.finish_known(x, mean, invstd, weight, bias, table)
    return table


def forward_eval(
    x: Array, residual: Array | None, bits: Array | None, out: Array, sharing: int, ways: Ways,
    weight: Array, bias: Array, running_mean: Array, running_var: Array, eps: float, relu: bool,
    keep: bool,
) -> Array | None:  # fmt: skip
    """Normalize with the running statistics; returns the table, of size 0 unless it is to `keep`.

    The backward pass needs it.
    """
    table = np.empty((TABLE_ROWS, ways.channels)) if keep or ways.repeats else _NO_TABLE
    channels = (weight, bias, running_mean, running_var)
    if ways.repeats:
        if not _apart(out, sharing, x, *channels):
            return None
        serial.finish_eval(x, *channels, eps, table)
        normalize(x, residual, bits, out, ways, table, relu)
        return table
    done = _normalize(x, residual, bits, out, sharing, ways, channels, eps, table, relu)
    return table if done else None


def normalize(
    x: Array, residual: Array | None, bits: Array | None, out: Array, ways: Ways, table: Array,
    relu: bool, sharing: int = CHECKED,
) -> bool:  # fmt: skip
    """``out = relu((x - mean) * scale + shift + residual)``, with the table's numbers."""
    nothing = NOTHING[bool(x.dtype == _FLOAT64)]
    ways, times = ways.widened()
    table = narrow.repeat(table, times)
    return _normalize(x, residual, bits, out, sharing, ways, (nothing,) * 4, 0.0, table, relu)


def _normalize(
    x: Array, residual: Array | None, bits: Array | None, out: Array, sharing: int, ways: Ways,
    channels: tuple[Array, ...], eps: float, table: Array, relu: bool,
) -> bool:  # fmt: skip
    kernel, threads, cut, far = ways.way("normalize")
    streaming = far and ways.streams(1 if residual is None else 2, bits is not None, out)
    done: bool = kernel(
        threads, x, residual, bits, out, sharing, *channels, eps, table, _floor(relu), streaming,
        *cut,
    )  # fmt: skip
    return done


def batch_stats(x: Array, ways: Ways) -> Array:
    """Sums of all chunks, shape ``(chunks, 4, C)``."""
    ways, times = ways.widened()
    kernel, threads, (chunks, items, sizes), _ = ways.way("stats")
    partials = np.empty((chunks, FORWARD_FIELDS, ways.channels))
    kernel(threads, items, x, *sizes, partials)
    return narrow.merge_stats(partials, times)


def stats(x: Array, ways: Ways) -> tuple[Array, Array]:
    """Mean and m2 of each channel."""
    partials = batch_stats(x, ways)
    mean, m2 = np.empty(ways.channels), np.empty(ways.channels)
    serial.merge_stats(x, partials, mean, m2)
    return mean, m2


def forward_train(
    x: Array, residual: Array | None, bits: Array | None, out: Array, sharing: int, ways: Ways,
    weight: Array, bias: Array, running_mean: Array, running_var: Array, momentum: float,
    eps: float, relu: bool,
) -> Array | None:  # fmt: skip
    """Normalize with the batch's own statistics; returns the table."""
    table = np.empty((TABLE_ROWS, ways.channels))
    channels = (weight, bias, running_mean, running_var)
    if ways.repeats:
        apart = sharing == CHECKED or _apart(running_mean, APART, running_var)
        if not (apart and _apart(out, sharing, x, *channels)):
            return None
        serial.finish_stats(x, batch_stats(x, ways), *channels, momentum, eps, table)
        normalize(x, residual, bits, out, ways, table, relu)
        return table
    kernel, threads, cut, far = ways.way("forward")
    streaming = far and ways.streams(1 if residual is None else 2, bits is not None, out)
    done = kernel(
        threads, x, residual, bits, out, sharing, weight, bias, running_mean, running_var, momentum,
        eps, table, _floor(relu), streaming, *cut,
    )  # fmt: skip
    return table if done else None


def _chunk_sums(
    grad_output: Array, x: Array, bits: Array | None, grad_input: Array | None,
    grad_residual: Array | None, ways: Ways, table: Array, relu: bool,
) -> Array:  # fmt: skip
    """The sums of all chunks, shape ``(chunks, 3, C)``, and eval's input gradient if wanted."""
    ways, times = ways.widened()
    kernel, threads, (chunks, items, sizes), _ = ways.way("backward sums")
    partials = np.empty((chunks, BACKWARD_FIELDS, ways.channels))
    no_sums = np.empty((0, 0), _own_type(x))
    streaming = ways.streams_while_summed(bits is not None, grad_input, grad_residual)
    kernel(
        threads, items, grad_output, x, bits, grad_input, grad_residual, *sizes,
        narrow.repeat(table, times), partials, no_sums, False, relu, streaming,
    )  # fmt: skip
    return narrow.merge_sums(partials, times)


def backward_eval(
    grad_output: Array, x: Array, bits: Array | None, grad_input: Array | None,
    grad_residual: Array | None, sharing: int, ways: Ways, table: Array, relu: bool,
    dtype: np.dtype[Any] = _FLOAT64,
) -> Array | None:  # fmt: skip
    """One pass: ``sums = (dbias, dweight)``, shape (2, C), and eval's input gradient if wanted.

    Without `grad_input` it serves training too, where only the sums are wanted. `dtype` is that
    of the sums, float32 or float64.
    """
    arrays = (grad_output, x, bits, grad_input, grad_residual)
    sums = np.empty((2, ways.channels), dtype)
    if ways.repeats or sums.dtype != _own_type(x):  # few of these: not worth kernels of their own
        if grad_input is not None and not _apart(grad_input, sharing, grad_output, x):
            return None
        partials = _chunk_sums(*arrays, ways, table, relu)
        serial.finish_sums(x, partials, table, sums, np.empty((SLOPE_ROWS, ways.channels)))
        return sums
    kernel, threads, cut, far = ways.way("backward eval")
    streaming = far and ways.streams_while_summed(bits is not None, grad_input, grad_residual)
    done = kernel(threads, *arrays, sharing, table, sums, relu, streaming, *cut)
    return sums if done else None


def backward_elements(
    grad_output: Array, x: Array, bits: Array | None, grad_input: Array,
    grad_residual: Array | None, ways: Ways, table: Array, slopes: Array, relu: bool,
) -> None:  # fmt: skip
    """Training's input gradient, from sums that are known already."""
    ways, times = ways.widened()
    table, slopes = narrow.repeat(table, times), narrow.repeat(slopes, times)
    kernel, threads, (items, sizes), far = ways.way("backward elements")
    streaming = far and ways.streams(2, bits is not None, grad_input, grad_residual)
    kernel(
        threads, items, grad_output, x, bits, grad_input, grad_residual, *sizes, table, slopes,
        relu, streaming,
    )  # fmt: skip


def backward_train(
    grad_output: Array, x: Array, bits: Array | None, grad_input: Array,
    grad_residual: Array | None, sharing: int, ways: Ways, table: Array, relu: bool,
    dtype: np.dtype[Any] = _FLOAT64,
) -> Array | None:  # fmt: skip
    """Training's input gradient and ``sums = (dbias, dweight)``, shape (2, C)."""
    arrays = (grad_output, x, bits, grad_input, grad_residual)
    sums = np.empty((2, ways.channels), dtype)
    if ways.repeats:
        if not _apart(grad_input, sharing, grad_output, x):
            return None
        slopes = np.empty((SLOPE_ROWS, ways.channels))
        partials = _chunk_sums(grad_output, x, bits, None, None, ways, table, relu)
        serial.finish_sums(x, partials, table, sums, slopes)
        backward_elements(*arrays, ways, table, slopes, relu)
        return sums
    kernel, threads, cut, far = ways.way("backward")
    streaming = far and ways.streams(2, bits is not None, grad_input, grad_residual)
    done = kernel(threads, *arrays, sharing, table, sums, relu, streaming, *cut)
    return sums if done else None


def slopes_from_sums(
    x: Array, count: float, sum_dy: Array, sum_dy_xmu: Array, table: Array
) -> Array:
    """The coefficients of training's input gradient, from sums over all workers."""
    slopes = np.empty((SLOPE_ROWS, sum_dy.size))
    serial.finish_slopes(x, count, sum_dy, sum_dy_xmu, table, slopes)
    return slopes
