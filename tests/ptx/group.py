"""Groups of warps that run in lock step as far as their branches allow.

A group has the register file of its threads, and knows which of them are at which block of the
program. Those at the first block run next, all together: see `flow` for why they meet again.
"""

from __future__ import annotations

import numpy as np

from ptx.memory import Buffer, Region, Space
from ptx.parse import Instruction
from ptx.program import CodeBlock, Step
from ptx.races import BLOCK_BITS
from ptx.report import DivergentBarrier, Fault, Uninitialised

WARP = 32


class Group:
    """Warps that run together."""

    def __init__(self, batch, rows: np.ndarray, threads: np.ndarray):
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
        self.warp_key = self.warp_of << 48  # above all addresses
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
        for name, slot in self.program.slots.special.items():
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
            else:  # lanemask
                below = self.lane_bit - np.uint32(1)
                value = {"eq": self.lane_bit, "lt": below, "le": below | self.lane_bit,
                         "gt": ~(below | self.lane_bit), "ge": ~below}[base[-2:]]  # fmt: skip
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
            report.instructions += count * block.length
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
                self._check_written({slot} & set(step.reads), mask, step.instruction)
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
