"""The CUDA backend: what the front door asks for, done by kernels that `launch` launches.

The functions are those of the CPU backend, in the same order. Arrays are `DeviceArray`s, in the
order of a `View`, and `queue` says on which stream to work and where scratch memory comes from.
Nothing here waits for the device, or reads what is on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from numbabn.cuda import (
    channels,
    fused,
    fused_columns,
    gradient_sums,
    gradients,
    launch,
    normalization,
    reductions,
)
from numbabn.cuda.arrays import NOTHING, DeviceArray, Queue
from numbabn.cuda.channels import SLOPE_ROWS as SLOPE_ROWS
from numbabn.cuda.channels import TABLE_ROWS as TABLE_ROWS
from numbabn.cuda.options import FUSED_THREADS, THREADS
from numbabn.cuda.plans import Columns, Planes, plan
from numbabn.cuda.vector import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from numbabn.layout import View

Make = Callable[[int, int, int], Any]

_STORAGE = {"float32": FLOAT32, "float64": FLOAT64, "int16": FLOAT16, "uint16": BFLOAT16}

# Arrays of this many elements and more are indexed with 64 bits.
WIDE_FROM = 1 << 31


def _address(array: DeviceArray | None) -> int:
    return 0 if array is None or array.size == 0 else array.address


def _variant(
    make: Make, x: DeviceArray, *others: DeviceArray | None, bounds: tuple[int, int] = (THREADS, 4)
) -> launch.Kernel:
    """The kernel for arrays like x, at these addresses."""
    addresses = [a.address for a in (x, *others) if a is not None]
    aligned = all(address % 16 == 0 for address in addresses)
    return launch.kernel(make, _STORAGE[x.dtype.name], aligned, x.size >= WIDE_FROM, bounds)


def _kinds(*arrays: DeviceArray) -> int:
    """How arrays of channels are stored, in two bits each."""
    return sum(_STORAGE[a.dtype.name] << (2 * n) for n, a in enumerate(arrays))


def bits_size(view: View, itemsize: int) -> int:
    """How many bytes (uint8) the `bits` of the forward pass take."""
    return plan(view, itemsize).bits


def _family(view: View, itemsize: int) -> tuple[Planes | Columns, str]:
    """The plan, and how the names of its kernels end."""
    how = plan(view, itemsize)
    return how, "planes" if isinstance(how, Planes) else "columns"


def _each_channel(make: Make, x: DeviceArray, C: int, queue: Queue, *arguments: Any) -> None:
    """Launch a kernel of `channels` that has a warp for each channel."""
    variant = launch.kernel(make, _STORAGE[x.dtype.name], True, False)
    launch.launch(variant, (-(-C // 4),), (32, 4), 0, queue.stream, arguments)


def known_table(
    x: DeviceArray, mean: DeviceArray, invstd: DeviceArray, weight: DeviceArray,
    bias: DeviceArray, C: int, queue: Queue,
) -> DeviceArray:  # fmt: skip
    """The table for given float64 mean (or nothing: 0), invstd (or 1), weight and bias."""
    table = queue.empty(TABLE_ROWS * C)
    variant = launch.kernel(channels.finish_known, _STORAGE[x.dtype.name], True, False)
    arguments = (
        _address(mean), _address(invstd), C, _address(weight), _address(bias),
        _kinds(weight, bias), table.address,
    )  # fmt: skip
    launch.launch(variant, (-(-C // 128),), (128,), 0, queue.stream, arguments)
    return table


def mean_of(table: DeviceArray, C: int, queue: Queue) -> DeviceArray:
    """The float64 means that a table was made with."""
    mean = queue.empty(C)
    variant = launch.kernel(channels.finish_mean, FLOAT64, True, False)
    launch.launch(
        variant, (-(-C // 128),), (128,), 0, queue.stream, (table.address, C, mean.address)
    )
    return mean


def forward_eval(
    x: DeviceArray, residual: DeviceArray | None, bits: DeviceArray | None, out: DeviceArray,
    view: View, weight: DeviceArray, bias: DeviceArray, running_mean: DeviceArray,
    running_var: DeviceArray, eps: float, relu: bool, queue: Queue,
) -> DeviceArray:  # fmt: skip
    """Normalize with the running statistics; returns the table."""
    table = queue.empty(TABLE_ROWS * view.C)
    given = (weight, bias, running_mean, running_var)
    _normalize(x, residual, bits, out, view, given, eps, table, relu, queue)
    return table


def normalize(
    x: DeviceArray, residual: DeviceArray | None, bits: DeviceArray | None, out: DeviceArray,
    view: View, table: DeviceArray, relu: bool, queue: Queue,
) -> None:  # fmt: skip
    """``out = relu((x - mean) * scale + shift + residual)``, with the table's numbers."""
    nothing = (NOTHING, NOTHING, NOTHING, NOTHING)
    _normalize(x, residual, bits, out, view, nothing, 0.0, table, relu, queue)


def _normalize(
    x: DeviceArray, residual: DeviceArray | None, bits: DeviceArray | None, out: DeviceArray,
    view: View, given: tuple[DeviceArray, ...], eps: float, table: DeviceArray, relu: bool,
    queue: Queue,
) -> None:  # fmt: skip
    how, family = _family(view, x.itemsize)
    variant = _variant(getattr(normalization, f"normalize_{family}"), x, residual, out)
    arguments = (
        *map(_address, (x, residual, bits, out)), *how.element_sizes, *map(_address, given),
        _kinds(*given), eps, _address(table), 0.0 if relu else -np.inf,
    )  # fmt: skip
    launch.launch(variant, how.element_grid, how.block, 0, queue.stream, arguments)


def _batch_stats(x: DeviceArray, view: View, queue: Queue) -> tuple[DeviceArray, int]:
    """Sums of all chunks, shape ``(C, chunks, 4)``, and the number of chunks."""
    how, family = _family(view, x.itemsize)
    partials = queue.empty(view.C * how.chunks * 4)
    variant = _variant(getattr(reductions, f"stats_{family}"), x)
    arguments = (x.address, *how.chunk_sizes, partials.address)
    launch.launch(variant, how.chunk_grid, how.block, 0, queue.stream, arguments)
    return partials, how.chunks


def stats(x: DeviceArray, view: View, queue: Queue) -> tuple[DeviceArray, DeviceArray]:
    """Mean and m2 of each channel."""
    partials, chunks = _batch_stats(x, view, queue)
    mean, m2 = queue.empty(view.C), queue.empty(view.C)
    _each_channel(
        channels.finish_stats, x, view.C, queue, partials.address, chunks, view.C, 0, 0, 0, 0, 0,
        0.0, 0.0, 0, mean.address, m2.address,
    )  # fmt: skip
    return mean, m2


def forward_train(
    x: DeviceArray, residual: DeviceArray | None, bits: DeviceArray | None, out: DeviceArray,
    view: View, weight: DeviceArray, bias: DeviceArray, running_mean: DeviceArray,
    running_var: DeviceArray, momentum: float, eps: float, relu: bool, queue: Queue,
) -> DeviceArray:  # fmt: skip
    """Normalize with the batch's own statistics; returns the table."""
    table = queue.empty(TABLE_ROWS * view.C)
    given = (weight, bias, running_mean, running_var)
    how = plan(view, x.itemsize)
    block = how.fused(backward=False)
    if block:
        planes = isinstance(how, Planes)
        make = fused.forward_planes if planes else fused_columns.forward_columns
        variant = _variant(make, x, residual, out, bounds=(FUSED_THREADS, 1))
        arguments = (
            *map(_address, (x, residual, bits, out)), *how.fused_sizes,
            *map(_address, given), _kinds(*given), momentum, eps, table.address,
            0.0 if relu else -np.inf,
        )  # fmt: skip
        launch.launch(variant, how.fused_grid(block), block, 0, queue.stream, arguments)
        return table
    partials, chunks = _batch_stats(x, view, queue)
    _each_channel(
        channels.finish_stats, x, view.C, queue, partials.address, chunks, view.C,
        *map(_address, given), _kinds(*given), momentum, eps, table.address, 0, 0,
    )  # fmt: skip
    normalize(x, residual, bits, out, view, table, relu, queue)
    return table


def _backward_partials(
    grad_output: DeviceArray, x: DeviceArray, bits: DeviceArray | None,
    grad_input: DeviceArray | None, grad_residual: DeviceArray | None, view: View,
    table: DeviceArray, relu: bool, queue: Queue,
) -> tuple[DeviceArray, int]:  # fmt: skip
    how, family = _family(view, x.itemsize)
    dtype = np.float32 if x.itemsize == 2 else np.float64
    partials = queue.empty(view.C * how.chunks * 2, dtype)
    arrays = (grad_output, x, bits, grad_input, grad_residual)
    variant = _variant(
        getattr(gradient_sums, f"backward_sums_{family}"), x, grad_output, grad_input, grad_residual
    )
    arguments = (
        *map(_address, arrays), *how.chunk_sizes, table.address, partials.address, int(relu),
    )  # fmt: skip
    launch.launch(variant, how.chunk_grid, how.block, 0, queue.stream, arguments)
    return partials, how.chunks


def backward_eval(
    grad_output: DeviceArray, x: DeviceArray, bits: DeviceArray | None,
    grad_input: DeviceArray | None, grad_residual: DeviceArray | None, view: View,
    table: DeviceArray, relu: bool, dtype: Any, queue: Queue,
) -> DeviceArray:  # fmt: skip
    """One pass: ``sums = (dbias, dweight)``, shape (2, C), and eval's input gradient if wanted.

    Without `grad_input` it serves training too, where only the sums are wanted. `dtype` is that
    of the sums, any that a `DeviceArray` may have.
    """
    arrays = (grad_output, x, bits, grad_input, grad_residual)
    partials, chunks = _backward_partials(*arrays, view, table, relu, queue)
    sums = queue.empty(2 * view.C, dtype)
    _each_channel(
        channels.finish_sums, x, view.C, queue, partials.address, chunks, view.C,
        view.per_channel, table.address, sums.address, _kinds(sums), 0,
    )  # fmt: skip
    return sums


def backward_elements(
    grad_output: DeviceArray, x: DeviceArray, bits: DeviceArray | None, grad_input: DeviceArray,
    grad_residual: DeviceArray | None, view: View, table: DeviceArray, slopes: DeviceArray,
    relu: bool, queue: Queue,
) -> None:  # fmt: skip
    """Training's input gradient, from sums that are known already."""
    how, family = _family(view, x.itemsize)
    arrays = (grad_output, x, bits, grad_input, grad_residual)
    variant = _variant(
        getattr(gradients, f"backward_elements_{family}"), x, grad_output, grad_input,
        grad_residual,
    )  # fmt: skip
    arguments = (
        *map(_address, arrays), *how.element_sizes, table.address, slopes.address, int(relu),
    )  # fmt: skip
    launch.launch(variant, how.element_grid, how.block, 0, queue.stream, arguments)


def backward_train(
    grad_output: DeviceArray, x: DeviceArray, bits: DeviceArray | None, grad_input: DeviceArray,
    grad_residual: DeviceArray | None, view: View, table: DeviceArray, relu: bool, dtype: Any,
    queue: Queue,
) -> DeviceArray:  # fmt: skip
    """Training's input gradient and ``sums = (dbias, dweight)``, shape (2, C)."""
    sums = queue.empty(2 * view.C, dtype)
    arrays = (grad_output, x, bits, grad_input, grad_residual)
    how = plan(view, x.itemsize)
    block = how.fused(backward=True)
    if block:
        planes = isinstance(how, Planes)
        make = fused.backward_planes if planes else fused_columns.backward_columns
        variant = _variant(
            make, x, grad_output, grad_input, grad_residual, bounds=(FUSED_THREADS, 1)
        )
        arguments = (
            *map(_address, arrays), *how.fused_sizes, table.address, sums.address, _kinds(sums),
            int(relu),
        )  # fmt: skip
        launch.launch(variant, how.fused_grid(block), block, 0, queue.stream, arguments)
        return sums
    slopes = queue.empty(SLOPE_ROWS * view.C)
    partials, chunks = _backward_partials(
        grad_output, x, bits, None, None, view, table, relu, queue
    )
    _each_channel(
        channels.finish_sums, x, view.C, queue, partials.address, chunks, view.C,
        view.per_channel, table.address, sums.address, _kinds(sums), slopes.address,
    )  # fmt: skip
    backward_elements(*arrays, view, table, slopes, relu, queue)
    return sums


def slopes_from_sums(
    x: DeviceArray, count: float, sum_dy: DeviceArray, sum_dy_xmu: DeviceArray,
    table: DeviceArray, queue: Queue,
) -> DeviceArray:  # fmt: skip
    """The coefficients of training's input gradient, from sums over all workers."""
    C = sum_dy.size
    slopes = queue.empty(SLOPE_ROWS * C)
    variant = launch.kernel(channels.finish_slopes, _STORAGE[x.dtype.name], True, False)
    arguments = (sum_dy.address, sum_dy_xmu.address, count, C, table.address, slopes.address)
    launch.launch(variant, (-(-C // 128),), (128,), 0, queue.stream, arguments)
    return slopes
