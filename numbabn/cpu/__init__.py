"""The CPU backend: what `functional` asks for, done by the kernels of `serial` and `parallel`.

Arguments are those of the kernels: flat arrays of elements in the order of a `View`, arrays of
channels as described in `channels`. Every function picks the kernel for the view, cuts the work
up as `schedule` says, and runs it on as many threads as pay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbabn.cpu import parallel, schedule, serial
from numbabn.layout import View

Array = NDArray[Any]

TABLE_ROWS = 5
SLOPE_ROWS = 3


def _run(name: str, items: int, threads: int, *args: Any) -> None:
    """Run kernel `name` over its items."""
    parts = min(threads, items)
    if parts > 1:
        with schedule.may_run_parallel() as allowed:
            if allowed:
                getattr(parallel, name)(*args, items, parts)
                return
    getattr(serial, name)(*args, 0, items)


def eval_table(
    x: Array, running_mean: Array, running_var: Array, weight: Array, bias: Array, eps: float
) -> Array:
    """The table for normalizing with given statistics."""
    table = np.empty((TABLE_ROWS, running_mean.size))
    serial.finish_eval(x, running_mean, running_var, weight, bias, eps, table)
    return table


def known_table(x: Array, mean: Array, invstd: Array, weight: Array, bias: Array) -> Array:
    """The table for given float64 mean, invstd, weight and bias; the latter two may be empty."""
    table = np.empty((TABLE_ROWS, mean.size))
    serial.finish_known(x, mean, invstd, weight, bias, table)
    return table


def normalize(
    x: Array, residual: Array | None, bits: Array | None, out: Array, view: View, table: Array,
    relu: bool,
) -> None:  # fmt: skip
    """``out = relu((x - mean) * scale + shift + residual)``, with the table's numbers."""
    floor = 0.0 if relu else -np.inf
    threads = schedule.threads_for(x.size)
    streaming = schedule.streams(view, x.nbytes, bits is not None, out)
    sizes: tuple[int, ...]
    if view.columns:
        block = schedule.column_chunks(*view.sizes, x.itemsize == 8).block
        rows, items = schedule.row_grid(view, block, threads)
        sizes = (view.N, view.C, view.L, rows, block)
        _run(
            "normalize_columns", items, threads, x, residual, bits, out, *sizes, table, floor,
            streaming,
        )  # fmt: skip
    else:
        segment = schedule.plane_chunks(*view.sizes, x.itemsize == 8).segment
        items = view.N * view.C * -(-view.L // segment)
        _run(
            "normalize_planes", items, threads, x, residual, bits, out, view.C, view.L, segment,
            table, floor, streaming,
        )  # fmt: skip


def batch_stats(x: Array, view: View) -> Array:
    """Sums of all chunks, shape ``(C, chunks, 4)``."""
    threads = schedule.threads_for(x.size)
    if view.columns:
        cut = schedule.column_chunks(*view.sizes, x.itemsize == 8)
        partials = np.empty((view.C, cut.chunks, 4))
        items = cut.chunks * -(-view.C // cut.block)
        _run("stats_columns", items, threads, x, *view.sizes, cut.rows, cut.block, partials)
    else:
        tiles = schedule.plane_chunks(*view.sizes, x.itemsize == 8)
        partials = np.empty((view.C, tiles.chunks, 4))
        items = view.C * tiles.chunks
        _run("stats_planes", items, threads, x, *view.sizes, tiles.rows, tiles.segment, partials)
    return partials


def stats(x: Array, view: View) -> tuple[Array, Array]:
    """Mean and m2 of each channel."""
    partials = batch_stats(x, view)
    mean, m2 = np.empty(view.C), np.empty(view.C)
    serial.merge_stats(partials, mean, m2)
    return mean, m2


def forward_train(
    x: Array, residual: Array | None, bits: Array | None, out: Array, view: View, weight: Array,
    bias: Array, running_mean: Array, running_var: Array, momentum: float, eps: float, relu: bool,
) -> Array:  # fmt: skip
    """Normalize with the batch's own statistics; returns the table."""
    table = np.empty((TABLE_ROWS, view.C))
    channels = (weight, bias, running_mean, running_var, momentum, eps, table)
    threads = schedule.threads_for(x.size)
    if not schedule.channel_by_channel(view, x.itemsize, 1, threads):
        serial.finish_stats(x, batch_stats(x, view), *channels)
        normalize(x, residual, bits, out, view, table, relu)
        return table
    floor = 0.0 if relu else -np.inf
    streaming = schedule.streams(view, x.nbytes, bits is not None, out)
    sizes: tuple[int, ...]
    if view.columns:
        cut = schedule.column_chunks(*view.sizes, x.itemsize == 8)
        name, items = "forward_columns", -(-view.C // cut.block)
        sizes = (*view.sizes, *cut)
    else:
        tiles = schedule.plane_chunks(*view.sizes, x.itemsize == 8)
        name, items = "forward_planes", view.C
        sizes = (*view.sizes, *tiles)
    _run(name, items, threads, x, residual, bits, out, *sizes, *channels, floor, streaming)
    return table


def _backward_partials(
    grad_output: Array, x: Array, bits: Array | None, grad_input: Array | None,
    grad_residual: Array | None, view: View, table: Array, relu: bool,
) -> Array:  # fmt: skip
    arrays = (grad_output, x, bits, grad_input, grad_residual)
    threads = schedule.threads_for(x.size)
    written = [array for array in (grad_input, grad_residual) if array is not None]
    streaming = bool(written) and schedule.streams(view, x.nbytes, True, *written)
    sizes: tuple[int, ...]
    if view.columns:
        cut = schedule.column_chunks(*view.sizes, x.itemsize == 8)
        partials = np.empty((view.C, cut.chunks, 3))
        name, items = "backward_sums_columns", cut.chunks * -(-view.C // cut.block)
        sizes = (*view.sizes, cut.rows, cut.block)
    else:
        tiles = schedule.plane_chunks(*view.sizes, x.itemsize == 8)
        partials = np.empty((view.C, tiles.chunks, 3))
        name, items = "backward_sums_planes", view.C * tiles.chunks
        sizes = (*view.sizes, tiles.rows, tiles.segment)
    _run(name, items, threads, *arrays, *sizes, table, partials, relu, streaming)
    return partials


def backward_eval(
    grad_output: Array, x: Array, bits: Array | None, grad_input: Array | None,
    grad_residual: Array | None, view: View, table: Array, relu: bool,
) -> Array:  # fmt: skip
    """One pass: ``sums = (dbias, dweight)``, shape (2, C), and eval's input gradient if wanted.

    Without `grad_input` it serves training too, where only the sums are wanted.
    """
    partials = _backward_partials(
        grad_output, x, bits, grad_input, grad_residual, view, table, relu
    )
    sums, slopes = np.empty((2, view.C)), np.empty((SLOPE_ROWS, view.C))
    serial.finish_sums(x, partials, table, sums, slopes)
    return sums


def backward_elements(
    grad_output: Array, x: Array, bits: Array | None, grad_input: Array,
    grad_residual: Array | None, view: View, table: Array, slopes: Array, relu: bool,
) -> None:  # fmt: skip
    """Training's input gradient, from sums that are known already."""
    arrays = (grad_output, x, bits, grad_input, grad_residual)
    threads = schedule.threads_for(x.size)
    written = (grad_input,) if grad_residual is None else (grad_input, grad_residual)
    streaming = schedule.streams(view, x.nbytes, bits is not None, *written)
    sizes: tuple[int, ...]
    if view.columns:
        block = schedule.column_chunks(*view.sizes, x.itemsize == 8).block
        rows, items = schedule.row_grid(view, block, threads)
        sizes = (*view.sizes, rows, block)
        name = "backward_elements_columns"
    else:
        segment = schedule.plane_chunks(*view.sizes, x.itemsize == 8).segment
        items = view.N * view.C * -(-view.L // segment)
        sizes = (view.C, view.L, segment)
        name = "backward_elements_planes"
    _run(name, items, threads, *arrays, *sizes, table, slopes, relu, streaming)


def backward_train(
    grad_output: Array, x: Array, bits: Array | None, grad_input: Array,
    grad_residual: Array | None, view: View, table: Array, relu: bool,
) -> Array:  # fmt: skip
    """Training's input gradient and ``sums = (dbias, dweight)``, shape (2, C)."""
    arrays = (grad_output, x, bits, grad_input, grad_residual)
    sums, slopes = np.empty((2, view.C)), np.empty((SLOPE_ROWS, view.C))
    threads = schedule.threads_for(x.size)
    if not schedule.channel_by_channel(view, x.itemsize, 2, threads):
        partials = _backward_partials(grad_output, x, bits, None, None, view, table, relu)
        serial.finish_sums(x, partials, table, sums, slopes)
        backward_elements(*arrays, view, table, slopes, relu)
        return sums
    written = (grad_input,) if grad_residual is None else (grad_input, grad_residual)
    streaming = schedule.streams(view, x.nbytes, bits is not None, *written)
    sizes: tuple[int, ...]
    if view.columns:
        cut = schedule.column_chunks(*view.sizes, x.itemsize == 8)
        name, items = "backward_columns", -(-view.C // cut.block)
        sizes = (*view.sizes, *cut)
    else:
        tiles = schedule.plane_chunks(*view.sizes, x.itemsize == 8)
        name, items = "backward_planes", view.C
        sizes = (*view.sizes, *tiles)
    _run(name, items, threads, *arrays, *sizes, table, sums, slopes, relu, streaming)
    return sums


def slopes_from_sums(
    x: Array, count: float, sum_dy: Array, sum_dy_xmu: Array, table: Array
) -> Array:
    """The coefficients of training's input gradient, from sums over all workers."""
    slopes = np.empty((SLOPE_ROWS, sum_dy.size))
    serial.finish_slopes(x, count, sum_dy, sum_dy_xmu, table, slopes)
    return slopes
