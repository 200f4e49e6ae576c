"""From a function's body to basic blocks: calls inlined, blocks ordered, registers looked into.

Threads that went different ways are run in the order of the blocks, lowest first, and those that
are at the same block are run together. The order is topological, with the blocks of each loop
following each other, so no thread enters a block while another may still come to it: threads meet
again at the immediate post-dominator of the branch at the latest. (The order of blocks in PTX has
no such property.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ptx.parse import (
    Address,
    Arguments,
    Function,
    Instruction,
    Label,
    Module,
    Pair,
    Variable,
    Vector,
)


def is_barrier(instruction: Instruction) -> bool:
    """Whether it may have to wait for other warps."""
    return instruction.opcode in ("bar", "barrier") and instruction.modifiers[:1] != ("warp",)


@dataclass
class Block:
    """Instructions that run one after the other, and where to go then."""

    instructions: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None
    taken: int = -1  # where a branch leads; -1: nowhere
    following: int = -1


@dataclass
class Flow:
    """A kernel, ready to be compiled; blocks are in their order."""

    entry: Function
    blocks: list[Block]
    registers: dict[str, str]
    variables: list[Variable]
    doubtful: set[str]  # registers that some path reads before it writes them
    temporary: set[str]  # registers that only one block knows, and writes first


def make_flow(module: Module, entry: Function) -> Flow:
    """The control flow of a kernel."""
    registers, variables = dict(entry.registers), list(entry.variables)
    body = _inline(module, entry, registers, variables, ())
    blocks = _ordered(_split(body))
    doubtful, temporary = _analyse(blocks, registers)
    return Flow(entry, blocks, registers, variables, doubtful, temporary)


# --- calls ----------------------------------------------------------------------------------


def _renamed(operand, names):
    if isinstance(operand, Address):
        return Address(names.get(operand.base, operand.base), operand.offset)
    if isinstance(operand, Pair):
        return Pair(*(_renamed(part, names) for part in operand))
    if isinstance(operand, (Vector, Arguments)):
        return type(operand)(_renamed(part, names) for part in operand)
    if operand.startswith("!"):
        return "!" + names.get(operand[1:], operand[1:])
    return names.get(operand, operand)


def _inline(module, function, registers, variables, callers):
    """The body with the bodies of called functions in it, their names made unique."""
    body = []
    for n, item in enumerate(function.body):
        if isinstance(item, Label) or item.opcode != "call":
            body.append(item)
            continue
        lists = [operand for operand in item.operands if isinstance(operand, Arguments)]
        name = next(operand for operand in item.operands if isinstance(operand, str))
        callee = module.functions.get(name)
        if callee is None or callee.body is None:
            raise item.unsupported(f"call of {name}, which is not defined here")
        if name in callers or item.guard:
            raise item.unsupported("recursion" if name in callers else "call under a predicate")
        prefix = f"{name}@{n}:"
        formal = [*callee.returns, *callee.params]
        actual = [argument for arguments in lists for argument in arguments]
        names = {variable.name: given for variable, given in zip(formal, actual, strict=True)}
        own, new = dict(callee.registers), list(callee.variables)
        inner = _inline(module, callee, own, new, (*callers, name))
        names |= {register: prefix + register for register in own}
        names |= {variable.name: prefix + variable.name for variable in new}
        names |= {label.name: prefix + label.name for label in inner if isinstance(label, Label)}
        registers |= {prefix + register: kind for register, kind in own.items()}
        variables += [Variable(prefix + v.name, *list(vars(v).values())[1:]) for v in new]
        for inside in inner:
            if isinstance(inside, Label):
                body.append(Label(prefix + inside.name))
                continue
            guard = inside.guard and (prefix + inside.guard[0], inside.guard[1])
            opcode, operands = inside.opcode, [_renamed(o, names) for o in inside.operands]
            if opcode == "ret":
                opcode, operands = "bra", [prefix + "return"]
            body.append(
                Instruction(opcode, inside.modifiers, operands, guard, inside.text, inside.line)
            )
        body.append(Label(prefix + "return"))
    return body


# --- blocks ---------------------------------------------------------------------------------


def _split(body) -> list[Block]:
    """Blocks in the order of the text, from the first on."""
    blocks, labels = [Block()], {}
    for item in body:
        last = blocks[-1]
        if isinstance(item, Label):
            if last.instructions or last.end:
                blocks.append(Block())
            labels[item.name] = len(blocks) - 1
            continue
        if last.end:
            blocks.append(Block())
        if item.opcode in ("bra", "ret", "exit", "trap") or is_barrier(item):
            blocks[-1].end = item
        else:
            blocks[-1].instructions.append(item)
    for n, block in enumerate(blocks):
        end = block.end
        falls = end is None or is_barrier(end) or end.guard is not None
        if falls and n + 1 < len(blocks):
            block.following = n + 1
        if end is not None and end.opcode == "bra":
            if end.operands[0] not in labels:
                raise end.unsupported("unknown label")
            block.taken = labels[end.operands[0]]
    return blocks


def _successors(block: Block) -> list[int]:
    return [n for n in (block.taken, block.following) if n >= 0]


def _components(nodes: list[int], edges: dict[int, list[int]]) -> list[list[int]]:
    """Strongly connected components, in topological order (Tarjan 1972, without recursion)."""
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[list[int]] = []
    for root in nodes:
        if root in number:
            continue
        work = [(root, iter(edges[root]))]
        number[root] = low[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, following = work[-1]
            for other in following:
                if other not in number:
                    number[other] = low[other] = len(number)
                    stack.append(other)
                    on_stack.add(other)
                    work.append((other, iter(edges[other])))
                    break
                if other in on_stack:
                    low[node] = min(low[node], number[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == number[node]:
                    at = stack.index(node)
                    found.append(stack[at:])
                    on_stack.difference_update(stack[at:])
                    del stack[at:]
    return found[::-1]


def _sequence(nodes: list[int], edges: dict[int, list[int]]) -> list[int]:
    """Topological order; of a loop, its first block and then the rest in such an order.

    `nodes` begins with where threads come from.
    """
    order = []
    for component in _components(nodes, edges):
        head, rest = component[0], component[1:]  # found first, so entered from outside
        order.append(head)
        if rest:
            inside = set(rest)  # in the order in which they were found from the head
            order += _sequence(rest, {n: [m for m in edges[n] if m in inside] for n in rest})
    return order


def _ordered(blocks: list[Block]) -> list[Block]:
    reachable, todo = [0], [0]
    while todo:
        for n in _successors(blocks[todo.pop()]):
            if n not in reachable:
                reachable.append(n)
                todo.append(n)
    order = _sequence(reachable, {n: _successors(blocks[n]) for n in reachable})
    place = {n: position for position, n in enumerate(order)} | {-1: -1}
    for n in order:
        blocks[n].taken, blocks[n].following = place[blocks[n].taken], place[blocks[n].following]
    return [blocks[n] for n in order]


# --- registers ------------------------------------------------------------------------------


def _names(operand, registers) -> list[str]:
    if isinstance(operand, (Address, Pair, Vector, Arguments)):
        return [name for part in operand if not isinstance(part, int)
                for name in _names(part, registers)]  # fmt: skip
    name = operand.lstrip("!")
    return [name] if name in registers else []


def reads_and_writes(instruction: Instruction, registers) -> tuple[list[str], list[str]]:
    """Names of the registers that an instruction reads, and of those that it writes."""
    no_result = ("st", "bra", "ret", "exit", "bar", "barrier", "red", "membar", "fence",
                 "prefetch", "prefetchu", "trap")  # fmt: skip
    results = 0 if instruction.opcode in no_result else 1
    reads = [n for operand in instruction.operands[results:] for n in _names(operand, registers)]
    writes = [n for operand in instruction.operands[:results] for n in _names(operand, registers)]
    if instruction.guard:
        reads.append(instruction.guard[0])
    return reads, writes


def _analyse(blocks: list[Block], registers) -> tuple[set[str], set[str]]:
    """Registers that may be read before they are written, and those that one block keeps."""
    bit = {name: 1 << n for n, name in enumerate(registers)}
    everything = (1 << len(bit)) - 1
    touched = []
    for block in blocks:
        instructions = [*block.instructions, *([block.end] if block.end else [])]
        touched.append([(i, *reads_and_writes(i, registers)) for i in instructions])
    written = [0] * len(blocks)
    for n, instructions in enumerate(touched):
        for instruction, _, writes in instructions:
            if not instruction.guard:
                for name in writes:
                    written[n] |= bit[name]
    before = [0] + [everything] * (len(blocks) - 1)
    changed = True
    while changed:
        changed = False
        for n, block in enumerate(blocks):
            for m in _successors(block):
                now = before[m] & (before[n] | written[n])
                changed |= now != before[m]
                before[m] = now
    doubtful: set[str] = set()
    homes: dict[str, set[int]] = {}
    merged: set[str] = set()  # what a thread's own write does not simply replace
    for n, instructions in enumerate(touched):
        sure, inside = before[n], 0
        for instruction, reads, writes in instructions:
            for name in reads:
                homes.setdefault(name, set()).add(n)
                if not sure & bit[name]:
                    doubtful.add(name)
                if not inside & bit[name]:
                    merged.add(name)
            for name in writes:
                homes.setdefault(name, set()).add(n)
                if instruction.guard:
                    merged.add(name)
                else:
                    sure |= bit[name]
                    inside |= bit[name]
    temporary = {name for name, where in homes.items() if len(where) == 1}
    return doubtful, temporary - merged - doubtful
