"""Arrays of other libraries: where their memory is, and on which stream.

`take` reads ``__cuda_array_interface__`` or, where that is missing, DLPack. `libraries` makes new
arrays of the same kind.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from numbabn import checks
from numbabn.cuda import launch
from numbabn.cuda.arrays import DeviceArray
from numbabn.cuda.libraries import dense_strides, library_of

# What floats are stored as in a `DeviceArray`, and back.
STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.int16),
    "bfloat16": np.dtype(np.uint16),
}
FLOAT_NAMES = {storage: name for name, storage in STORAGE.items()}
_TYPESTRS = {"f2": "float16", "f4": "float32", "f8": "float64"}


class CudaArray(NamedTuple):
    """A user's array."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    storage: np.dtype[Any]
    read_only: bool
    stream: int | None  # on which its values come to be; None if they are there
    owner: Any
    capsule: Any = None  # of DLPack, if that is how the memory is lent
    device: int | None = None  # its number; None if nothing says

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.storage.itemsize

    @property
    def dtype_name(self) -> str:
        return FLOAT_NAMES[self.storage]

    @property
    def flat(self) -> DeviceArray:
        """For the backend; the array has no gaps."""
        return DeviceArray(self.address, self.size, self.storage, (self.owner, self.capsule))


def take(name: str, value: Any, stream: int) -> CudaArray:
    """What `value` lends; an argument called `name`, to be used on `stream`."""
    if not checks.is_cuda(value):
        raise TypeError(
            f"{name}: expected a CUDA array like the other arguments, got {type(value).__name__}"
        )
    try:
        interface = getattr(value, "__cuda_array_interface__", None)
        found = _from_interface(name, value, interface) if interface else None
        if found is None:
            found = _from_dlpack(name, value, stream)
    except (BufferError, RuntimeError) as error:
        raise ValueError(f"{name}: expected an array that lends its memory, got {error}") from error
    if found.size and found.address % found.storage.itemsize:
        raise ValueError(f"{name}: expected an aligned address, got {found.address:#x}")
    return found._replace(device=device_of(value))


def device_of(value: Any) -> int | None:
    """The number of the device that a CUDA array is on, or None if nothing says."""
    if launch.device_count() == 1:
        return 0
    if hasattr(value, "__dlpack_device__"):
        return int(value.__dlpack_device__()[1])
    try:
        interface = getattr(value, "__cuda_array_interface__", None)
    except Exception:  # a library's own refusal to lend it, which `take` reports
        return None
    address = interface["data"][0] if interface else 0
    return launch.device_at(address) if address else None


def on_device_of(value: Any) -> AbstractContextManager[Any]:
    """For as long as the context lasts, the device of an array is the current one."""
    return launch.on_device(device_of(value))


def _not_floating(name: str, got: Any) -> TypeError:
    return TypeError(f"{name}: expected dtype {checks.FLOATS}, got {got}")


def _from_interface(name: str, value: Any, interface: dict[str, Any]) -> CudaArray:
    typestr = interface["typestr"]
    kind = _TYPESTRS.get(typestr[1:])
    if typestr[1:] == "V2" and str(getattr(value, "dtype", "")).endswith("bfloat16"):
        kind = "bfloat16"
    if kind is None or typestr[0] == ">":
        raise _not_floating(name, getattr(value, "dtype", typestr))
    if interface.get("mask") is not None:
        raise TypeError(f"{name}: expected an array without a mask, got a masked one")
    storage, shape = STORAGE[kind], tuple(interface["shape"])
    address, read_only = interface["data"]
    strides = interface.get("strides")
    strides = dense_strides(shape, storage.itemsize) if strides is None else tuple(strides)
    stream = library_of(value).current_stream(value)
    if stream is None:
        stream = interface.get("stream")
    return CudaArray(address or 0, shape, strides, storage, bool(read_only), stream, value)


def memory_of(array: Any, stream: int) -> tuple[int, int]:
    """Address and number of elements of an array that a `Library` has made, of whatever dtype."""
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        tensor, _, _ = _tensor_of(array, stream)
        address, shape = (tensor.data or 0) + tensor.byte_offset, tensor.shape[: tensor.ndim]
    else:
        address, shape = interface["data"][0] or 0, interface["shape"]
    return address, int(np.prod(shape, dtype=np.int64))


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]

_DLPACK_FLOATS = {(2, 16): "float16", (2, 32): "float32", (2, 64): "float64", (4, 16): "bfloat16"}


def _tensor_of(value: Any, stream: int) -> tuple[_Tensor, bool, Any]:
    """What a producer lends, whether it may only be read, and the capsule that holds it."""
    # The producer makes the values ready for our stream; DLPack calls the legacy default one 1.
    try:
        capsule = value.__dlpack__(stream=stream or 1, max_version=(1, 0))
    except TypeError:  # from before there were versions
        capsule = value.__dlpack__(stream=stream or 1)
    if _is_valid(capsule, b"dltensor_versioned"):
        managed = _Versioned.from_address(_pointer_of(capsule, b"dltensor_versioned"))
        return managed.tensor, bool(managed.flags & 1), capsule
    return _Tensor.from_address(_pointer_of(capsule, b"dltensor")), False, capsule


def _from_dlpack(name: str, value: Any, stream: int) -> CudaArray:
    tensor, read_only, capsule = _tensor_of(value, stream)
    kind = _DLPACK_FLOATS.get((tensor.code, tensor.bits))
    if kind is None or tensor.lanes != 1:
        raise _not_floating(
            name, getattr(value, "dtype", f"code {tensor.code}, {tensor.bits} bits")
        )
    storage = STORAGE[kind]
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides:
        strides = tuple(n * storage.itemsize for n in tensor.strides[: tensor.ndim])
    else:
        strides = dense_strides(shape, storage.itemsize)
    address = (tensor.data or 0) + tensor.byte_offset
    # The capsule is not consumed: its own destructor gives the memory back to the producer.
    return CudaArray(address, shape, strides, storage, read_only, None, value, capsule)


def stream_handle(stream: Any) -> int:
    """A stream argument as the driver's handle."""
    if isinstance(stream, int) and not isinstance(stream, bool):
        if stream < 0:
            raise ValueError(f"stream: expected a handle of at least 0, got {stream}")
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr"):  # of PyTorch, of CuPy
        handle = getattr(stream, attribute, None)
        if isinstance(handle, int):
            return handle
    raise TypeError(
        "stream: expected None, an int, or a stream of CuPy, PyTorch or Numba, "
        f"got {type(stream).__name__}"
    )
