"""The machine: kernels made ready to run, groups of warps that run them, barriers, and launches.

A `Group` is a set of warps that run in lock step as far as their branches allow: it has the
register file, and knows which of its threads are at which block of the program. The default is one
group for all threads of a batch of thread blocks, which makes the arrays long. With a seed, the
warps of a batch are dealt out to several groups, and these take turns at random.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ptx.access import MEMORY_INSTRUCTIONS
from ptx.flow import Flow, make_flow, reads_and_writes
from ptx.instructions import Modifiers, Slots, compute, dtype_of
from ptx.memory import Buffer, Memory, Region, Space
from ptx.parse import SIZES, Function, Instruction, Module
from ptx.races import BLOCK_BITS, Shadow
from ptx.report import DivergentBarrier, Fault, Report, Uninitialised
from ptx.warps import WARP_INSTRUCTIONS

WARP = 32
LANES = 4096  # of a batch of thread blocks
GROUPS = 4  # of a batch, with a seed
MOST_BLOCKS_A_TURN = 24  # basic blocks that a group runs before another may, with a seed

_IGNORED = ("membar", "fence", "prefetch", "prefetchu")  # they order or hurry, and change nothing


@dataclass
class Step:
    """One instruction, compiled: either a value for a register, or something to execute."""

    instruction: Instruction
    slot: int = -1
    function: object = None
    execute: object = None
    keep: bool = False  # whether threads that are elsewhere still need the register's old value
    guard: tuple | None = None
    reads: tuple[int, ...] = ()  # registers that may not have been written yet
    writes: tuple[int, ...] = ()


@dataclass
class CodeBlock:
    steps: list[Step]
    plain: bool  # no step has a guard or doubtful registers
    end: Instruction | None
    guard: tuple | None  # of the branch
    barrier: tuple | None  # functions that read its number, and how many threads it waits for
    taken: int
    following: int
    doubtful: tuple[int, ...]


class Program:
    """A kernel, compiled to functions over arrays of lanes."""

    def __init__(self, module: Module, entry: Function):
        self.entry, self.module = entry, module
        self.flow: Flow = make_flow(module, entry)
        self.slots = Slots(self.flow.registers)
        self.params = {variable.name: variable for variable in entry.params}
        self.param_slots: list[tuple[int, str, int, np.dtype]] = []
        self.kept = {
            slot for name, slot in self.slots.number.items() if name not in self.flow.temporary
        }
        self.blocks = [self._block(block) for block in self.flow.blocks]

    def _guard(self, instruction: Instruction):
        if instruction.guard is None:
            return None
        name, wanted = instruction.guard
        return self.slots.number[name], wanted

    def _doubtful(self, names) -> tuple[int, ...]:
        return tuple({self.slots.number[n] for n in names if n in self.flow.doubtful})

    def _block(self, block) -> CodeBlock:
        steps = [step for i in block.instructions for step in self._steps(i)]
        end, barrier = block.end, None
        if end is not None and end.opcode in ("bar", "barrier"):
            m = Modifiers(end)
            m.take("cta")
            m.need("sync")
            m.take("aligned")
            m.done()
            if end.guard:
                raise end.unsupported("barrier under a predicate")
            barrier = tuple(self.slots.reader(o, np.dtype("u4")) for o in end.operands)
        elif end is not None:
            m = Modifiers(end)
            m.take("uni")
            m.done()
        reads = reads_and_writes(end, self.flow.registers)[0] if end else ()
        plain = not any(step.guard or step.reads or step.writes for step in steps)
        return CodeBlock(
            steps, plain, end, self._guard(end) if end else None, barrier, block.taken,
            block.following, self._doubtful(reads),
        )  # fmt: skip

    def _steps(self, instruction: Instruction) -> list[Step]:
        op, first = instruction.opcode, instruction.modifiers[:1]
        if op in _IGNORED:
            return []
        guard = self._guard(instruction)
        names = reads_and_writes(instruction, self.flow.registers)
        reads, writes = map(self._doubtful, names)
        m = Modifiers(instruction)
        try:
            if op == "ld" and first == ("param",) and instruction.operands[1].base in self.params:
                pairs = self._parameter(instruction)
            elif op in MEMORY_INSTRUCTIONS:
                execute = MEMORY_INSTRUCTIONS[op](instruction, self.slots, m)
                return [Step(instruction, -1, None, execute, True, guard, reads, writes)]
            elif op in WARP_INSTRUCTIONS:
                execute = WARP_INSTRUCTIONS[op](instruction, self.slots, m)
                return [Step(instruction, -1, None, execute, True, guard, reads, writes)]
            else:
                pairs = compute(instruction, self.slots)
        except (KeyError, ValueError) as error:
            raise instruction.unsupported(repr(error)) from error
        return [
            Step(instruction, slot, function, None, slot in self.kept, guard, reads, writes)
            for slot, function in pairs
        ]

    def _parameter(self, instruction: Instruction):
        m = Modifiers(instruction)
        m.need("param")
        dtype = dtype_of(m.type())
        m.done()
        target, address = instruction.operands
        slot, convert = self.slots.result(target, dtype)
        source = self.slots._new((address, dtype.str), dtype)
        self.param_slots.append((source, address.base, address.offset, dtype))
        if convert:
            return [(slot, lambda R: convert(R[source]))]
        return [(slot, lambda R: R[source])]


class Group:
    """Warps that run together."""

    def __init__(self, batch: Batch, rows: np.ndarray, threads: np.ndarray):
        """Threads `threads` of the blocks at `rows` of the batch; whole warps, in order."""
        launch = batch.launch
        self.batch, self.launch, self.program = batch, launch, launch.program
        self.size = rows.size
        self.rows, self.threads = rows, threads
        self.ids = (batch.blocks[rows] << BLOCK_BITS) + threads
        warp = self.ids >> 5
        self.warp_starts = np.flatnonzero(np.diff(warp, prepend=-1))
        self.warps = self.warp_starts.size
        lengths = np.diff(self.warp_starts, append=self.size)
        self.warp_of = np.repeat(np.arange(self.warps), lengths)
        self.warp_size = lengths[self.warp_of]
        self.warp_key = self.warp_of.astype(np.uint64) << np.uint64(48)
        self.lane = (threads & 31).astype(np.uint32)
        self.lane_bit = np.uint32(1) << self.lane
        self.block_since = np.full(self.size, -1)
        self.warp_since = np.full(self.size, -1)
        self.live = np.ones(self.size, bool)
        self.ready: dict[int, tuple[np.ndarray | None, int]] = {0: (None, self.size)}
        self.waiting: list[tuple[CodeBlock, int, np.ndarray]] = []  # at a barrier, its number
        self.shuffles: dict[object, tuple] = {}
        self.written: dict[int, np.ndarray] = {}
        local = launch.local_bytes
        self.spaces = dict(batch.spaces)
        self.strides = {"shared": rows * batch.shared_stride}
        if local:
            lanes = np.arange(self.size) * local
            self.strides |= {"local": lanes, "param": lanes}
            data = Buffer(np.full(local * self.size, 0xFF, np.uint8), 0)
            space = Space("local")
            for name, base, size in launch.local_variables:
                space.add(Region(name, base, size, data))
            self.spaces |= {"local": space, "param": space}
        self.R = list(launch.registers)
        self._fill_special()

    def _fill_special(self) -> None:
        launch = self.launch
        position = {"tid": (self.threads, launch.block), "ctaid": (self.batch.blocks[self.rows],
                    launch.grid)}  # fmt: skip
        sizes = {"ntid": launch.block, "nctaid": launch.grid}
        for name, slot in self.program.slots.number.items():
            if not isinstance(name, str) or name[0] not in "%W" or self.R[slot] is not None:
                continue
            base, _, axis = name[1:].partition(".")
            if base in sizes and axis:
                value = np.full(1, sizes[base]["xyz".index(axis)])
            elif base in position and axis:
                linear, (x, y, _) = position[base]
                value = {"x": linear % x, "y": linear // x % y, "z": linear // (x * y)}[axis]
            elif base == "laneid":
                value = self.lane
            elif base == "warpid":
                value = self.threads >> 5
            elif base == "nwarpid":
                value = np.full(1, -(-launch.threads // WARP))
            elif name == "WARP_SZ":
                value = np.full(1, WARP)
            elif base.startswith("lanemask_"):
                below = self.lane_bit - np.uint32(1)
                value = {"eq": self.lane_bit, "lt": below, "le": below | self.lane_bit,
                         "gt": ~(below | self.lane_bit), "ge": ~below}[base[-2:]]  # fmt: skip
            else:
                continue
            self.R[slot] = value.astype(np.uint32)

    # --- registers

    def full(self, value: np.ndarray) -> np.ndarray:
        """A number for each lane."""
        return value if value.size == self.size else np.repeat(value, self.size)

    def put(self, slot: int, value: np.ndarray, mask: np.ndarray | None) -> None:
        """Set a register of the lanes in `mask`."""
        old = self.R[slot]
        self.R[slot] = value if mask is None or old is None else np.where(mask, value, old)

    def put_lanes(self, slot: int, value: np.ndarray, lanes: np.ndarray | None) -> None:
        """Set a register of these lanes, for each of which there is a value."""
        if lanes is not None:
            old = self.R[slot]
            whole = np.zeros(self.size, value.dtype) if old is None else self.full(old).copy()
            whole[lanes] = value
            value = whole
        self.R[slot] = value

    def count_warps(self, mask: np.ndarray | None) -> int:
        if mask is None:
            return self.warps
        return int(np.count_nonzero(np.logical_or.reduceat(mask, self.warp_starts)))

    def fault(self, kind, instruction: Instruction, lane: int, message: str) -> Fault:
        """An exception that says where it happened."""
        who = self.launch.thread_name(int(self.ids[lane]))
        return kind(
            f"{self.program.entry.name}: {who}: {message}, "
            f"at line {instruction.line}: {instruction.text}"
        )

    def _check_written(self, slots, mask, instruction) -> None:
        for slot in slots:
            if slot in self.written:
                missing = ~self.written[slot] if mask is None else mask & ~self.written[slot]
            else:
                missing = np.ones(self.size, bool) if mask is None else mask
            if missing.any():
                names = {n: name for name, n in self.program.slots.number.items()}
                lane = int(np.flatnonzero(missing)[0])
                raise self.fault(
                    Uninitialised, instruction, lane, f"register {names[slot]} was not written yet"
                )

    def _mark_written(self, slots, mask) -> None:
        for slot in slots:
            if slot not in self.written:
                self.written[slot] = np.zeros(self.size, bool)
            self.written[slot] |= True if mask is None else mask

    # --- running

    def run(self, turns: int) -> None:
        """Run up to so many basic blocks, or until all threads have ended or wait."""
        blocks, report = self.program.blocks, self.launch.report
        while self.ready and turns:
            turns -= 1
            number = min(self.ready)
            mask, count = self.ready.pop(number)
            block = blocks[number]
            report.instructions += count * len(block.steps)
            if mask is None and block.plain:
                R = self.R
                for step in block.steps:
                    if step.function is not None:
                        R[step.slot] = step.function(R)
                    else:
                        step.execute(self, None)
            else:
                for step in block.steps:
                    self._step(step, mask)
            self._leave(block, mask, count)

    def _step(self, step: Step, mask: np.ndarray | None) -> None:
        R = self.R
        if step.guard:
            slot, wanted = step.guard
            if step.reads:
                self._check_written([s for s in step.reads if s == slot], mask, step.instruction)
            through = self.full(R[slot] if wanted else ~R[slot])
            mask = through if mask is None else mask & through
            if not mask.any():
                return
        if step.reads:
            self._check_written(step.reads, mask, step.instruction)
        if step.function is None:
            step.execute(self, mask)
        elif mask is None or not step.keep:
            R[step.slot] = step.function(R)
        else:
            self.put(step.slot, step.function(R), mask)
        if step.writes:
            self._mark_written(step.writes, mask)

    def _go(self, number: int, mask: np.ndarray | None, count: int) -> None:
        """Threads come to a block."""
        if number in self.ready:
            other, others = self.ready[number]
            mask, count = mask | other, count + others
        self.ready[number] = (None if count == self.size else mask), count

    def _leave(self, block: CodeBlock, mask: np.ndarray | None, count: int) -> None:
        end = block.end
        if block.doubtful:
            self._check_written(block.doubtful, mask, end)
        if block.barrier is not None:
            self._arrive(block, mask)
            return
        if block.guard is None:
            if end is None and block.following >= 0:
                self._go(block.following, mask, count)
            else:
                self._depart(block, mask, count)
            return
        slot, wanted = block.guard
        through = self.full(self.R[slot] if wanted else ~self.R[slot])
        taken = through if mask is None else mask & through
        passed = int(np.count_nonzero(taken))
        if passed == count:
            self._depart(block, mask, count)
        elif passed == 0:
            self._go(block.following, mask, count)
        else:
            stay = ~through if mask is None else mask & ~through
            self._depart(block, taken, passed)
            self._go(block.following, stay, count - passed)

    def _depart(self, block: CodeBlock, mask: np.ndarray | None, count: int) -> None:
        """Threads do what the block ends with."""
        if block.end is not None and block.end.opcode == "bra":
            self._go(block.taken, mask, count)
        elif block.end is not None and block.end.opcode == "trap":
            lane = 0 if mask is None else int(np.flatnonzero(mask)[0])
            raise self.fault(Fault, block.end, lane, "trap")
        else:
            self.live = np.zeros(self.size, bool) if mask is None else self.live & ~mask

    # --- barriers

    def _arrive(self, block: CodeBlock, mask: np.ndarray | None) -> None:
        if mask is not None:
            here = np.logical_or.reduceat(mask, self.warp_starts)[self.warp_of]
            missing = here & self.live & ~mask
            if missing.any():
                raise self.fault(
                    DivergentBarrier, block.end, int(np.flatnonzero(missing)[0]),
                    "is elsewhere while other threads of its warp wait",
                )  # fmt: skip
        numbers = [self.full(read(self.R)) for read in block.barrier]
        everyone = np.ones(self.size, bool) if mask is None else mask
        keys = numbers[0].astype(np.int64) << 32 | (numbers[1] if len(numbers) > 1 else 0)
        for key in np.unique(keys[everyone]):
            self.waiting.append((block, int(key), everyone & (keys == key)))

    def release(self, block: CodeBlock, lanes: np.ndarray) -> None:
        """These lanes pass a barrier."""
        self.block_since = np.where(lanes, self.launch.time, self.block_since)
        self.warp_since = np.where(lanes, self.launch.time, self.warp_since)
        self._go(block.following, lanes, int(np.count_nonzero(lanes)))


class Batch:
    """Thread blocks that run at the same time."""

    def __init__(self, launch: Launch, blocks: np.ndarray):
        self.launch, self.blocks = launch, blocks
        self.shared_stride = -(-launch.shared_bytes // 128) * 128
        data = np.full(self.shared_stride * blocks.size, 0xFF, np.uint8)
        buffer, shared = Buffer(data, 0), Space("shared")
        for name, base, size in launch.shared_variables:
            shared.add(Region(name, base, size, buffer))
        self.spaces = {"global": launch.memory.space, "const": launch.memory.space,
                       "shared": shared, "local": Space("local"), "param": Space("param")}  # fmt: skip
        rows = np.repeat(np.arange(blocks.size), launch.threads)
        threads = np.tile(np.arange(launch.threads), blocks.size)
        self.groups = [Group(self, rows[p], threads[p]) for p in self._deal(rows, threads)]

    def _deal(self, rows: np.ndarray, threads: np.ndarray) -> list[np.ndarray]:
        """Positions of the threads of each group."""
        if self.launch.random is None:
            return [np.arange(rows.size)]
        warp = rows * WARP + (threads >> 5)
        numbers = np.unique(warp)
        group_of = dict(zip(numbers, self.launch.random.integers(0, GROUPS, numbers.size)))
        groups = np.array([group_of[n] for n in warp])
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
        self.launch.tick(None)
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
        self._shadows: dict[int, tuple[Buffer, Shadow]] = {}
        for region in memory.space.regions:
            region.touched = {}
        self.registers: list[np.ndarray | None] = [None] * len(program.slots.dtypes)
        for slot, value in program.slots.constants.items():
            self.registers[slot] = value
        self._place_variables(shared_bytes)
        self._set_parameters(arguments)

    def _place_variables(self, dynamic: int) -> None:
        program, symbols = self.program, self.program.slots.symbols
        ends = {"shared": 0, "local": 0}
        found: dict[str, list[tuple[str, int, int]]] = {"shared": [], "local": []}
        variables = [*program.module.variables, *program.flow.variables]
        for v in sorted(variables, key=lambda v: v.size is None):  # dynamic shared memory is last
            space = "local" if v.space == "param" else v.space
            if space in ends:
                base = -(-ends[space] // v.align) * v.align
                size = dynamic if v.size is None else v.size
                ends[space] = base + size if v.size is not None else ends[space]
                if size and not any(name == v.name for name, _, _ in found[space]):
                    found[space].append((v.name, base, size))
                if v.size is None:
                    self._dynamic_end = base + size
            elif v.name in symbols:
                base = self.memory.allocate(v.size, v.name, v.initial, space == "global")
            else:
                continue
            if v.name in symbols:
                self.registers[symbols[v.name]] = np.full(1, base, np.uint64)
        self.shared_variables, self.local_variables = found["shared"], found["local"]
        self.shared_bytes = max([end for _, b, s in found["shared"] for end in [b + s]], default=0)
        self.local_bytes = -(-ends["local"] // 16) * 16
        unknown = [n for n, slot in symbols.items() if self.registers[slot] is None]
        if unknown:
            raise ValueError(f"unknown names: {', '.join(unknown)}")

    def _set_parameters(self, arguments) -> None:
        params = self.program.entry.params
        if len(arguments) != len(params):
            raise ValueError(f"{len(arguments)} arguments for {len(params)} parameters")
        data = {}
        for param, argument in zip(params, arguments):
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
        if id(buffer) not in self._shadows:
            self._shadows[id(buffer)] = buffer, Shadow(buffer.data.size)
        return self._shadows[id(buffer)][1]

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
