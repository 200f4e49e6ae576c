"""An interpreter of PTX that checks as it runs: see docs/ptx-interpreter.md.

>>> import numpy as np
>>> module = parse('''
... .version 8.0
... .target sm_80
... .address_size 64
... .visible .entry twice(.param .u64 x) {
...     .reg .b32 %r<2>; .reg .f32 %f<3>; .reg .b64 %rd<4>;
...     ld.param.u64 %rd1, [x];
...     mov.u32 %r1, %tid.x;
...     mul.wide.u32 %rd2, %r1, 4;
...     add.s64 %rd3, %rd1, %rd2;
...     ld.global.f32 %f1, [%rd3];
...     add.f32 %f2, %f1, %f1;
...     st.global.f32 [%rd3], %f2;
...     ret;
... }''')
>>> x = np.arange(3, dtype=np.float32)
>>> memory = Memory()
>>> address = memory.register(x, "x")
>>> report = run(module.entries["twice"], 1, 3, [address], memory)
>>> x
array([0., 2., 4.], dtype=float32)
>>> report.sectors["load", 4]
1
"""

from __future__ import annotations

from collections.abc import Sequence

from ptx.machine import Launch
from ptx.memory import Memory
from ptx.parse import Function, Module, Unsupported
from ptx.parse import parse as _parse
from ptx.program import Program
from ptx.report import (
    DivergentBarrier,
    Fault,
    InactiveLane,
    Misaligned,
    OutOfBounds,
    RaceFault,
    ReadOnly,
    Report,
    Uninitialised,
)

__all__ = [
    "DivergentBarrier", "Fault", "Function", "InactiveLane", "Memory", "Misaligned", "Module",
    "OutOfBounds", "RaceFault", "ReadOnly", "Report", "Uninitialised", "Unsupported", "compiled",
    "parse", "run",
]  # fmt: skip


def parse(text: str) -> Module:
    """Parse PTX; `entries` of the result are the kernels by name."""
    return _parse(text)


def compiled(entry: Function) -> Program:
    """The kernel as it is run; knowing all of its instructions is checked here."""
    if entry.program is None:
        entry.program = Program(entry.module, entry)
    return entry.program


def run(
    entry: Function, grid: int | Sequence[int], block: int | Sequence[int], arguments: Sequence,
    memory: Memory, shared_bytes: int = 0, seed: int = 0, check_races: bool = True,
) -> Report:  # fmt: skip
    """Run a kernel on `grid` blocks of `block` threads; raises a `Fault` if it does wrong.

    `arguments` are numbers, of which the parameters' types make what they need; `shared_bytes` is
    the dynamic shared memory. With a `seed` other than 0, blocks run in a random order, and the
    warps of those that run together take turns at random.
    """
    launch = Launch(
        compiled(entry), _three(grid), _three(block), arguments, memory, shared_bytes, seed,
        check_races,
    )  # fmt: skip
    return launch.run()


def _three(size: int | Sequence[int]) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(int(n) for n in size)
    return (*sizes, 1, 1, 1)[:3]
