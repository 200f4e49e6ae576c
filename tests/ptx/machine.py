"""Launches: blocks of threads in batches, their shared memory, and their barriers.

The default is one group for all threads of a batch of thread blocks, which makes the arrays long.
With a seed, the warps of a batch are dealt out to several groups, and these take turns at random.
"""

from __future__ import annotations

import numpy as np

from ptx.group import WARP, Group
from ptx.memory import Buffer, Memory, Region, Space
from ptx.parse import SIZES, Instruction, Variable
from ptx.program import Program
from ptx.races import BLOCK_BITS, Shadow
from ptx.registers import dtype_of
from ptx.report import DivergentBarrier, Report

GAP = 64  # bytes between variables, to notice when one is overrun
LANES = 8192  # of a batch of thread blocks
GROUPS = 4  # of a batch, with a seed
MOST_BLOCKS_A_TURN = 24  # basic blocks that a group runs before another may, with a seed


class Batch:
    """Thread blocks that run at the same time."""

    def __init__(self, launch: Launch, blocks: np.ndarray):
        self.launch, self.blocks = launch, blocks
        self.shared_stride = -(-launch.shared_bytes // 128) * 128
        data = np.full(self.shared_stride * blocks.size, 0xFF, np.uint8)
        buffer, shared = Buffer(data, 0), Space("shared")
        for name, base, size in launch.shared_variables:
            shared.add(Region(name, base, size, buffer))
        self.spaces = {
            "global": launch.memory.space, "const": launch.memory.space, "shared": shared,
            "local": Space("local"), "param": Space("param"),
        }  # fmt: skip
        rows = np.repeat(np.arange(blocks.size), launch.threads)
        threads = np.tile(np.arange(launch.threads), blocks.size)
        self.groups = [Group(self, rows[p], threads[p]) for p in self._deal(rows, threads)]

    def _deal(self, rows: np.ndarray, threads: np.ndarray) -> list[np.ndarray]:
        """Positions of the threads of each group."""
        if self.launch.random is None:
            return [np.arange(rows.size)]
        warp = rows * WARP + (threads >> 5)
        groups = self.launch.random.integers(0, GROUPS, warp[-1] + 1)[warp]
        return [np.flatnonzero(groups == g) for g in np.unique(groups)]

    def run(self) -> None:
        random = self.launch.random
        while True:
            ready = [group for group in self.groups if group.ready]
            if not ready:
                if not self._pass_barriers():
                    return
            elif random is None:
                ready[0].run(-1)
            else:
                group = ready[int(random.integers(len(ready)))]
                group.run(int(random.integers(1, MOST_BLOCKS_A_TURN)))

    def _pass_barriers(self) -> bool:
        """Let those go on whose barrier is complete; False if nobody waits."""
        many = self.blocks.size
        alive = sum(np.bincount(g.rows[g.live], minlength=many) for g in self.groups)
        arrived: dict[tuple[int, int], np.ndarray] = {}
        for group in self.groups:
            for block, key, lanes in group.waiting:
                here = np.bincount(group.rows[lanes], minlength=many)
                arrived[id(block), key] = arrived.get((id(block), key), 0) + here
        if not arrived:
            return False
        passed = False
        for group in self.groups:
            waiting, group.waiting = group.waiting, []
            for block, key, lanes in waiting:
                expected = (key & 0xFFFFFFFF) or alive
                complete = arrived[id(block), key] == expected
                go = lanes & complete[group.rows]
                if go.any():
                    passed = True
                    group.release(block, go)
                if (lanes & ~go).any():
                    group.waiting.append((block, key, lanes & ~go))
        self.launch.tick(None)  # after the time that the threads passed at
        for (_, key), here in arrived.items():
            expected = (key & 0xFFFFFFFF) or alive
            self.launch.report.barriers += int(np.count_nonzero((here == expected) & (here > 0)))
        if not passed:
            group = next(group for group in self.groups if group.waiting)
            block, _, lanes = group.waiting[0]
            lane = int(np.flatnonzero(lanes)[0])
            row = group.rows[lane]
            others = {f"line {b.end.line}" for g in self.groups for b, _, w in g.waiting
                      if b is not block and w[g.rows == row].any()}  # fmt: skip
            where = f"wait at {', '.join(sorted(others))}" if others else "do not come"
            raise group.fault(
                DivergentBarrier, block.end, lane, f"waits, but other threads of its block {where}"
            )
        return True


class Launch:
    """One launch of a kernel."""

    def __init__(
        self, program: Program, grid: tuple[int, int, int], block: tuple[int, int, int],
        arguments, memory: Memory, shared_bytes: int, seed: int, check_races: bool,
    ):  # fmt: skip
        self.program, self.grid, self.block, self.memory = program, grid, block, memory
        self.threads = block[0] * block[1] * block[2]
        most = program.entry.most_threads or 1024
        if not 1 <= self.threads <= min(most, 1024) or min(grid) < 1:
            raise ValueError(f"{grid} blocks of {block} threads: at most {most} threads in a block")
        self.check_races = check_races
        self.random = np.random.default_rng(seed) if seed else None
        self.report = Report()
        self.time, self.history = 0, []
        for region in memory.space.regions:
            region.touched, region.buffer.shadow = {}, None
        self.registers: list[np.ndarray | None] = [None] * len(program.slots.dtypes)
        for slot, value in program.slots.constants.items():
            self.registers[slot] = value
        self._place_variables(shared_bytes)
        self._set_parameters(arguments)

    def _place_variables(self, dynamic: int) -> None:
        symbols = self.program.slots.symbols
        ends = {"shared": 0, "local": 0}
        found: dict[str, list[tuple[str, int, int]]] = {"shared": [], "local": []}
        # Names are declared again where another call has a parameter of that name.
        variables: dict[str, Variable] = {}
        for v in [*self.program.module.variables, *self.program.flow.variables]:
            variables.setdefault(v.name, v)
        for v in sorted(
            variables.values(), key=lambda v: v.size is None
        ):  # dynamic shared memory is last
            space = "local" if v.space == "param" else v.space
            if space in ends:
                base = -(-ends[space] // v.align) * v.align
                size = dynamic if v.size is None else v.size
                if v.size is not None:  # all arrays of dynamic shared memory are one
                    ends[space] = base + size + GAP
                if size:
                    found[space].append((v.name, base, size))
            elif v.name in symbols:
                base = self.memory.variable(self.program.module, v)
            if v.name in symbols:
                self.registers[symbols[v.name]] = np.full(1, base, np.uint64)
        self.shared_variables, self.local_variables = found["shared"], found["local"]
        self.shared_bytes = max((base + size for _, base, size in found["shared"]), default=0)
        self.local_bytes = -(-ends["local"] // 16) * 16
        unknown = [n for n, slot in symbols.items() if self.registers[slot] is None]
        if unknown:
            raise ValueError(f"unknown names: {', '.join(unknown)}")

    def _set_parameters(self, arguments) -> None:
        params = self.program.entry.params
        if len(arguments) != len(params):
            raise ValueError(f"{len(arguments)} arguments for {len(params)} parameters")
        data = {}
        for param, argument in zip(params, arguments, strict=True):
            if isinstance(argument, bytes):
                data[param.name] = argument.ljust(param.size, b"\0")
                continue
            kind = param.type if SIZES[param.type] == param.size else f"b{8 * param.size}"
            dtype = dtype_of(kind)
            if dtype.kind in "ui":
                bits = int(argument) % (1 << (8 * dtype.itemsize))
                data[param.name] = bits.to_bytes(dtype.itemsize, "little")
            else:
                data[param.name] = np.array(argument, dtype).tobytes()
        for slot, name, offset, dtype in self.program.param_slots:
            self.registers[slot] = np.frombuffer(data[name], dtype, 1, offset)

    def shadow(self, buffer: Buffer) -> Shadow:
        """What is known about the accesses to a buffer in this launch."""
        if buffer.shadow is None:
            buffer.shadow = Shadow(buffer.data.size)
        return buffer.shadow

    def tick(self, instruction: Instruction | None) -> None:
        self.history.append(instruction)
        self.time += 1

    def order(self, count: int) -> np.ndarray:
        """The order in which `count` threads do what only one can do at a time."""
        return np.arange(count) if self.random is None else self.random.permutation(count)

    def thread_name(self, number: int) -> str:
        """Block and thread, as CUDA numbers them."""

        def place(n, size):
            return n % size[0], n // size[0] % size[1], n // (size[0] * size[1])

        block, thread = number >> BLOCK_BITS, number & ((1 << BLOCK_BITS) - 1)
        return f"block {place(block, self.grid)} thread {place(thread, self.block)}"

    def run(self) -> Report:
        total = self.grid[0] * self.grid[1] * self.grid[2]
        order = np.arange(total) if self.random is None else self.random.permutation(total)
        at_once = max(1, LANES // self.threads)
        with np.errstate(all="ignore"):
            for first in range(0, total, at_once):
                Batch(self, np.sort(order[first : first + at_once])).run()
        for region in self.memory.space.regions:
            for kind, sectors in region.touched.items():
                count = int(np.count_nonzero(sectors))
                self.report.first_touch[kind] += count
                self.report.by_array[kind, region.name] += count
        return self.report
