"""What the CUDA kernels read and write, counted by the interpreter of PTX in the tests.

It runs ResNet-50's layers, those of large planes cut down to what it can do in seconds. What a pass
moves is its large arrays, sums of chunks, and a few numbers for each channel, so what it moves for
the whole layers follows from the plans: `expected`, which the tests compare with what is counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numbabn import layout

BATCH = 32  # of whole layers
# (C, H·W) of ResNet-50's layers, with a batch that the interpreter can run.
SHAPES = (
    (64, 112 * 112, 2),
    (256, 56 * 56, 4),
    (512, 28 * 28, 16),
    (256, 14 * 14, BATCH),
    (512, 49, BATCH),
)
MOST_COUNTED = 1 << 21  # elements; the interpreter does them in some ten seconds
PASSES = ("eval forward", "eval backward", "training forward", "training backward")


class Traffic(NamedTuple):
    """One pass over one array."""

    launches: int
    dram: float  # sectors that each launch touches, as a multiple of the least possible
    efficiency: float  # bytes asked for, by those of the sectors that requests touch
    wide: float  # share of the bytes that accesses of 16 bytes ask for, in kernels over elements


def view_of(N: int, C: int, L: int, where: str) -> layout.View:
    """An image batch in NCHW or NHWC."""
    shape = (False, N, C, L) if where == "NCHW" else (True, N * L, C, 1)
    return layout.View(*shape, None)


def counted(view: layout.View, dtype: str, training: bool) -> list[Traffic]:
    """The forward and the backward pass of one mode, run by the interpreter."""
    from numbabn import cuda

    device = import_module("cuda_device").Device()
    size, C = view.N * view.C * view.L, view.C
    rng = np.random.default_rng(0)
    x, dy = (device.put(rng.standard_normal(size), dtype) for _ in range(2))
    out, dx = (device.put(np.zeros(size), dtype, writable=True) for _ in range(2))
    # What is per channel is float64 here, and so has a width of its own.
    ones = (device.put(np.ones(C), np.float64, writable=True) for _ in range(4))
    weight, bias, mean, var = ones
    with device.running():
        if training:
            table = cuda.forward_train(
                x, None, None, out, view, weight, bias, mean, var, 0.1, 1e-5, False, device.queue
            )
        else:
            table = cuda.forward_eval(
                x, None, None, out, view, weight, bias, mean, var, 1e-5, False, device.queue
            )
        first = len(device.launches)
        backward = cuda.backward_train if training else cuda.backward_eval
        backward(dy, x, None, dx, None, view, table, False, np.dtype(np.float64), device.queue)
    return [
        _traffic(launches, arrays * size * x.itemsize, x.itemsize)
        for launches, arrays in ((device.launches[:first], 2), (device.launches[first:], 3))
    ]


def _traffic(launches: list[Any], least: int, itemsize: int) -> Traffic:
    over_elements = [r for kernel, _, _, r in launches if "finish" not in kernel.name]
    widths = [(kind, width) for kind in ("load", "store") for width in (16, itemsize)]
    touched = sum(report.dram_bytes for *_, report in launches)
    asked = sum(r.bytes[key] for r in over_elements for key in widths)
    sectors = 32 * sum(r.sectors[key] for r in over_elements for key in widths)
    wide = sum(r.bytes[kind, 16] for r in over_elements for kind in ("load", "store"))
    return Traffic(len(launches), touched / least, asked / sectors, wide / asked)


def expected(view: layout.View, itemsize: int) -> dict[str, tuple[float, bool]]:
    """`Traffic.dram` of each pass, as the plan has it, and whether the pass is fused.

    What each launch reads and writes is added up: arrays, numbers per channel, float64 like the
    statistics here, and sums of chunks, which one launch writes and the next one reads.
    """
    from numbabn.cuda.plans import plan

    how = plan(view, itemsize)
    array, number = view.N * view.C * view.L * itemsize, 8 * view.C
    chunks = 2 * how.chunks * view.C
    moments, pairs = 4 * 8 * chunks, 2 * (4 if itemsize == 2 else 8) * chunks
    # Weight, bias and running statistics are read and the table's five rows written, and so on.
    total = {
        "eval forward": 2 * array + (4 + 5) * number,
        "eval backward": 3 * array + pairs + (4 + 2 + 2) * number,
        "training forward": 3 * array + moments + (4 + 2 + 5 + 3) * number,
        "training backward": 5 * array + pairs + (4 + 2 + 2 + 3 + 6) * number,
    }
    fused = dict.fromkeys(PASSES, False)
    if how.fused(backward=False):
        fused["training forward"] = True
        total["training forward"] = 2 * array + (4 + 2 + 5) * number
    if how.fused(backward=True):
        fused["training backward"] = True
        total["training backward"] = 3 * array + (5 + 2) * number
    least = {name: (2 if "forward" in name else 3) * array for name in PASSES}
    return {name: (total[name] / least[name], fused[name]) for name in PASSES}


def print_counted(dtypes: Iterable[str]) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    print("| N × C × H·W | layout | dtype | pass | launches | DRAM ÷ least | sectors | 128-bit |")
    print("|---|---|---|---|---|---|---|---|")
    for C, L, N in SHAPES:
        C = min(C, MOST_COUNTED // (N * L) // 32 * 32)
        for where in ("NCHW", "NHWC"):
            for dtype in dtypes:
                for training in (False, True):
                    both = counted(view_of(N, C, L, where), dtype, training)
                    for name, one in zip(PASSES[2 * training :], both, strict=False):
                        print(
                            f"| {N} × {C} × {L} | {where} | {dtype} | {name} | {one.launches} "
                            f"| {one.dram:.3f} | {one.efficiency:.3f} | {one.wide:.1%} |",
                            flush=True,
                        )


def print_whole_layers() -> None:
    print(f"| N × C × H·W | layout | dtype | {' | '.join(PASSES)} |")
    print("|---|---|---|" + "---|" * len(PASSES))
    for C, L, _ in SHAPES:
        for where in ("NCHW", "NHWC"):
            for dtype, itemsize in (("float32", 4), ("float16", 2)):
                found = expected(view_of(BATCH, C, L, where), itemsize)
                shown = (f"{n:.3f}{' (fused)' if fused else ''}" for n, fused in found.values())
                print(f"| {BATCH} × {C} × {L} | {where} | {dtype} | {' | '.join(shown)} |")
