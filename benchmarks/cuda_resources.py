"""What the CUDA kernels ask of a GPU, found without one.

    python -m benchmarks.cuda_resources                  # all tables
    python -m benchmarks.cuda_resources --dtypes float32 --archs 90

Every kernel is compiled for each architecture; ``ptxas`` says what registers, shared memory and
spills it takes, from which follow the threads that a multiprocessor can hold. How many bytes are on
their way at once is read from the machine code (see `cuda_loads`). Traffic is counted by the
interpreter of PTX in the tests (see `cuda_traffic`).

``ptxas`` and ``nvdisasm`` come with ``pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import cuda_loads, cuda_traffic

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
    in_flight: int  # bytes that a thread has asked for at once


class Entry(NamedTuple):
    """A kernel, and how it is launched."""

    make: Any
    block: int
    bounds: tuple[int, int]


@cache
def entries() -> tuple[Entry, ...]:
    """All kernels: what makes them is known by its arguments.

    Imported here: asv imports this module, and its environments lack numba-cuda.
    """
    from numbabn import cuda
    from numbabn.cuda.options import FUSED_THREADS, THREADS

    found = []
    for file in pkgutil.iter_modules(cuda.__path__):
        module = importlib.import_module(f"{cuda.__name__}.{file.name}")
        for make in vars(module).values():
            if not inspect.isfunction(make) or make.__module__ != module.__name__:
                continue
            if tuple(inspect.signature(make).parameters) == ("storage", "aligned", "wide"):
                whole = file.name.startswith("fused")
                threads = FUSED_THREADS if whole else 128 if file.name == "channels" else THREADS
                found.append(Entry(make, threads, (threads, 1) if whole else (THREADS, 4)))
    return tuple(found)


@cache
def find(name: str) -> str | None:
    """A program of the CUDA toolkit: from a wheel beside the compiler's, or on the path."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        found = sorted(Path(folder).glob(f"**/bin/{name}"))
        if found:
            return str(found[-1])
    return shutil.which(name)


def tool(name: str) -> str:
    """The same, or an error that says what to install."""
    found = find(name)
    if found is None:
        raise SystemExit(f"{name}: not found; pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm")
    return found


def assemble(ptx: str, cc: tuple[int, int]) -> tuple[str, str]:
    """What ptxas says of a kernel, and its machine code as text."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [tool("ptxas"), "-v", f"-arch=sm_{cc[0]}{cc[1]}", str(source), "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        command = [tool("nvdisasm"), "-c", str(result)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return done.stderr, code


# Without these a call has the fewest loads: their kernels ask for more when they are given.
OPTIONS = ("residual", "bits", "grad_residual")


def usage(ptx: str, cc: tuple[int, int], parameters: tuple[str, ...] = ()) -> Usage:
    """What a kernel takes on an architecture; `parameters` are the names of its arguments."""
    said, code = assemble(ptx, cc)
    in_flight = cuda_loads.in_flight(code)
    if in_flight and set(OPTIONS) & set(parameters):
        _, plain = assemble(cuda_loads.without(ptx, parameters, OPTIONS), cc)
        in_flight = min(in_flight, cuda_loads.in_flight(plain))

    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        return int(found[1]) if found else 0

    spilled = sum(map(int, re.findall(r"(\d+) bytes (?:stack|spill)", said)))
    spilled += len(re.findall(r"__local_depot", ptx))
    return Usage(number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), spilled, in_flight)


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


Variant = tuple[str, bool, bool]  # dtype, whether aligned, whether indices have 64 bits


def generation(cc: tuple[int, int]) -> tuple[int, int]:
    """The first architecture for which Numba writes the same PTX, but for the target's name."""
    return (7, 5) if cc < (10, 0) else (10, 0)


def retarget(ptx: str, cc: tuple[int, int]) -> str:
    """PTX of one architecture for another one of its generation."""
    return re.sub(r"(?m)^\.target sm_\d+", f".target sm_{cc[0]}{cc[1]}", ptx)


def kernel_rows(
    number: int, archs: tuple[tuple[int, int], ...], variants: tuple[Variant, ...]
) -> list[Row]:
    """The worst of a kernel's variants, on each architecture of a generation."""
    from numbabn.cuda import launch

    entry = entries()[number]
    used: dict[tuple[int, int], list[Usage]] = {cc: [] for cc in archs}
    flights: dict[tuple[int, int], list[int]] = {cc: [] for cc in archs}
    for dtype, aligned, wide in variants:
        kernel = launch.kernel(entry.make, DTYPES.index(dtype), aligned, wide, entry.bounds)
        ptx = kernel.ptx(generation(archs[0]))
        for cc in archs:
            one = usage(retarget(ptx, cc), cc, tuple(kernel.py_func.__annotations__))
            used[cc].append(one)
            if aligned:
                flights[cc].append(resident_threads(one, entry.block, cc) * one.in_flight)
    return [
        Row(
            entry.make.__name__, cc, max(u.registers for u in all_), max(u.shared for u in all_),
            max(u.spilled for u in all_),
            min(resident_threads(u, entry.block, cc) for u in all_) / LIMITS[cc].threads,
            min(flights[cc]),
        )
        for cc, all_ in used.items()
    ]  # fmt: skip


def rows(
    archs: Iterable[tuple[int, int]], variants: tuple[Variant, ...], named: str, jobs: int
) -> Iterable[Row]:
    """`kernel_rows` for every kernel and architecture."""
    wanted = [n for n, entry in enumerate(entries()) if named in entry.make.__name__]
    groups = [tuple(group) for _, group in groupby(sorted(archs), generation)]
    numbers, places = zip(*product(wanted, groups), strict=True)
    with ProcessPoolExecutor(jobs) as pool:
        for found in pool.map(kernel_rows, numbers, places, [variants] * len(numbers)):
            yield from found


def print_resources(table: Iterable[Row]) -> None:
    print("| kernel | sm | registers | shared memory | spills | occupancy | in flight |")
    print("|---|---|---|---|---|---|---|")
    for row in table:
        flight = f"{row.in_flight / 1024:.0f} KiB" if row.in_flight else "–"
        print(
            f"| {row.kernel} | {row.cc[0]}{row.cc[1]} | {row.registers} | {row.shared} B "
            f"| {row.spilled} B | {row.occupancy:.0%} | {flight} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--archs", nargs="*", default=[f"{a}{b}" for a, b in ARCHITECTURES])
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES))
    parser.add_argument(
        "--every", action="store_true", help="variants for 64-bit indices and other addresses, too"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--kernels", default="", help="only those with this in their name")
    parser.add_argument("--no-traffic", action="store_true")
    parser.add_argument("--no-resources", action="store_true")
    given = parser.parse_args()
    if not given.no_resources:
        archs = [(int(name[:-1]), int(name[-1])) for name in given.archs]
        also = (True, False) if given.every else (True,)
        widths = (False, True) if given.every else (False,)
        variants = tuple(product(given.dtypes, also, widths))
        print_resources(rows(archs, variants, given.kernels, given.jobs))
    if not given.no_traffic:
        print()
        cuda_traffic.print_counted([d for d in given.dtypes if d in ("float32", "float16")])
        print()
        cuda_traffic.print_whole_layers()


if __name__ == "__main__":
    main()
