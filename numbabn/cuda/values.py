"""What a layer does with its arrays on a device: add, set, copy, fold.

The library that an array is from does it where it can (`libraries.Library`), else a small kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numba import cuda

from numbabn import checks
from numbabn.cuda import launch
from numbabn.cuda.arrays import DeviceArray
from numbabn.cuda.call import Call, check_writable, on_its_device
from numbabn.cuda.channels import bias_of, weight_of
from numbabn.cuda.indices import index
from numbabn.cuda.interop import STORAGE, CudaArray, on_device_of
from numbabn.cuda.options import THREADS, Address, Double, Flag, Size
from numbabn.cuda.scalars import load_any, store_any
from numbabn.cuda.vector import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

_NUMBERS = {"float32": FLOAT32, "float64": FLOAT64, "int16": FLOAT16, "uint16": BFLOAT16}


def combine(storage, aligned, wide):
    """``target = target * keep + source``, or ``+ value`` where there is no source."""

    def combine(
        target: Address, source: Address, C: Size, value: Double, keep: Flag, kinds: Flag
    ) -> None:
        c = index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x)
        if c < index(C):
            total = value
            if source != 0:
                total = load_any(source, (kinds >> 2) & 3, c)
            if keep != 0:
                total = total + load_any(target, kinds & 3, c)
            store_any(target, kinds & 3, c, total)

    return combine


def fold(storage, aligned, wide):
    """Scale and shift that do what running statistics, weight and bias do."""

    def fold(
        mean: Address, var: Address, weight: Address, bias: Address, C: Size, eps: Double,
        scale: Address, shift: Address, kinds: Flag,
    ) -> None:  # fmt: skip
        c = index(cuda.blockIdx.x) * index(cuda.blockDim.x) + index(cuda.threadIdx.x)
        if c < index(C):
            unit = 1.0 / math.sqrt(load_any(var, (kinds >> 6) & 3, c) + eps)
            factor = weight_of(weight, kinds, c) * unit
            offset = bias_of(bias, kinds, c) - load_any(mean, (kinds >> 4) & 3, c) * factor
            store_any(scale, (kinds >> 8) & 3, c, factor)
            store_any(shift, (kinds >> 8) & 3, c, offset)

    return fold


def _kinds(*arrays: Any) -> int:
    """How arrays are stored, two bits each; 0 for those that are not there."""
    numbers = (0 if a is None else _NUMBERS[a.name] for a in arrays)
    return sum(number << (2 * n) for n, number in enumerate(numbers))


def _launch(make: Any, C: int, stream: int, *arguments: Any) -> None:
    if C:
        variant = launch.kernel(make, FLOAT32, True, False)
        launch.launch(variant, (-(-C // THREADS),), (THREADS,), 0, stream, arguments)


def _combine(
    target: CudaArray, source: DeviceArray | None, value: float, keep: bool, stream: int
) -> None:
    kinds = _kinds(target.storage, None if source is None else source.dtype)
    address = 0 if source is None else source.address
    _launch(combine, target.size, stream, target.address, address, target.size, value, keep, kinds)


def _total(call: Call, name: str, total: Any, C: int) -> CudaArray:
    target = call.channels(name, total, C)
    check_writable(name, target)
    return target


@on_its_device
def check_total(like: Any, name: str, total: Any, C: int, stream: Any) -> None:
    """Whether `add` could add C numbers to `total`."""
    _total(Call("grad_output", like, stream), name, total, C)


@on_its_device
def add(like: Any, name: str, total: Any, grad: Any, stream: Any) -> None:
    """``total += grad`` on the stream of the call that `like` is an argument of."""
    call = Call("grad_output", like, stream)
    source = call.take("gradient", grad)
    target = _total(call, name, total, source.size)
    call.begin()
    if type(total) is not type(grad) or not call.library.add(total, grad, call.stream):
        _combine(target, source.flat, 0.0, True, call.stream)


def fill(values: Mapping[str, tuple[Any, float]]) -> None:
    """Set arrays to a number each, after all have been checked."""
    for name, (array, _) in values.items():
        with on_device_of(array):
            call = Call(name, array, None)
            check_writable(name, call.channels(name, array, call.array.size))
    for name, (array, value) in values.items():
        with on_device_of(array):
            call = Call(name, array, None)
            if not call.library.fill(array, value, call.stream):
                _combine(call.array, None, value, False, call.stream)


@on_its_device
def copied(array: Any, name: str) -> Any:
    """A copy by the library that the array is from."""
    call = Call(name, array, None)
    source = call.channels(name, array, call.array.size)
    new = call.library.empty(array, source.shape, None, source.dtype_name, call.stream)
    if not call.library.set(new, array, call.stream):
        target = call.lend(new, source.storage)
        _combine(source._replace(address=target.address), source.flat, 0.0, False, call.stream)
    return new


class Assignment:
    """`value` for the layer's array `own`: checked at once, written by `write`."""

    def __init__(self, key: str, value: Any, own: Any):
        self.own = own
        with on_device_of(own):
            self._check(key, value.detach() if hasattr(value, "detach") else value)

    def _check(self, key: str, value: Any) -> None:
        self.call, own = Call(key, self.own, None), self.own
        C = self.call.array.size
        check_writable(key, self.call.channels(key, own, C))
        if not checks.is_cuda(value):
            value = self._from_host(key, value, C)
        self.value = value
        self.source = self.call.channels(key, value, C)

    def _from_host(self, key: str, value: Any, C: int) -> Any:
        from numbabn.state import host_array

        host = host_array(value)
        if host.dtype.kind not in "fiub" and host.dtype.name != "bfloat16":
            raise TypeError(f"{key}: expected real numbers, got dtype {host.dtype}")
        if host.shape != (C,):
            raise ValueError(f"{key}: expected shape {(C,)}, got {host.shape}")
        kind = np.float64 if self.call.array.storage == STORAGE["float64"] else np.float32
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                values = np.ascontiguousarray(host.astype(kind))
            return self.call.library.from_host(self.own, values, self.call.stream)
        except (AttributeError, NotImplementedError, TypeError) as error:
            raise TypeError(
                f"{key}: expected a CUDA array like the layer's, got values on the host, which "
                f"{type(self.own).__name__} has no way to copy; copy them to the device first"
            ) from error

    def write(self) -> None:
        call = self.call
        same = type(self.value) is type(self.own)
        with on_device_of(self.own):
            call.begin()
            if not same or not call.library.set(self.own, self.value, call.stream):
                _combine(call.array, self.source.flat, 0.0, False, call.stream)


@on_its_device
def fold_scale_shift(
    mean: Any, var: Any, weight: Any, bias: Any, eps: Any, dtype: str
) -> tuple[Any, Any]:
    """`numbabn.fold_scale_shift`, in `dtype` and on the device."""
    eps = checks.not_negative("eps", eps)
    call = Call("running_mean", mean, None)
    C = call.array.size
    given = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    own = [None if a is None else call.channels(name, a, C).flat for name, a in given.items()]
    call.begin()
    results = [call.library.empty(mean, (C,), None, dtype, call.stream) for _ in range(2)]
    storage = STORAGE[dtype]
    scale, shift = (call.lend(result, storage) for result in results)
    kinds = _kinds(*(None if a is None else a.dtype for a in own), storage)
    w, b, m, v = (0 if a is None else a.address for a in own)
    _launch(fold, C, call.stream, m, v, w, b, C, eps, scale.address, shift.address, kinds)
    return results[0], results[1]
