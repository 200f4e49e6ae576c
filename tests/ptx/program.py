"""Kernels made ready to run: for each basic block, steps that work on arrays of lanes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx.access import MEMORY_INSTRUCTIONS
from ptx.flow import is_barrier, make_flow, reads_and_writes
from ptx.instructions import compute
from ptx.parse import Function, Instruction, Module
from ptx.registers import Modifiers, Slots, dtype_of
from ptx.warps import WARP_INSTRUCTIONS

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
    length: int  # in instructions
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
        self.flow = make_flow(module, entry)
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
        if end is not None and is_barrier(end):
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
            steps, len(block.instructions) + (end is not None), plain, end,
            self._guard(end) if end else None, barrier, block.taken, block.following,
            self._doubtful(reads),
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
        source = self.slots.new((address, dtype.str), dtype)
        self.param_slots.append((source, address.base, address.offset, dtype))
        if convert:
            return [(slot, lambda R: convert(R[source]))]
        return [(slot, lambda R: R[source])]
