"""How many bytes a thread has asked for before it waits: read from what ptxas made of a kernel.

A GPU hides the way to memory by having many loads on it at once. A thread goes on after a load
until an instruction names a register that the load has yet to fill. So the loads in flight are
those on a path through the machine code since the last such instruction. Only loads of 16 bytes and
more count: the bulk of the data comes by them, the rest is a few numbers per channel.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_REGISTER = re.compile(r"\bR(\d+)\b")


class Instruction(NamedTuple):
    """Of machine code, as nvdisasm writes it."""

    opcode: str
    named: frozenset[int]  # registers
    filled: frozenset[int]  # by a load of 16 bytes or more
    bytes: int  # of such a load
    target: str | None  # of a jump
    falls: bool  # whether the next instruction can follow


def _instruction(predicate: str | None, opcode: str, operands: str) -> Instruction:
    name, *modifiers = opcode.split(".")
    named = frozenset(map(int, _REGISTER.findall(operands)))
    filled: frozenset[int] = frozenset()
    width = max([int(m) for m in modifiers if m in ("128", "256")], default=0) // 8
    if name not in ("LD", "LDG"):
        width = 0
    if width:
        targets = _REGISTER.findall(operands.split("[")[0])
        each = width // 4 // len(targets)
        filled = frozenset(int(first) + n for first in targets for n in range(each))
    found = _TARGET.search(operands) if name in ("BRA", "JMP") else None
    leaves = name in ("BRA", "JMP", "EXIT", "RET", "BRX", "KILL")
    return Instruction(
        name, named, filled, width, found[1] if found else None,
        not leaves or predicate is not None or "P" in operands.split("`")[0],
    )  # fmt: skip


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of one function in ``nvdisasm -c``'s text, and where labels are."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label, found = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            labels[label[1]] = len(code)
        elif found:
            code.append(_instruction(*found.groups()))
    return code, labels


def _loops(following: list[list[int]]) -> list[set[int]]:
    """The strongly connected parts of a graph that have a cycle (Tarjan's algorithm, unrolled)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    parts = []
    for root in range(len(following)):
        work = [(root, 0)] if root not in order else []
        while work:
            node, n = work.pop()
            if n == 0:
                order[node] = low[node] = len(order)
                stack.append(node)
            if n < len(following[node]):
                work.append((node, n + 1))
                after = following[node][n]
                if after not in order:
                    work.append((after, 0))
                continue
            for after in following[node]:
                if after in stack:
                    low[node] = min(low[node], low[after])
            if low[node] == order[node]:
                at = stack.index(node)
                part, stack[at:] = set(stack[at:]), []
                if len(part) > 1 or node in following[node]:
                    parts.append(part)
    return parts


def in_flight(sass: str) -> int:
    """Most bytes that a thread has asked for, and not waited for, in the kernel's bulk loop.

    That is the loop that has most of them; all of the kernel, where no loop loads so.
    """
    code, labels = parse(sass)
    following = []
    for at, one in enumerate(code):
        falls = [at + 1] if one.falls and at + 1 < len(code) else []
        following.append(falls + ([labels[one.target]] if one.target else []))
    seen = {(0, frozenset[int]())}
    left = list(seen)
    most = [0] * len(code)
    while left:
        at, waiting = left.pop()
        one = code[at]
        if any(one.named & code[load].filled for load in waiting):
            waiting = frozenset()
        if one.bytes:
            waiting |= {at}
        most[at] = max(most[at], sum(code[load].bytes for load in waiting))
        for after in following[at]:
            if (after, waiting) not in seen:
                seen.add((after, waiting))
                left.append((after, waiting))
    loops = [part for part in _loops(following) if any(code[at].bytes for at in part)]
    return max((most[at] for part in loops or [set(range(len(code)))] for at in part), default=0)


def without(ptx: str, names: tuple[str, ...], given: tuple[str, ...]) -> str:
    """PTX of a kernel in which the parameters `given`, of those called `names`, are always 0."""
    for name in given:
        if name in names:
            number = names.index(name)
            load = rf"ld\.param\.[bu]64\s+(%\w+), \[\w+_param_{number}\];"
            ptx = re.sub(load, r"mov.b64 \1, 0;", ptx)
    return ptx
