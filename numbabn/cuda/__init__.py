"""The CUDA backend: what the front door asks for, done by kernels that `launch` launches.

The functions are those of the CPU backend, in the same order. Arrays are `DeviceArray`s, in the
order of a `View`, and `queue` says on which stream to work and where scratch memory comes from.
Nothing here waits for the device, or reads what is on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from numbabn.cuda import launch, normalization
from numbabn.cuda.arrays import NOTHING, DeviceArray, Queue
from numbabn.cuda.channels import SLOPE_ROWS as SLOPE_ROWS
from numbabn.cuda.channels import TABLE_ROWS as TABLE_ROWS
from numbabn.cuda.options import THREADS
from numbabn.cuda.plans import Planes, plan
from numbabn.cuda.vector import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from numbabn.layout import View

_STORAGE = {"float32": FLOAT32, "float64": FLOAT64, "int16": FLOAT16, "uint16": BFLOAT16}

# Arrays of this many elements and more are indexed with 64 bits.
WIDE_FROM = 1 << 31


def _address(array: DeviceArray | None) -> int:
    return 0 if array is None or array.size == 0 else array.address


def _variant(
    make: Callable[[int, int], Any], x: DeviceArray, *others: DeviceArray | None
) -> launch.Kernel:
    """The kernel for arrays like x, at these addresses."""
    addresses = [a.address for a in (x, *others) if a is not None]
    aligned = all(address % 16 == 0 for address in addresses)
    return launch.kernel(make, _STORAGE[x.dtype.name], aligned, x.size >= WIDE_FROM)


def _kinds(*channels: DeviceArray) -> int:
    """How weight, bias, running_mean and running_var are stored."""
    return sum(_STORAGE[a.dtype.name] << (2 * n) for n, a in enumerate(channels))


def bits_size(view: View, itemsize: int) -> int:
    """How many bytes (uint8) the `bits` of the forward pass take."""
    return plan(view, itemsize).bits


def forward_eval(
    x: DeviceArray, residual: DeviceArray | None, bits: DeviceArray | None, out: DeviceArray,
    view: View, weight: DeviceArray, bias: DeviceArray, running_mean: DeviceArray,
    running_var: DeviceArray, eps: float, relu: bool, queue: Queue,
) -> DeviceArray:  # fmt: skip
    """Normalize with the running statistics; returns the table."""
    table = queue.empty(TABLE_ROWS * view.C)
    channels = (weight, bias, running_mean, running_var)
    _normalize(x, residual, bits, out, view, channels, eps, table, relu, queue)
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
    view: View, channels: tuple[DeviceArray, ...], eps: float, table: DeviceArray, relu: bool,
    queue: Queue,
) -> None:  # fmt: skip
    how = plan(view, x.itemsize)
    planes = isinstance(how, Planes)
    make = normalization.normalize_planes if planes else normalization.normalize_columns
    arguments = (
        *map(_address, (x, residual, bits, out)), *how.element_sizes, *map(_address, channels),
        _kinds(*channels), eps, _address(table), 0.0 if relu else -np.inf,
    )  # fmt: skip
    variant = _variant(make, x, residual, out)
    launch.launch(variant, how.element_blocks, THREADS, 0, queue.stream, arguments)
