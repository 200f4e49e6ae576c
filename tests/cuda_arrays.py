"""CUDA arrays for tests: host memory that the public API takes for a GPU's.

A `Gpu` makes arrays, which have ``__cuda_array_interface__`` or DLPack and a namespace of the array
API standard, and whose values the host cannot read by any protocol; a test looks at `values`.
Launches run in the interpreter of PTX.
"""

import ctypes
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
from cuda_device import Device, aligned_empty

from numbabn.cuda import launch


class HostArray:
    """What all kinds share: the array API's attributes, slices, and no way to the host."""

    def __init__(self, gpu, values, *, read_only=False, stream=None, device="gpu 0"):
        self.gpu, self.values = gpu, values
        self.read_only, self.stream, self.device = read_only, stream, device

    shape = property(lambda self: self.values.shape)
    ndim = property(lambda self: self.values.ndim)
    dtype = property(lambda self: self.values.dtype)
    __array__ = None  # NumPy then refuses

    def like(self, values):
        return type(self)(self.gpu, values, stream=self.stream, device=self.device)

    def __getitem__(self, index):
        return self.like(self.values[index])

    def __array_namespace__(self):
        gpu, kind = self.gpu, self

        def empty(shape, dtype, device):
            assert device == kind.device
            new = kind.like(gpu.memory_for(shape, dtype))
            gpu.place(new)
            return new

        def zeros(shape, dtype, device):
            array = empty(shape, dtype, device)
            array.values[...] = 0
            return array

        def asarray(values, device):
            assert device == kind.device
            return kind.from_host(values)  # only where a test gives them such a method

        return SimpleNamespace(
            asarray=asarray,
            empty=empty,
            zeros=zeros,
            permute_dims=lambda a, axes: kind.like(a.values.transpose(axes)),
            bfloat16=bfloat16(),
            **{name: np.dtype(name) for name in ("float16", "float32", "float64", "uint8")},
        )


class InterfaceArray(HostArray):
    """An array of a library with ``__cuda_array_interface__``."""

    @property
    def __cuda_array_interface__(self):
        a = self.values
        interface = {
            "shape": a.shape,
            "typestr": a.dtype.str,
            "data": (a.ctypes.data, self.read_only),
            "version": 3,
            "strides": None if a.flags.c_contiguous else a.strides,
        }
        return interface if self.stream is None else {**interface, "stream": self.stream}


class DLPackArray(HostArray):
    """An array that has DLPack alone, of before or after it had versions."""

    versioned = True

    def __dlpack_device__(self):
        return 2, int(self.device[-1])

    def __dlpack__(self, *, stream=None, max_version=None):
        if max_version is not None and not self.versioned:
            raise TypeError("unexpected keyword argument 'max_version'")
        self.gpu.dlpack_streams.append(stream)
        return self.gpu.capsule(self, self.versioned)


class OldDLPackArray(DLPackArray):
    versioned = False


KINDS = {"interface": InterfaceArray, "dlpack": DLPackArray, "old dlpack": OldDLPackArray}


def bfloat16():
    try:
        import ml_dtypes
    except ImportError:
        return None
    return np.dtype(ml_dtypes.bfloat16)


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Gpu(Device):
    """A `Device` whose arrays go through the front door; `streams` holds where launches went."""

    def __init__(self, kind="interface", seed=0):
        super().__init__(seed)
        self.kind = KINDS[kind]
        self.streams, self.followed, self.dlpack_streams = [], [], []
        self._devices = []  # of arrays: first address, the one after the last, number
        self.current, self.launched_on = 0, []
        self._kept = []  # the interpreter knows memory by its address

    def memory_for(self, shape, dtype, offset=0, writable=True):
        flat = aligned_empty(int(np.prod(shape)), dtype, offset)
        self._kept.append(flat)
        if flat.size:
            self.memory.register(flat, f"array {len(self._kept)}", writable=writable)
        return flat.reshape(shape)

    def to(self, values, *, kind=None, offset=0, writable=False, **options):
        """A CUDA array of these values in their memory order; None stays None.

        The interpreter stops at a kernel that writes to it unless it is `writable`.
        """
        if values is None:
            return None
        order = sorted(range(values.ndim), key=lambda axis: -values.strides[axis])
        shape = [values.shape[axis] for axis in order]
        memory = self.memory_for(shape, values.dtype, offset, writable)
        memory = memory.transpose([order.index(axis) for axis in range(values.ndim)])
        memory[...] = values
        array = (kind or self.kind)(self, memory, **options)
        self.place(array)
        return array

    def place(self, array):
        """Remember which device an array is on."""
        begin = array.values.ctypes.data
        self._devices.append((begin, begin + array.values.nbytes, int(array.device[-1])))

    def device_at(self, address):
        """As `launch.device_at` asks the driver."""
        found = [number for begin, end, number in self._devices if begin <= address < end]
        return found[-1] if found else 0

    @contextmanager
    def on_device(self, number):
        """Device `number` is the current one, as `launch.on_device` makes it."""
        before = self.current
        if number is not None:
            self.current = number
        try:
            yield
        finally:
            self.current = before

    def _run(self, kernel, grid, block, shared_bytes, stream, arguments):
        self.launched_on.append(self.current)
        self.streams.append(stream)
        super()._run(kernel, grid, block, shared_bytes, stream, arguments)

    def capsule(self, array, versioned):
        """A DLPack capsule, laid out by hand from the standard's header."""
        a = array.values
        code = 4 if a.dtype.name == "bfloat16" else {"f": 2, "i": 0, "u": 1, "c": 5}[a.dtype.kind]
        sizes = (ctypes.c_int64 * (2 * a.ndim))(*a.shape, *(s // a.itemsize for s in a.strides))
        where = ctypes.addressof(sizes)
        tensor = np.zeros(6, np.uint64)  # DLTensor
        tensor[0] = a.ctypes.data
        tensor[1] = 2  # kDLCUDA, device 0
        tensor[2] = a.ndim | code << 32 | (8 * a.itemsize) << 40 | 1 << 48
        tensor[3:5] = where, where + 8 * a.ndim
        head = np.array([1, 0, 0, int(array.read_only)], np.uint64)
        managed = np.concatenate([head, tensor] if versioned else [tensor, np.zeros(2, np.uint64)])
        self._kept.append((sizes, managed))
        name = b"dltensor_versioned" if versioned else b"dltensor"
        return _new_capsule(managed.ctypes.data, name, None)


def install(monkeypatch, gpu):
    """Let all launches run on `gpu` until the test's end."""
    monkeypatch.setattr(launch, "_runner", gpu._run)
    monkeypatch.setattr(launch, "follow", lambda *streams: gpu.followed.append(streams))
    monkeypatch.setattr(launch, "device_count", lambda: 2)
    monkeypatch.setattr(launch, "device_at", gpu.device_at)
    monkeypatch.setattr(launch, "on_device", gpu.on_device)
    return gpu
