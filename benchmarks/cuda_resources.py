"""What the CUDA kernels ask of a GPU, found without one.

    python -m benchmarks.cuda_resources                  # all tables
    python -m benchmarks.cuda_resources --dtypes float32 --archs 90

Every kernel is compiled for each architecture; ``ptxas`` says what registers, shared memory and
spills it takes, from which follow the threads that a multiprocessor can hold. The loads of its
bulk loops, counted in the PTX, say how many bytes are on their way at once. Traffic is counted by
the interpreter of PTX in the tests, on batches cut down to what it can run in seconds.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numbabn import layout

ARCHITECTURES = ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0))
DTYPES = ("float32", "float64", "float16", "bfloat16")


class Limits(NamedTuple):
    """Of a multiprocessor: CUDA C++ programming guide, technical specifications."""

    threads: int
    blocks: int
    shared: int  # bytes, all blocks together
    registers: int = 65536
    reserved: int = 1024  # bytes of shared memory that each block takes besides its own


LIMITS = {
    (7, 5): Limits(1024, 16, 64 << 10, reserved=0),
    (8, 0): Limits(2048, 32, 164 << 10),
    (8, 6): Limits(1536, 16, 100 << 10),
    (9, 0): Limits(2048, 32, 228 << 10),
    (10, 0): Limits(2048, 32, 228 << 10),
    (12, 0): Limits(1536, 24, 100 << 10),
}


class Usage(NamedTuple):
    """What ptxas says of a kernel."""

    registers: int
    shared: int
    spilled: int  # bytes of spill stores, spill loads, and stack


class Entry(NamedTuple):
    """A kernel, and how it is launched."""

    make: Any
    block: int
    bounds: tuple[int, int]
    loads: int  # slots of 16 bytes that a thread asks for before it needs the first


@cache
def entries() -> tuple[Entry, ...]:
    """The kernels. Imported here: asv imports this module, and its environments lack numba-cuda."""
    from numbabn.cuda import channels, fused, gradient_sums, gradients, normalization, reductions
    from numbabn.cuda.options import BACKWARD_SLOTS, FORWARD_SLOTS, FUSED_THREADS, THREADS

    bounds, fused_bounds = (THREADS, 4), (FUSED_THREADS, 1)
    return (
        Entry(normalization.normalize_planes, THREADS, bounds, 2),
        Entry(normalization.normalize_columns, THREADS, bounds, 2),
        Entry(reductions.stats_planes, THREADS, bounds, 4),
        Entry(reductions.stats_columns, THREADS, bounds, 2),
        Entry(gradient_sums.backward_sums_planes, THREADS, bounds, 4),
        Entry(gradient_sums.backward_sums_columns, THREADS, bounds, 2),
        Entry(gradients.backward_elements_planes, THREADS, bounds, 4),
        Entry(gradients.backward_elements_columns, THREADS, bounds, 2),
        Entry(fused.forward_planes, FUSED_THREADS, fused_bounds, FORWARD_SLOTS),
        Entry(fused.backward_planes, FUSED_THREADS, fused_bounds, 2 * BACKWARD_SLOTS),
        Entry(channels.finish_stats, 128, bounds, 0),
        Entry(channels.finish_sums, 128, bounds, 0),
        Entry(channels.finish_known, 128, bounds, 0),
        Entry(channels.finish_slopes, 128, bounds, 0),
        Entry(channels.finish_mean, 128, bounds, 0),
    )


def ptxas() -> str:
    """The ptxas of the compiler's own wheel, or one on the path."""
    import importlib.util

    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        found = sorted(Path(folder).glob("**/bin/ptxas"))
        if found:
            return str(found[-1])
    found_on_path = shutil.which("ptxas")
    if found_on_path is None:
        raise SystemExit("ptxas: not found; pip install nvidia-cuda-nvcc")
    return found_on_path


def usage(ptx: str, cc: tuple[int, int]) -> Usage:
    """What the kernel takes on an architecture."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas(), "-v", f"-arch=sm_{cc[0]}{cc[1]}", str(source), "-o", f"{folder}/out"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)

    def number(pattern: str) -> int:
        found = re.search(pattern, done.stderr)
        return int(found[1]) if found else 0

    spilled = sum(map(int, re.findall(r"(\d+) bytes (?:stack|spill)", done.stderr)))
    return Usage(number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), spilled)


def resident_threads(used: Usage, block: int, cc: tuple[int, int]) -> int:
    """Threads of such blocks that a multiprocessor can hold at once."""
    limits = LIMITS[cc]
    warps = -(-block // 32)
    per_warp = -(-used.registers * 32 // 256) * 256  # registers are given out by 256
    blocks = min(
        limits.blocks,
        limits.threads // (warps * 32),
        limits.registers // per_warp // warps,
        limits.shared // (used.shared + limits.reserved) if used.shared else limits.blocks,
    )
    return blocks * warps * 32


class Row(NamedTuple):
    """One kernel on one architecture, over all dtypes."""

    kernel: str
    cc: tuple[int, int]
    registers: int
    shared: int
    spilled: int
    occupancy: float
    in_flight: int


def rows(
    archs: Iterable[tuple[int, int]], dtypes: Iterable[str], wide: bool, named: str
) -> list[Row]:
    """The worst of the dtypes, for every kernel and architecture."""
    from numbabn.cuda import launch

    table = []
    for entry in (entry for entry in entries() if named in entry.make.__name__):
        for cc in archs:
            used = []
            for dtype in dtypes:
                storage = DTYPES.index(dtype)
                variant = launch.kernel(entry.make, storage, True, wide, entry.bounds)
                used.append(usage(variant.ptx(cc), cc))
            threads = min(resident_threads(one, entry.block, cc) for one in used)
            row = Row(
                entry.make.__name__, cc, max(u.registers for u in used),
                max(u.shared for u in used), max(u.spilled for u in used),
                threads / LIMITS[cc].threads, threads * 16 * entry.loads,
            )  # fmt: skip
            table.append(row)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return table


def print_resources(table: list[Row]) -> None:
    print("| kernel | sm | registers | shared memory | spills | occupancy | in flight |")
    print("|---|---|---|---|---|---|---|")
    for row in table:
        flight = f"{row.in_flight / 1024:.0f} KiB" if row.in_flight else "–"
        print(
            f"| {row.kernel} | {row.cc[0]}{row.cc[1]} | {row.registers} | {row.shared} B "
            f"| {row.spilled} B | {row.occupancy:.0%} | {flight} |"
        )


# --- traffic --------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """One pass over one array."""

    launches: int
    dram: float  # sectors that each launch touches, as a multiple of the least possible
    efficiency: float  # bytes asked for, by those of the sectors that requests touch
    wide: float  # share of the bytes that accesses of 16 bytes ask for, in kernels over elements


def _case(shape: tuple[int, ...], columns: bool, dtype: str, training: bool) -> list[Traffic]:
    from importlib import import_module

    from numbabn import cuda

    Device = import_module("cuda_device").Device

    N, C, L = shape
    view = layout.View(columns, N, C, L, None)
    bits = {"float32": np.float32, "float64": np.float64, "float16": np.float16}[dtype]
    rng = np.random.default_rng(0)
    device = Device()
    x, dy = (device.put(rng.standard_normal(N * C * L), bits) for _ in range(2))
    out, dx = (device.put(np.zeros(N * C * L), bits, writable=True) for _ in range(2))
    ones = [device.put(np.ones(C), np.float64, writable=True) for _ in range(4)]
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
        backward(
            dy, x, None, dx, None, view, table, False, np.dtype(np.float64), device.queue
        )  # fmt: skip
    results = []
    for launches, arrays in ((device.launches[:first], 2), (device.launches[first:], 3)):
        reports = [report for *_, report in launches]
        over_elements = [r for kernel, _, _, r in launches if "finish" not in kernel.name]
        # What is per channel is float64 here, and so has a width of its own.
        widths = [(kind, width) for kind in ("load", "store") for width in (16, x.itemsize)]
        least = arrays * N * C * L * x.itemsize
        touched = sum(report.dram_bytes for report in reports)
        asked = sum(r.bytes[key] for r in over_elements for key in widths)
        sectors = 32 * sum(r.sectors[key] for r in over_elements for key in widths)
        wide = sum(r.bytes[kind, 16] for r in over_elements for kind in ("load", "store"))
        results.append(Traffic(len(reports), touched / least, asked / sectors, wide / asked))
    return results


# (C, H·W) of ResNet-50's layers, with a batch that the interpreter can run.
SHAPES = (
    (64, 112 * 112, 2),
    (256, 56 * 56, 4),
    (512, 28 * 28, 16),
    (256, 14 * 14, 32),
    (512, 49, 32),
)


def print_traffic(dtypes: Iterable[str]) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    print("| N × C × H·W | layout | dtype | pass | launches | DRAM ÷ least | sectors | 128-bit |")
    print("|---|---|---|---|---|---|---|---|")
    for C, L, N in SHAPES:
        # Fewer channels: the interpreter runs a few million elements in a minute.
        C = max(32, min(C, (1 << 19) // (N * L) // 32 * 32))
        for where in ("NCHW", "NHWC"):
            shape = (N, C, L) if where == "NCHW" else (N * L, C, 1)
            for dtype in dtypes:
                for training in (False, True):
                    mode = "training" if training else "eval"
                    both = _case(shape, where == "NHWC", dtype, training)
                    for name, one in zip(("forward", "backward"), both, strict=True):
                        print(
                            f"| {N} × {C} × {L} | {where} | {dtype} | {mode} {name} "
                            f"| {one.launches} | {one.dram:.3f} | {one.efficiency:.3f} "
                            f"| {one.wide:.1%} |",
                            flush=True,
                        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--archs", nargs="*", default=[f"{a}{b}" for a, b in ARCHITECTURES])
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES))
    parser.add_argument("--wide", action="store_true", help="64-bit indices")
    parser.add_argument("--kernels", default="", help="only those with this in their name")
    parser.add_argument("--no-traffic", action="store_true")
    parser.add_argument("--no-resources", action="store_true")
    given = parser.parse_args()
    if not given.no_resources:
        archs = [(int(name[:-1]), int(name[-1])) for name in given.archs]
        print_resources(rows(archs, given.dtypes, given.wide, given.kernels))
    if not given.no_traffic:
        print()
        print_traffic([d for d in given.dtypes if d in ("float32", "float16")])


if __name__ == "__main__":
    main()
