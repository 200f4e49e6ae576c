"""The one place that launches kernels, and what there is to launch.

A `Kernel` is one variant of a function that makes kernels: for a storage type, for aligned
addresses or not, for 32-bit indices or 64-bit ones. It is compiled when it is first launched, and
kept on disk. `launch` hands launches to a runner: Numba's, or in tests one that needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from numbabn.cuda.options import THREADS
from numbabn.cuda.vector import FLOAT64

Dims = tuple[int, ...]  # blocks or threads in x and y


class Kernel:
    """One variant of a kernel."""

    def __init__(
        self, make: Callable[[int, int, int], Any], storage: int, aligned: bool, wide: bool,
        bounds: tuple[int, int],
    ):  # fmt: skip
        self.make, self.storage, self.aligned, self.wide = make, storage, aligned, wide
        self.bounds = bounds  # most threads in a block, least blocks on a multiprocessor

    @property
    def name(self) -> str:
        """The variant in words."""
        storage = ("float32", "float64", "float16", "bfloat16")[self.storage]
        return (
            f"{self.make.__name__} {storage} {'aligned' if self.aligned else 'unaligned'} "
            f"{64 if self.wide else 32}-bit"
        )

    @cached_property
    def py_func(self) -> Any:
        """The Python function that is compiled."""
        return self.make(self.storage, int(self.aligned), int(self.wide))

    @cached_property
    def dtypes(self) -> tuple[np.dtype[Any], ...]:
        """Of the arguments."""
        number = np.float64 if self.storage == FLOAT64 else np.float32
        kinds: dict[str, Any] = {
            "Address": np.uint64,
            "Size": np.uint32,
            "Number": number,
            "Double": np.float64,
            "Flag": np.int32,
        }
        given = self.py_func.__annotations__
        return tuple(np.dtype(kinds[given[name]]) for name in given if name != "return")

    @cached_property
    def signature(self) -> Any:
        """Numba's signature."""
        return types.void(*(getattr(types, dtype.name) for dtype in self.dtypes))

    def ptx(self, cc: tuple[int, int]) -> str:
        """The kernel's PTX for a compute capability; needs no GPU."""
        code, _ = cuda.compile(
            self.py_func, self.signature, device=False, abi="numba", cc=cc, output="ptx",
            launch_bounds=self.bounds,
        )  # fmt: skip
        return str(code)

    @cached_property
    def dispatcher(self) -> Any:
        """The kernel as Numba launches it."""
        dispatcher = cuda.jit(cache=True, launch_bounds=self.bounds)(self.py_func)
        # Numba compares only the file that a kernel is in, and would go on using old code of the
        # functions that it calls. Where there is no such attribute, its own rule stays in force.
        file: Any = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
        if file is not None and hasattr(file, "_source_stamp"):
            file._source_stamp = _sources()
        dispatcher.compile(self.signature.args)
        return dispatcher


@cache
def _sources() -> tuple[tuple[str, int, int], ...]:
    """What the modules of this folder looked like when they were imported."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


Runner = Callable[[Kernel, Dims, Dims, int, int, tuple[Any, ...]], None]


def _run_on_device(
    kernel: Kernel, grid: Dims, block: Dims, shared_bytes: int, stream: int,
    arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    _require_driver()
    kernel.dispatcher[grid, block, stream_object(stream), shared_bytes](*arguments)


@cache
def _require_driver() -> None:
    """Raise unless there is a device; it is asked once that it has been found."""
    if not cuda.is_available():
        raise RuntimeError(
            "CUDA arrays need a CUDA driver and a device, and numba.cuda finds none: install "
            "NVIDIA's driver, and numba-cuda for its version (pip install 'numbabn[cuda13]' or "
            "'numbabn[cuda12]')"
        )


@cache
def device_count() -> int:
    """How many devices there are; 1 if there is no driver, which a launch will say."""
    return len(cuda.gpus) if cuda.is_available() else 1


def device_at(address: int) -> int:
    """The number of the device that an address belongs to."""
    from cuda.bindings import driver

    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    error, number = driver.cuPointerGetAttribute(attribute, driver.CUdeviceptr(address))
    if error != driver.CUresult.CUDA_SUCCESS:
        raise ValueError(f"expected an address of a CUDA device, got {address:#x}: {error.name}")
    return int(number)


def on_device(number: int | None) -> AbstractContextManager[Any]:
    """That device is the current one in this context, and afterwards the one that was."""
    if number is None or device_count() == 1:
        return nullcontext()
    context: AbstractContextManager[Any] = cuda.gpus[number]
    return context


def follow(stream: int, other: int) -> None:
    """Have what comes on `stream` wait for what is on `other` by now; the host does not wait."""
    _require_driver()
    event = cuda.event(timing=False)
    event.record(stream_object(other))
    event.wait(stream_object(stream))


@cache
def stream_object(handle: int) -> Any:
    """Numba's stream of that handle."""
    if handle == 0:
        return cuda.default_stream()
    if handle == 1:
        return cuda.legacy_default_stream()
    if handle == 2:
        return cuda.per_thread_default_stream()
    return cuda.external_stream(handle)


_runner: Runner = _run_on_device


def set_runner(function: Runner | None) -> None:
    """Have `function` run all launches from now on; None for Numba."""
    global _runner
    _runner = _run_on_device if function is None else function


@contextmanager
def runner(function: Runner) -> Iterator[None]:
    """`set_runner` for as long as the context lasts."""
    before = _runner
    set_runner(function)
    try:
        yield
    finally:
        set_runner(before)


def launch(
    kernel: Kernel, grid: Dims, block: Dims, shared_bytes: int, stream: int,
    arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    """Launch a kernel of `grid` blocks of `block` threads."""
    typed = tuple(dtype.type(value) for dtype, value in zip(kernel.dtypes, arguments, strict=True))
    _runner(kernel, grid, block, shared_bytes, stream, typed)


@cache
def kernel(
    make: Callable[[int, int, int], Any], storage: int, aligned: bool, wide: bool,
    bounds: tuple[int, int] = (THREADS, 4),
) -> Kernel:  # fmt: skip
    """The variant of the kernel that `make` makes."""
    return Kernel(make, storage, aligned, wide, bounds)
