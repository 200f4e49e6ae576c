"""PyTorch as a contestant: plain and channels-last memory, outputs given and fresh.

PyTorch has no true `out=` for the backward pass: the generated `.out` overload computes into a
fresh tensor and copies it. So that its kernel can also be judged without the page faults of fresh
outputs, the kind "kept" runs the ordinary backward pass while the C library is told to keep freed
memory instead of handing it back to the system. (It does that by itself for small tensors.)
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from .peers_native import optional
from .peers_problem import EPS, MOMENTUM, Array, Contestant, Problem, Result, repeated

__all__ = ["contestants", "set_threads", "to_torch", "version"]


# Of mallopt(3). Below the threshold's maximum the library keeps freed memory of its own accord.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
LARGEST_MMAP_THRESHOLD = 32 << 20


def version() -> str:
    return str(optional("torch").__version__)


def set_threads(threads: int) -> None:
    optional("torch").set_num_threads(threads)


def to_torch(array: Array) -> Any:
    """The array's memory as a tensor; bfloat16 goes through its bits."""
    torch = optional("torch")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Any) -> Array:
    """A float32 copy, since NumPy has no bfloat16 of its own."""
    array: Array = tensor.detach().float().numpy()
    return array


@contextmanager
def kept_heap(nbytes: int) -> Iterator[None]:
    """Let the C library (GNU) serve tensors of so many bytes from memory that it keeps."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    # An aligned allocation rarely fits the hole that the last one left, so there is room for more
    # than one; writing to it now takes its page faults out of the timing.
    room = libc.malloc(ctypes.c_size_t(4 * nbytes))
    ctypes.memset(room, 0, 4 * nbytes)
    libc.free(ctypes.c_void_p(room))
    try:
        yield
    finally:
        # mallopt ends the library's own tuning of these limits for good, so they are left where
        # that tuning ends up in a process that has freed large arrays: its maximum.
        libc.mallopt(MMAP_MAX, 65536)
        libc.mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)
        libc.malloc_trim(ctypes.c_size_t(0))


def contestants(problem: Problem, pass_name: str, threads: int) -> Iterator[Contestant]:
    torch = optional("torch")
    # Dense arrays have one layout, and 4-D ones two, which torch tells apart by their strides.
    for layout in problem.layouts:
        yield from _of_layout(torch, problem, pass_name, layout)


def _of_layout(torch: Any, problem: Problem, pass_name: str, layout: str) -> Iterator[Contestant]:
    def view(array: Array) -> Any:
        tensor = to_torch(array)
        return tensor.permute(0, 3, 1, 2) if layout == "nhwc" else tensor

    train = pass_name.endswith("train")
    x, out = view(problem.x(layout)), view(problem.out(layout))
    weight, bias = to_torch(problem.weight), to_torch(problem.bias)
    # Training updates the running statistics in place, so it gets its own.
    running_mean = to_torch(problem.running_mean).clone()
    running_var = to_torch(problem.running_var).clone()
    save_mean, save_invstd = torch.empty(problem.C), torch.empty(problem.C)

    if pass_name.startswith("forward"):
        arguments = (x, weight, bias, running_mean, running_var, train, MOMENTUM, EPS)

        def forward_out() -> Any:
            return torch.ops.aten.native_batch_norm.out(
                *arguments, out=out, save_mean=save_mean, save_invstd=save_invstd
            )

        def forward_fresh() -> Any:
            if train:
                return torch.native_batch_norm(*arguments)
            return torch.nn.functional.batch_norm(
                x, running_mean, running_var, weight, bias, False, MOMENTUM, EPS
            )

        def forward_result(call: Callable[[], Any]) -> Result:
            outputs = call()
            y, *stats = outputs if isinstance(outputs, tuple) else (outputs,)
            names = ("mean", "invstd") if train else ()
            vectors = dict(zip(names, map(to_numpy, stats), strict=False))
            return Result("nchw", {"y": to_numpy(y)}, vectors)

        for kind, call in (("out", forward_out), ("fresh", forward_fresh)):
            result = partial(forward_result, call)
            yield Contestant("torch", layout, kind, repeated(call), result)
        return

    dy = view(problem.dy(layout))
    mean = to_torch(problem.batch_mean)
    invstd = 1 / torch.sqrt(to_torch(problem.batch_var) + EPS)
    backward_arguments = (
        *(dy, x, weight, running_mean, running_var, mean, invstd),
        *(train, EPS, [True, True, True]),
    )
    dweight, dbias = torch.empty(problem.C), torch.empty(problem.C)

    def backward_out() -> Any:
        return torch.ops.aten.native_batch_norm_backward.out(
            *backward_arguments, out0=out, out1=dweight, out2=dbias
        )

    def backward_fresh() -> Any:
        return torch.ops.aten.native_batch_norm_backward(*backward_arguments)

    def backward_result(call: Callable[[], Any]) -> Result:
        dx, dw, db = map(to_numpy, call())
        return Result("nchw", {"dx": dx}, {"dweight": dw, "dbias": db})

    for kind, call in (("out", backward_out), ("fresh", backward_fresh)):
        result = partial(backward_result, call)
        yield Contestant("torch", layout, kind, repeated(call), result)
    if platform.libc_ver()[0] == "glibc" and problem.nbytes > LARGEST_MMAP_THRESHOLD:
        run, result = repeated(backward_fresh), partial(backward_result, backward_fresh)
        setting = partial(kept_heap, problem.nbytes)
        yield Contestant("torch", layout, "kept", run, result, setting=setting)
