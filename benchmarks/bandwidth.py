"""The machine's own memory bandwidth, measured by C++ (bandwidth_harness.cpp) with no Numba in it.

    python -m benchmarks.bandwidth

prints read, copy and triad bandwidth, with ordinary and with streaming stores, over a range of
sizes. benchmarks/peers.py runs the same probes among its contestants, on the very arrays of each
cell, so that a cell's roofline is what memory gave in those seconds and at that size.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Iterator
from functools import cache

from .peers_machine import available_cpus
from .peers_native import build, pointer
from .peers_problem import Array, Contestant, aligned_empty
from .peers_timing import race

__all__ = ["PROBES", "probes"]

# Probe → number of arrays read, number written.
PROBES = {
    "read": (1, 0),
    "copy": (1, 1),
    "copy_streaming": (1, 1),
    "triad": (2, 1),
    "triad_streaming": (2, 1),
}
# One 64-byte line, the probes' unit, in floats.
LINE = 16


@cache
def library() -> ctypes.CDLL:
    return build("bandwidth_harness.cpp", ["-O3", "-march=native", "-fopenmp"])


def probe(name: str, arrays: tuple[Array, ...], floats: int, threads: int) -> Contestant:
    function = getattr(library(), f"bw_{name}")
    pointers = [pointer(a) for a in arrays]
    size, count = ctypes.c_int64(floats // LINE * LINE), ctypes.c_int(threads)

    def run(reps: int) -> None:
        # Arrays are named so that they live as long as the probe does.
        assert arrays
        function(*pointers, size, ctypes.c_int64(reps), count)

    return Contestant("memory", "", name, run)


def probes(first: Array, second: Array, out: Array, threads: int) -> Iterator[Contestant]:
    """The probes over three arrays of the same number of bytes.

    Parameters
    ----------
    first, second : array
        What is read; any dtype, C-contiguous, 64-byte aligned.
    out : array
        What is written by the probes that write.
    threads : int
        OpenMP threads.
    """
    floats = first.nbytes // 4
    sums = aligned_empty((threads * LINE,), "float32")
    inputs = (first, second)
    for name, (reads, writes) in PROBES.items():
        yield probe(name, (*inputs[:reads], out if writes else sums), floats, threads)


def gigabytes_per_second(name: str, nbytes: int, seconds: float) -> float:
    """Bytes moved by a probe over arrays of so many bytes, per second, in 1e9."""
    return sum(PROBES[name]) * nbytes / seconds / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=available_cpus())
    threads: int = parser.parse_args().threads
    print(f"GB/s with {threads} threads\n{'array':>10}", *(f"{p:>16}" for p in PROBES))
    for kilobytes in (64, 256, 1024, 4096, 8192, 25_690, 102_760, 205_520):
        arrays = [aligned_empty((kilobytes * 250,), "float32") for _ in range(3)]
        for array in arrays:
            array[...] = 1
        timings = race(list(probes(arrays[0], arrays[1], arrays[2], threads)), budget=1.0)
        speeds = (
            gigabytes_per_second(p, arrays[0].nbytes, timings[f"memory {p}"].typical)
            for p in PROBES
        )
        print(f"{kilobytes / 1000:7.2f} MB", *(f"{s:16.1f}" for s in speeds))


if __name__ == "__main__":
    main()
