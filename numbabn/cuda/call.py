"""The arrays of one call on CUDA arrays: taken by address, checked, and new ones like them.

Nothing is read on the host, copied or waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from numbabn import checks, layout
from numbabn.cuda import interop, launch, libraries
from numbabn.cuda.arrays import DeviceArray, Queue
from numbabn.cuda.channels import TABLE_ROWS
from numbabn.cuda.interop import STORAGE, CudaArray
from numbabn.cuda.plans import Planes, plan
from numbabn.layout import View

# What kernels can count to: 32 bits, and room for how far a block's indices run past the end.
MOST_COUNTED = (1 << 32) - (1 << 17)
SURELY_INDEXED = 1 << 24  # arrays of fewer elements are never too large


_Function = TypeVar("_Function", bound=Callable[..., Any])


def on_its_device(function: _Function) -> _Function:
    """Have the device of the first argument be the current one while `function` runs."""

    @wraps(function)
    def there(given: Any, *rest: Any, **options: Any) -> Any:
        with interop.on_device_of(given):
            return function(given, *rest, **options)

    result: _Function = there  # type: ignore[assignment]
    return result


class Call:
    """The arrays of one call, on one stream; `like` decides which library makes new ones.

    Without a `stream` that of `like` is taken. Work that other arrays wait for on streams of their
    own is waited for on the device when the call `begin`s.
    """

    def __init__(self, name: str, like: Any, stream: Any):
        given = None if stream is None else interop.stream_handle(stream)
        self.array = interop.take(name, like, given or 0)
        self.library = libraries.library_of(like)
        self.stream = (self.array.stream or 0) if given is None else given
        self.taken = {name: self.array}
        self.queue = Queue(self.stream, self._scratch)

    def take(self, name: str, value: Any) -> CudaArray:
        """One more array."""
        array = interop.take(name, value, self.stream)
        if None not in (array.device, self.array.device) and array.device != self.array.device:
            raise ValueError(
                f"{name}: expected an array on device {self.array.device} like the others, "
                f"got one on device {array.device}"
            )
        self.taken[name] = array
        return array

    def begin(self) -> None:
        """Everything is right, and work begins: first wait for the other streams, on the device."""
        streams = {a.stream or 1 for a in self.taken.values() if a.stream is not None}
        for other in sorted(streams - {self.stream or 1}):
            launch.follow(self.stream, other)

    def _scratch(self, count: int, dtype: np.dtype[Any]) -> DeviceArray:
        name = interop.FLOAT_NAMES.get(dtype, dtype.name)
        array = self.library.empty(self.array.owner, (count,), None, name, self.stream)
        return self.lend(array, dtype)

    def lend(self, array: Any, dtype: np.dtype[Any]) -> DeviceArray:
        """A new array of the library, for the backend."""
        address, size = interop.memory_of(array, self.stream)
        return DeviceArray(address, size, dtype, array)

    def like(self, view: View, x: CudaArray) -> tuple[Any, DeviceArray]:
        """A new array of the shape, dtype and memory order of x."""
        array = self.library.empty(
            self.array.owner, x.shape, view.order, x.dtype_name, self.stream
        )  # fmt: skip
        return array, self.lend(array, x.storage)

    def zeros(self, count: int, dtype: np.dtype[Any]) -> Any:
        with self.library.on(self.array.owner, self.stream):
            return self.library.new(
                self.array.owner, (count,), interop.FLOAT_NAMES[dtype], zeros=True
            )

    def channels(self, name: str, value: Any, C: int, double: bool = False) -> CudaArray:
        """An array of one float per channel, float64 if it must be `double`."""
        if isinstance(value, np.ndarray):
            raise TypeError(
                f"{name}: expected a CUDA array like x, got a NumPy array; a layer takes CUDA "
                "arrays once its weight, bias and running statistics are ones"
            )
        array = self.take(name, value)
        if array.shape != (C,):
            raise ValueError(f"{name}: expected shape ({C},), one per channel, got {array.shape}")
        if C > 1 and array.strides != (array.storage.itemsize,):
            raise ValueError(f"{name}: expected no gaps, got strides {array.strides}")
        if double and array.storage != STORAGE["float64"]:
            raise TypeError(f"{name}: expected dtype float64, got {array.dtype_name}")
        return array

    def same_kind(self, name: str, value: Any, x: CudaArray) -> CudaArray:
        """An array of the shape, dtype and memory order of x, without gaps."""
        array = self.take(name, value)
        if array.shape != x.shape:
            raise ValueError(f"{name}: expected the shape of x, {x.shape}, got {array.shape}")
        if array.storage != x.storage:
            raise TypeError(
                f"{name}: expected the dtype of x, {x.dtype_name}, got {array.dtype_name}"
            )
        if x.size and not lie_alike(array, x):
            raise ValueError(
                f"{name}: expected the memory order of x and no gaps, strides {x.strides}, "
                f"got {array.strides}; copy it into that order first"
            )
        return array

    def target(
        self, out: Any, x: CudaArray, same: dict[str, CudaArray], apart: dict[str, CudaArray]
    ) -> CudaArray:
        """`out`, which may be one of `same`, and shares no memory with the others."""
        array = self.same_kind("out", out, x)
        check_writable("out", array)
        for name, other in apart.items():
            check_apart("out", array, name, other)
        for name, other in same.items():
            if array.address != other.address:
                check_apart("out", array, f"part of {name}", other)
        return array


def lie_alike(a: CudaArray, b: CudaArray) -> bool:
    return all(
        p == q for n, p, q in zip(a.shape, a.strides, b.strides, strict=True) if n != 1
    )  # fmt: skip


def check_writable(name: str, array: CudaArray) -> None:
    if array.read_only:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")


def check_apart(name: str, array: CudaArray, other_name: str, other: CudaArray) -> None:
    end, other_end = array.address + array.nbytes, other.address + other.nbytes
    if array.address < other_end and other.address < end:
        raise ValueError(
            f"{name}: got an array that overlaps {other_name}, expected its own memory"
        )


def _check_indices(x: CudaArray, view: View) -> None:
    """Refuse an array whose slots, rows, columns or values per channel take more than 32 bits.

    Elements are counted with 64 bits where they have to be; nothing else in a kernel is.
    """
    how = plan(view, x.storage.itemsize)
    counted = [view.per_channel, TABLE_ROWS * view.C, 4 * view.C * how.chunks]
    if isinstance(how, Planes):
        counted.append(how.N * how.C * how.slots)
    else:
        counted += [how.K, how.height + 1]
    if max(counted) > MOST_COUNTED:
        raise ValueError(
            f"x: expected at most {MOST_COUNTED} slots of 16 bytes (64 GiB) for planes of "
            "channels, and as many columns, rows, sums of chunks and values per channel, got shape "
            f"{x.shape} of {x.dtype_name}; call with parts of it"
        )


def view_of(x: CudaArray, channel_axis: Any) -> tuple[int, View]:
    """The channels' axis, and the view of x."""
    if len(x.shape) < 2:
        raise ValueError(
            f"x: expected at least 2 dimensions (samples and channels), got shape {x.shape}"
        )
    axis = checks.axis(channel_axis, len(x.shape))
    if x.size == 0:
        return axis, View(False, 0, x.shape[axis], 0, None)
    view = layout.describe(x.shape, x.strides, x.storage.itemsize, axis)
    if view is None:
        raise ValueError(
            f"x: expected an array without gaps, in any order of axes, got strides {x.strides} for "
            f"shape {x.shape}; CUDA arrays are not copied, so make it contiguous first"
        )
    if x.size >= SURELY_INDEXED:
        _check_indices(x, view)
    return axis, view
