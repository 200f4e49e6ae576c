"""oneDNN as a contestant, called from C++: plain, channels-last and blocked layouts.

The harness (onednn_harness.cpp) is built on demand over the system's oneDNN 2.x or 3.x (Debian:
libdnnl-dev), or the one under $ONEDNN_ROOT. Calls are repeated inside C++, as oneDNN's own users
would make them. oneDNN updates no running statistics in training: the caller would.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

from .peers_native import Missing, build, pointer
from .peers_problem import BLOCK, EPS, PASSES, Array, Contestant, Problem, Result

__all__ = ["contestants", "version"]

LAYOUTS = ("nchw", "nhwc", "blocked", "nc")
DTYPES = ("float32", "bfloat16", "float16")


class Buffers(ctypes.Structure):
    """Mirror of the harness's struct: null where a pass does not use an array."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            *("src", "dst", "weight_bias", "mean", "var"),
            *("diff_dst", "diff_src", "diff_weight_bias"),
        )
    )


@cache
def library() -> ctypes.CDLL:
    flags = ["-O2", "-fopenmp"]
    root = os.environ.get("ONEDNN_ROOT")
    folders = [Path(root)] if root else [Path("/usr"), Path("/usr/local")]
    headers = [folder / "include/oneapi/dnnl/dnnl_version.h" for folder in folders]
    found = [header for header in headers if header.exists()]
    if not found:
        raise Missing("no oneDNN headers (Debian: libdnnl-dev; elsewhere set ONEDNN_ROOT)")
    if root:
        flags += [f"-I{root}/include", f"-L{root}/lib", f"-Wl,-rpath,{root}/lib"]
    lib = build("onednn_harness.cpp", [*flags, "-ldnnl"], depends=found[:1])
    lib.bn_error.restype = ctypes.c_char_p
    lib.bn_impl.restype = ctypes.c_char_p
    lib.bn_impl.argtypes = [ctypes.c_void_p]
    lib.bn_create.restype = ctypes.c_void_p
    lib.bn_create.argtypes = [
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int),
        *(ctypes.POINTER(ctypes.c_int64), ctypes.c_int),
        *(ctypes.c_float, ctypes.POINTER(Buffers)),
    ]
    lib.bn_run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    lib.bn_destroy.argtypes = [ctypes.c_void_p]
    return lib


def version() -> str:
    numbers = [ctypes.c_int() for _ in range(3)]
    library().bn_version(*map(ctypes.byref, numbers))
    return ".".join(str(n.value) for n in numbers)


class Primitive:
    """One oneDNN primitive and the arrays that it reads and writes."""

    def __init__(self, problem: Problem, pass_name: str, layout: str, threads: int) -> None:
        self.problem, self.layout, self.threads = problem, layout, threads
        backward = pass_name.startswith("backward")
        C = problem.C
        weight_bias = np.concatenate([problem.weight, problem.bias])
        if pass_name == "forward_train":
            mean, var = np.zeros(C, np.float32), np.zeros(C, np.float32)
        elif pass_name == "backward_train":
            mean, var = problem.batch_mean.copy(), problem.batch_var.copy()
        else:
            mean, var = problem.running_mean.copy(), problem.running_var.copy()
        self.mean, self.var = mean, var
        self.diff_weight_bias = np.zeros(2 * C, np.float32)
        out = problem.out(layout)
        arrays: list[Array | None] = [problem.x(layout), None if backward else out]
        arrays += [weight_bias, mean, var]
        arrays += [problem.dy(layout), out] if backward else [None, None]
        arrays += [self.diff_weight_bias]
        self.arrays = arrays  # the harness holds bare pointers, so this keeps them alive
        buffers = Buffers(*map(pointer, arrays))
        self.lib = library()
        self.handle = self.lib.bn_create(
            PASSES.index(pass_name),
            LAYOUTS.index(layout),
            DTYPES.index(problem.dtype_name),
            (ctypes.c_int64 * 4)(problem.N, C, problem.H, problem.W),
            *(2 if layout == "nc" else 4, EPS),
            ctypes.byref(buffers),
        )
        if not self.handle:
            raise Missing(self.lib.bn_error().decode())

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.lib.bn_destroy(self.handle)

    @property
    def impl(self) -> str:
        name: bytes = self.lib.bn_impl(self.handle)
        return name.decode()

    def run(self, reps: int) -> None:
        if self.lib.bn_run(self.handle, reps, self.threads) != 0:
            raise RuntimeError(self.lib.bn_error().decode())

    def result_of(self, pass_name: str) -> Callable[[], Result]:
        C = self.problem.C

        def result() -> Result:
            self.run(1)
            out = self.problem.out(self.layout).astype(np.float32, copy=False)
            if pass_name.startswith("forward"):
                vectors = {"mean": self.mean, "var": self.var} if "train" in pass_name else {}
                return Result(self.layout, {"y": out}, vectors)
            vectors = {"dweight": self.diff_weight_bias[:C], "dbias": self.diff_weight_bias[C:]}
            return Result(self.layout, {"dx": out}, vectors)

        return result


def contestants(problem: Problem, pass_name: str, threads: int) -> Iterator[Contestant]:
    for layout in (*problem.layouts, "blocked"):
        if layout == "blocked" and problem.C % BLOCK:
            continue
        primitive = Primitive(problem, pass_name, layout, threads)
        yield Contestant(
            *("onednn", layout, "out", primitive.run, primitive.result_of(pass_name)),
            note=primitive.impl,
        )
