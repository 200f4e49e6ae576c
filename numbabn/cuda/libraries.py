"""The libraries that arrays on a GPU come from: new arrays of their kind, and what they can do.

A `Library` makes arrays with the allocator of the library that an array is from, so that they can
be handed to the user, and their memory is reused in the order that the library knows of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from sys import modules
from typing import Any

import numpy as np

from numbabn.cuda import launch


def dense_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """In bytes, of a C-contiguous array."""
    strides = []
    for n in reversed(shape):
        strides.append(itemsize)
        itemsize *= max(n, 1)
    return tuple(reversed(strides))


class Library:
    """What a library of the array API standard offers, from an array of it."""

    def current_stream(self, like: Any) -> int | None:
        """On which the library works, where arrays do not say so themselves."""
        return None

    def on(self, like: Any, stream: int) -> AbstractContextManager[Any]:
        """Memory that is asked for in this context belongs to `stream`."""
        return nullcontext()

    def new(self, like: Any, shape: tuple[int, ...], dtype: str, zeros: bool = False) -> Any:
        """A C-contiguous array on the device of `like`."""
        namespace = like.__array_namespace__()
        make = namespace.zeros if zeros else namespace.empty
        return make(shape, dtype=getattr(namespace, dtype), device=like.device)

    def permute(self, array: Any, axes: tuple[int, ...]) -> Any:
        return array.__array_namespace__().permute_dims(array, axes)

    # The next three say whether the library has such an operation; a kernel does it if not.

    def add(self, target: Any, source: Any, stream: int) -> bool:
        """``target += source``, both of this library."""
        return False

    def set(self, target: Any, source: Any, stream: int) -> bool:
        """``target[...] = source``, both of this library."""
        return False

    def fill(self, target: Any, value: float, stream: int) -> bool:
        """``target[...] = value``."""
        return False

    def from_host(self, like: Any, values: np.ndarray[Any, Any], stream: int) -> Any:
        """A new array on the device of `like`, with the values and the dtype of a NumPy array."""
        return like.__array_namespace__().asarray(values, device=like.device)

    def empty(
        self, like: Any, shape: tuple[int, ...], order: tuple[int, ...] | None, dtype: str,
        stream: int,
    ) -> Any:  # fmt: skip
        """A new array whose axes lie in memory in this order, from slowest to fastest."""
        with self.on(like, stream):
            if order is None:
                return self.new(like, shape, dtype)
            array = self.new(like, tuple(shape[axis] for axis in order), dtype)
            return self.permute(array, tuple(order.index(axis) for axis in range(len(shape))))


class _Torch(Library):
    def current_stream(self, like: Any) -> int | None:
        return int(modules["torch"].cuda.current_stream(like.device).cuda_stream)

    def on(self, like: Any, stream: int) -> AbstractContextManager[Any]:
        torch = modules["torch"].cuda
        if (stream or 1) == (torch.current_stream(like.device).cuda_stream or 1):
            return nullcontext()
        if stream in (0, 1):
            return _as_context(torch.stream(torch.default_stream(like.device)))
        return _as_context(torch.stream(torch.ExternalStream(stream, like.device)))

    def new(self, like: Any, shape: tuple[int, ...], dtype: str, zeros: bool = False) -> Any:
        torch = modules["torch"]
        make = torch.zeros if zeros else torch.empty
        return make(shape, dtype=getattr(torch, dtype), device=like.device)

    def permute(self, array: Any, axes: tuple[int, ...]) -> Any:
        return array.permute(axes)

    def add(self, target: Any, source: Any, stream: int) -> bool:
        with self.on(target, stream):
            target.add_(source)
        return True

    def set(self, target: Any, source: Any, stream: int) -> bool:
        with self.on(target, stream):
            target.copy_(source)
        return True

    def fill(self, target: Any, value: float, stream: int) -> bool:
        with self.on(target, stream):
            target.fill_(value)
        return True

    def from_host(self, like: Any, values: np.ndarray[Any, Any], stream: int) -> Any:
        with self.on(like, stream):
            return modules["torch"].from_numpy(values).to(like.device)


class _CuPy(Library):
    def on(self, like: Any, stream: int) -> AbstractContextManager[Any]:
        cupy = modules["cupy"].cuda
        if (stream or 1) == (cupy.get_current_stream().ptr or 1):
            return nullcontext()
        if stream in (0, 1):
            return _as_context(cupy.Stream.null)
        return _as_context(cupy.ExternalStream(stream))

    def new(self, like: Any, shape: tuple[int, ...], dtype: str, zeros: bool = False) -> Any:
        cupy = modules["cupy"]
        make = cupy.zeros if zeros else cupy.empty
        return make(shape, dtype=_numpy_dtype(dtype))

    def permute(self, array: Any, axes: tuple[int, ...]) -> Any:
        return array.transpose(axes)

    def add(self, target: Any, source: Any, stream: int) -> bool:
        with self.on(target, stream):
            target += source
        return True

    def set(self, target: Any, source: Any, stream: int) -> bool:
        with self.on(target, stream):
            target[...] = source
        return True

    def fill(self, target: Any, value: float, stream: int) -> bool:
        with self.on(target, stream):
            target.fill(value)
        return True

    def from_host(self, like: Any, values: np.ndarray[Any, Any], stream: int) -> Any:
        with self.on(like, stream):
            return modules["cupy"].asarray(values)


class _Numba(Library):
    def new(self, like: Any, shape: tuple[int, ...], dtype: str, zeros: bool = False) -> Any:
        from numba import cuda

        if zeros:
            return cuda.to_device(np.zeros(shape, _numpy_dtype(dtype)))
        return cuda.device_array(shape, _numpy_dtype(dtype))

    def from_host(self, like: Any, values: np.ndarray[Any, Any], stream: int) -> Any:
        from numba import cuda

        return cuda.to_device(values, stream=launch.stream_object(stream))

    def empty(
        self, like: Any, shape: tuple[int, ...], order: tuple[int, ...] | None, dtype: str,
        stream: int,
    ) -> Any:  # fmt: skip
        from numba import cuda

        kind = _numpy_dtype(dtype)
        strides = dense_strides(tuple(shape[a] for a in order or range(len(shape))), kind.itemsize)
        if order is not None:
            strides = tuple(strides[order.index(axis)] for axis in range(len(shape)))
        return cuda.device_array(shape, kind, strides=strides, stream=launch.stream_object(stream))


@contextmanager
def _as_context(stream: Any) -> Iterator[None]:
    with stream:
        yield


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return dtype
    return np.dtype(name)


_LIBRARIES = {"torch": _Torch(), "cupy": _CuPy(), "numba": _Numba(), "numba_cuda": _Numba()}
_STANDARD = Library()


@cache
def _library(kind: type) -> Library:
    for base in kind.__mro__:
        root = base.__module__.partition(".")[0]
        if root in _LIBRARIES:
            return _LIBRARIES[root]
        if root in ("jax", "jaxlib"):
            raise TypeError(
                "got a JAX array, whose results cannot be written in place; expected an array "
                "of CuPy, PyTorch or Numba, into which DLPack turns it without a copy"
            )
    return _STANDARD


def library_of(array: Any) -> Library:
    """The library that makes arrays like this one."""
    kind: Any = type(array)
    return _library(kind)
