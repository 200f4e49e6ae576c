"""One batch norm's arrays, and who computes it: numbabn, PyTorch, NumPy.

Outputs are given (``out=``) to whoever takes them, so that kernels are compared and not the
operating system's handing out of pages.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

import numbabn

__all__ = [
    "PASSES",
    "Contestant",
    "Problem",
    "is_installed",
    "memory_bytes",
    "of_numbabn",
    "of_numpy",
    "of_torch",
    "whole_lines",
]

Array = NDArray[Any]

PASSES = ("forward_train", "forward_eval", "backward_train", "backward_eval")
EPS, MOMENTUM = 1e-5, 0.1


@dataclass(frozen=True)
class Contestant:
    """Somebody who does a pass: `prepare` sets the threads, `run` does it once."""

    who: str
    pass_name: str
    threads: int
    run: Callable[[], object]
    prepare: Callable[[], object]


def is_installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    return find_spec(module) is not None


def memory_bytes() -> int:
    """The machine's memory, or 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def whole_lines(nbytes: int) -> Array:
    """At least so many bytes, zeros, in pairs of whole cache lines; every page is touched."""
    size = -(-nbytes // 128) * 128
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    lines: Array = raw[start : start + size]
    lines.fill(0)
    return lines


def _dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        try:
            scalar: Any = importlib.import_module("ml_dtypes").bfloat16
        except ImportError:
            raise ImportError("bfloat16 needs ml_dtypes (pip install 'numbabn[bf16]')") from None
        dtype: np.dtype[Any] = np.dtype(scalar)
        return dtype
    return np.dtype(name)


class Problem:
    """Arrays of one shape (N, C, ...), dtype and layout, random but always the same.

    Half types have parameters and statistics in float32. `lines` is the memory of `x`, `dy` and
    `out`, for who moves it without looking at what it is.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, layout: str) -> None:
        self.shape, self.dtype_name, self.layout = shape, dtype, layout
        self.dtype = _dtype(dtype)
        N, C, *rest = shape
        self.channel_axis = 1 if layout == "nchw" else len(shape) - 1
        sizes = (N, C, *rest) if layout == "nchw" else (N, *rest, C)
        rng = np.random.default_rng(0)
        nbytes = prod(sizes) * self.dtype.itemsize
        self.lines = whole_lines(nbytes), whole_lines(nbytes), whole_lines(nbytes)
        self.x, self.dy, self.out = (
            lines[:nbytes].view(self.dtype).reshape(sizes) for lines in self.lines
        )
        # Random numbers cost more than all the passes: a block of a prime length is repeated.
        block = rng.standard_normal(1_000_003, np.float32).astype(self.dtype)
        self.x.reshape(-1)[...] = np.resize(block, self.x.size)
        self.dy.reshape(-1)[...] = np.resize(block[::-1], self.x.size)
        params = np.dtype(np.float64 if dtype == "float64" else np.float32)
        self.running_mean, self.bias = rng.standard_normal((2, C)).astype(params)
        self.running_var, self.weight = rng.uniform(0.5, 2, (2, C)).astype(params)

    @property
    def label(self) -> str:
        return " × ".join(map(str, self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the input."""
        return int(self.x.nbytes)

    def least_bytes(self, pass_name: str) -> int:
        """Bytes that a pass has to move: its inputs once, its output once."""
        return self.nbytes * (2 if pass_name.startswith("forward") else 3)


def of_numbabn(given: Problem, pass_name: str, threads: int) -> Contestant:
    """numbabn, with its output given."""
    direction, _, mode = pass_name.partition("_")
    training = mode == "train"
    arguments = (
        *(given.x, given.running_mean.copy(), given.running_var.copy(), given.weight, given.bias),
        *(training, MOMENTUM, EPS),
    )
    options: dict[str, Any] = {"channel_axis": given.channel_axis, "out": given.out}
    run: Callable[[], object]
    if direction == "backward":
        saved = numbabn.batch_norm_forward(*arguments, **options)[1]
        run = partial(numbabn.batch_norm_backward, given.dy, saved, out=given.out)
    else:
        forward = numbabn.batch_norm_forward if training else numbabn.batch_norm
        run = partial(forward, *arguments, **options)
    return Contestant("numbabn", pass_name, threads, run, partial(numbabn.set_num_threads, threads))


def of_torch(given: Problem, pass_name: str, threads: int) -> Contestant:
    """PyTorch's operators; its backward pass cannot be given an output."""
    torch: Any = importlib.import_module("torch")

    def tensor(array: Array) -> Any:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def channels_second(array: Array) -> Any:
        return tensor(array).movedim(given.channel_axis, 1)

    direction, _, mode = pass_name.partition("_")
    training = mode == "train"
    x, dy, out = map(channels_second, (given.x, given.dy, given.out))
    weight, bias = tensor(given.weight), tensor(given.bias)
    statistics = tensor(given.running_mean).clone(), tensor(given.running_var).clone()
    forward = (x, weight, bias, *statistics, training, MOMENTUM, EPS)
    _, mean, invstd = torch.native_batch_norm(*forward)
    run: Callable[[], object]
    if direction == "backward":
        backward = (dy, x, weight, *statistics, mean, invstd, training, EPS, [True, True, True])
        run = partial(torch.ops.aten.native_batch_norm_backward, *backward)
    else:
        outputs = {"out": out, "save_mean": mean, "save_invstd": invstd}
        run = partial(torch.ops.aten.native_batch_norm.out, *forward, **outputs)
    return Contestant("torch", pass_name, threads, run, partial(torch.set_num_threads, threads))


def of_numpy(given: Problem, pass_name: str) -> Contestant:
    """Batch norm as one writes it in NumPy, on one thread; half types through float32."""
    axes = tuple(a for a in range(len(given.shape)) if a != given.channel_axis)
    sizes = [1] * len(given.shape)
    sizes[given.channel_axis] = -1
    weight, bias = given.weight.reshape(sizes), given.bias.reshape(sizes)
    running_mean, running_var = given.running_mean.copy(), given.running_var.copy()
    direction, _, mode = pass_name.partition("_")
    m = given.x.size // given.weight.size
    compute = given.weight.dtype

    def forward() -> tuple[Array, Array, Array]:
        x = given.x.astype(compute, copy=False)
        if mode == "train":
            mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
            for running, batch in ((running_mean, mean), (running_var, var * (m / (m - 1)))):
                running += MOMENTUM * (batch.reshape(-1) - running)
        else:
            mean, var = running_mean.reshape(sizes), running_var.reshape(sizes)
        invstd = 1 / np.sqrt(var + compute.type(EPS))
        y = (x - mean) * (weight * invstd) + bias
        given.out[...] = y
        return y, mean, invstd

    _, mean, invstd = forward()

    def backward() -> tuple[Array, Array, Array]:
        x, dy = given.x.astype(compute, copy=False), given.dy.astype(compute, copy=False)
        x_hat = (x - mean) * invstd
        dbias = dy.sum(axes, keepdims=True)
        dweight = (dy * x_hat).sum(axes, keepdims=True)
        if mode == "train":
            dx = weight * invstd * (dy - dbias / m - x_hat * (dweight / m))
        else:
            dx = weight * invstd * dy
        given.out[...] = dx
        return dx, dweight, dbias

    run = backward if direction == "backward" else forward
    return Contestant("numpy", pass_name, 1, run, lambda: None)
