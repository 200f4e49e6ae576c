"""One batch-norm problem (a shape and a dtype) with its arrays in every layout, and the referee.

All contestants work on the arrays made here: the same values, 64-byte aligned, and allocated by
NumPy (which asks for huge pages), so that none is slowed by where its memory came from.
`Problem.check` compares what a contestant computed with float64 NumPy on a few channels, because a
wrong call can be very fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .peers_native import optional
from .shapes import PASSES

__all__ = ["BLOCK", "PASSES", "Contestant", "Problem", "Result", "aligned_empty", "repeated"]

Array = NDArray[Any]

EPS = 1e-5
MOMENTUM = 0.1
# Channels per block of oneDNN's nChw16c layout: one AVX-512 register of float32.
BLOCK = 16


@dataclass(frozen=True)
class Result:
    """What one call computed: tensors with the layout they are in, and per-channel vectors."""

    layout: str
    tensors: Mapping[str, Array] = field(default_factory=dict)
    vectors: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """One way to compute a pass.

    Attributes
    ----------
    peer, layout, kind : str
        Who, on which memory layout, and whether outputs are given ("out") or made anew ("fresh").
    run : callable
        Does the pass a number of times, each output freed before the next call.
    result : callable, optional
        Does the pass once and returns what it computed; None for a bandwidth probe.
    note : str
        Which implementation the library chose, where it tells.
    setting : callable
        Makes a context manager that surrounds, and is not part of, each timing.
    """

    peer: str
    layout: str
    kind: str
    run: Callable[[int], object]
    result: Callable[[], Result] | None = None
    note: str = ""
    setting: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.peer, self.layout, self.kind)))


def repeated(call: Callable[[], object]) -> Callable[[int], None]:
    """Turn one call into `Contestant.run`."""

    def run(reps: int) -> None:
        for _ in range(reps):
            call()

    return run


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """Uninitialized C-contiguous array whose data starts at a 64-byte boundary."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array: Array = raw[start : start + nbytes].view(dtype).reshape(shape)
    return array


def numpy_dtype(name: str) -> np.dtype[Any]:
    scalar: Any = optional("ml_dtypes").bfloat16 if name == "bfloat16" else name
    dtype: np.dtype[Any] = np.dtype(scalar)
    return dtype


class Problem:
    """Arrays of one shape and dtype.

    Parameters
    ----------
    shape : tuple of int
        (N, C, H, W), or (N, C) for a dense layer.
    dtype : str
        "float32", "float16" or "bfloat16". Parameters and statistics are float32.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str = "float32") -> None:
        self.shape = shape
        self.dense = len(shape) == 2
        self.dtype_name = dtype
        self.dtype = numpy_dtype(dtype)
        N, C = shape[:2]
        H, W = (1, 1) if self.dense else shape[2:]
        self.N, self.C, self.H, self.W = N, C, H, W
        self.nbytes = N * C * H * W * self.dtype.itemsize
        rng = np.random.default_rng(C + 7919 * N)
        self.weight = rng.uniform(0.5, 1.5, C).astype(np.float32)
        self.bias = rng.standard_normal(C).astype(np.float32)
        self.running_mean = rng.uniform(0.2, 0.8, C).astype(np.float32)
        self.running_var = rng.uniform(1.5, 3.0, C).astype(np.float32)
        self._arrays: dict[tuple[str, str], Array] = {}
        self._expected: dict[tuple[str, int], dict[str, Any]] = {}

    @property
    def label(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def layouts(self) -> tuple[str, ...]:
        """Layouts that a user's array of this shape can have; a dense one has no choice."""
        return ("nc",) if self.dense else ("nchw", "nhwc")

    def layout_shape(self, layout: str) -> tuple[int, ...]:
        N, C, H, W = self.N, self.C, self.H, self.W
        return {
            "nc": (N, C),
            "nchw": (N, C, H, W),
            "nhwc": (N, H, W, C),
            "blocked": (N, C // BLOCK, H, W, BLOCK),
        }[layout]

    def empty(self, layout: str) -> Array:
        return aligned_empty(self.layout_shape(layout), self.dtype)

    def out(self, layout: str) -> Array:
        """The output array of a layout, shared by the contestants, which run one at a time."""
        if self.dense and layout in ("nchw", "nhwc"):
            return self.out("nc").reshape(self.layout_shape(layout))
        if ("out", layout) not in self._arrays:
            out = self.empty(layout)
            out[...] = 0  # touch every page before anything is timed
            self._arrays["out", layout] = out
        return self._arrays["out", layout]

    def x(self, layout: str) -> Array:
        return self._input("x", layout, mean=0.5, std=1.5)

    def dy(self, layout: str) -> Array:
        return self._input("dy", layout, mean=0.1, std=1.0)

    def _input(self, name: str, layout: str, mean: float, std: float) -> Array:
        if self.dense and layout in ("nchw", "nhwc"):
            return self._input(name, "nc", mean, std).reshape(self.layout_shape(layout))
        if (name, layout) not in self._arrays:
            array = self.empty(layout)
            if layout in ("nchw", "nc"):
                # Random numbers cost more than all the passes together: a block of a prime length
                # is repeated instead, which lines up with no shape.
                block = np.random.default_rng(len(name)).standard_normal(1_000_003) * std + mean
                array.reshape(-1)[...] = np.resize(block.astype(self.dtype), array.size)
            else:
                plain = self._input(name, "nchw", mean, std)
                if layout == "nhwc":
                    array[...] = plain.transpose(0, 2, 3, 1)
                else:
                    split = plain.reshape(self.N, self.C // BLOCK, BLOCK, self.H, self.W)
                    array[...] = split.transpose(0, 1, 3, 4, 2)
            self._arrays[name, layout] = array
        return self._arrays[name, layout]

    def channel(self, array: Array, layout: str, c: int) -> NDArray[np.float64]:
        """One channel of a tensor, flat, in (n, h, w) order."""
        if layout == "nhwc":
            values = array.reshape(self.layout_shape(layout))[..., c]
        elif layout == "blocked":
            values = array[:, c // BLOCK, :, :, c % BLOCK]
        else:
            values = array.reshape(self.layout_shape("nchw"))[:, c]
        return values.astype(np.float64).reshape(-1)

    @cached_property
    def batch_mean(self) -> NDArray[np.float32]:
        return self._moments[0]

    @cached_property
    def batch_var(self) -> NDArray[np.float32]:
        """Biased variance of each channel."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        x = self.x(self.layouts[0])
        axes = tuple(a for a in range(x.ndim) if a != 1)
        total = np.zeros(self.C)
        squares = np.zeros(self.C)
        # By parts of the batch, to never hold the whole tensor in float64.
        step = max(1, (1 << 21) // max(1, x[0].size))
        for start in range(0, self.N, step):
            part = x[start : start + step].astype(np.float64)
            total += part.sum(axis=axes)
            squares += np.square(part).sum(axis=axes)
        m = self.N * self.H * self.W
        mean = total / m
        return mean.astype(np.float32), (squares / m - mean * mean).astype(np.float32)

    def expected(self, pass_name: str, c: int) -> dict[str, Any]:
        """What channel c of a pass should be, in float64 NumPy."""
        if (pass_name, c) in self._expected:
            return self._expected[pass_name, c]
        train = pass_name.endswith("train")
        layout = self.layouts[0]
        x = self.channel(self.x(layout), layout, c)
        mean = x.mean() if train else float(self.running_mean[c])
        var = x.var() if train else float(self.running_var[c])
        invstd = 1 / np.sqrt(var + EPS)
        x_hat = (x - mean) * invstd
        values: dict[str, Any] = {"mean": mean, "var": var, "invstd": invstd}
        if pass_name.startswith("forward"):
            values["y"] = self.weight[c] * x_hat + self.bias[c]
        else:
            dy = self.channel(self.dy(layout), layout, c)
            dx = dy - dy.mean() - x_hat * (dy * x_hat).mean() if train else dy
            values["dx"] = self.weight[c] * invstd * dx
            values["dweight"] = (dy * x_hat).sum()
            values["dbias"] = dy.sum()
        self._expected[pass_name, c] = values
        return values

    def check(self, pass_name: str, result: Result) -> str:
        """Compare a result with float64 NumPy; return what is wrong, or an empty string."""
        tolerance = 1e-4 if self.dtype_name == "float32" else 3e-2
        m = self.N * self.H * self.W
        for c in sorted({0, 1, self.C // 2, self.C - 1}):
            expected = self.expected(pass_name, c)
            found = {k: self.channel(t, result.layout, c) for k, t in result.tensors.items()}
            found |= {k: v[c] for k, v in result.vectors.items()}
            for key, value in found.items():
                off = np.max(np.abs(value - expected[key]))
                # A sum of m terms is off in proportion to the terms, not to its own value.
                summed = key in ("dweight", "dbias")
                limit = 1e-4 * m if summed else tolerance * (1 + np.max(np.abs(expected[key])))
                if not off <= limit:
                    return f"{key} of channel {c} is off by {off:.3g} (limit {limit:.3g})"
        return ""
