"""PTX text -> modules, functions and instructions.

The grammar of what NVVM prints: directives, declarations, and a body of labels and instructions for
each function. Nothing is interpreted here but types and sizes; `flow` makes basic blocks of a body,
and `instructions` knows what an opcode does. What is not understood is an error, with its line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

SIZES = {kind + str(8 * size): size for kind in "busf" for size in (1, 2, 4, 8)}
SIZES |= {"pred": 1, "f16x2": 4, "bf16": 2, "bf16x2": 4}

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|^[ \t]*\.(?:loc|file)\b[^\n]*", re.S | re.M)
_TOKEN = re.compile(r'"[^"]*"|-?\d\w*(?:\.\d+)?|[%$.\w][\w$.%]*(?:::[\w.]+)*|\S')


class Unsupported(Exception):
    """PTX that the interpreter does not know; names the line and what stands there."""


class Address(NamedTuple):
    """``[base+offset]``; base is a register, a variable, or a number."""

    base: str
    offset: int


class Vector(tuple):
    """``{a, b, ...}``."""


class Arguments(tuple):
    """``(a, b, ...)`` of a call."""


class Pair(NamedTuple):
    """``a|b``: two results."""

    first: str
    second: str


@dataclass
class Variable:
    """A variable or parameter in memory: `size` bytes, None if that is known at launch."""

    name: str
    space: str
    type: str
    size: int | None
    align: int
    initial: bytes = b""


@dataclass
class Instruction:
    """``@guard opcode.modifiers operands;``."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: list
    guard: tuple[str, bool] | None  # register, and the value of it that lets the thread through
    text: str
    line: int

    def unsupported(self, why: str) -> Unsupported:
        return Unsupported(f"line {self.line}: {why}: {self.text}")


@dataclass
class Label:
    name: str


@dataclass
class Function:
    """A kernel (`.entry`) or a device function (`.func`)."""

    name: str
    is_entry: bool
    params: list[Variable]
    returns: list[Variable]
    most_threads: int | None = None
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    body: list[Instruction | Label] | None = None  # None: declared only
    module: Module | None = None  # where it stands
    program: object = None  # what the machine made of it

    @property
    def shared_bytes(self) -> int:
        """Bytes of its own shared memory, without what a launch adds."""
        return sum(v.size or 0 for v in self.variables if v.space == "shared")


@dataclass
class Module:
    """What a PTX file defines."""

    target: str = ""
    entries: dict[str, Function] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)


def parse(text: str) -> Module:
    """Parse a PTX file."""
    return _Parser(text).module()


class _Parser:
    def __init__(self, text: str):
        # Comments become as many lines, so that positions stay those of the file.
        text = _COMMENT.sub(lambda m: "\n" * m.group().count("\n"), text)
        self.source = text
        self.tokens = list(_TOKEN.finditer(text))
        self.at = 0
        self._counted = (0, 1)  # a position, and its line

    def peek(self, ahead: int = 0) -> str:
        at = self.at + ahead
        return self.tokens[at].group() if at < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if token == "" or (expected is not None and token != expected):
            raise self.error(f"expected {expected or 'more'}, found {token or 'the end'}")
        self.at += 1
        return token

    def skip(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self.at += 1
        return True

    def line(self) -> int:
        position = self.tokens[min(self.at, len(self.tokens) - 1)].start()
        before, line = self._counted
        if position < before:
            before, line = 0, 1
        self._counted = position, line + self.source.count("\n", before, position)
        return self._counted[1]

    def error(self, message: str) -> Unsupported:
        return Unsupported(f"line {self.line()}: {message}")

    def module(self) -> Module:
        module = Module()
        while self.at < len(self.tokens):
            token = self.take()
            if token == ".version":
                self.take()
            elif token == ".target":
                module.target = self.take()
                while self.skip(","):
                    self.take()
            elif token == ".address_size":
                self.take("64")
            elif token in (".entry", ".func"):
                function = self.function(token == ".entry")
                function.module = module
                known = module.entries if function.is_entry else module.functions
                if function.body is not None or function.name not in known:
                    known[function.name] = function
            elif token in (".global", ".const", ".shared"):
                module.variables.append(self.variable(token[1:]))
                self.take(";")
            elif token not in (".visible", ".extern", ".weak", ".common"):
                self.at -= 1
                raise self.error(f"unknown directive {token}")
        return module

    def variable(self, space: str) -> Variable:
        """After its state space: ``.align 16 .b8 name[64] = {...}``."""
        align, kind, size = 0, "", 1
        while self.peek().startswith("."):
            token = self.take()[1:]
            if token == "align":
                align = int(self.take())
            elif token in SIZES:
                kind = token
            elif token in ("v2", "v4"):
                size *= int(token[1])
            elif token not in ("ptr", "global", "shared", "local", "const"):
                raise self.error(f"unknown attribute .{token}")
        name = self.take()
        size = size * SIZES[kind]
        unknown = False
        while self.skip("["):
            if self.skip("]"):
                unknown = True
            else:
                size *= int(self.take(), 0)
                self.take("]")
        initial = b""
        if self.skip("="):
            initial = b"".join(literal(v, kind) for v in self.group())
            initial = initial.ljust(size, b"\0")
        align = align or SIZES[kind]
        return Variable(name, space, kind, None if unknown else size, align, initial)

    def group(self) -> list[str]:
        """``{a, b}``, or ``a`` alone."""
        if not self.skip("{"):
            return [self.take()]
        values = [self.take()]
        while self.skip(","):
            values.append(self.take())
        self.take("}")
        return values

    def parameters(self) -> list[Variable]:
        found: list[Variable] = []
        if self.skip("("):
            while not self.skip(")"):
                token = self.take()
                if token == ".param":
                    found.append(self.variable("param"))
                elif token != ",":
                    raise self.error(f"unknown parameter {token}")
        return found

    def function(self, is_entry: bool) -> Function:
        returns = [] if is_entry else self.parameters()
        function = Function(self.take(), is_entry, self.parameters(), returns)
        while self.peek() not in ("{", ";"):
            directive = self.take()
            numbers = [int(self.take())] if self.peek().isdigit() else []
            while self.skip(","):
                numbers.append(int(self.take()))
            if directive in (".maxntid", ".reqntid"):
                function.most_threads = 1
                for number in numbers:
                    function.most_threads *= number
            elif directive not in (".minnctapersm", ".maxnreg", ".noreturn"):
                raise self.error(f"unknown directive {directive}")
        if self.skip(";"):
            return function
        self.take("{")
        function.body, depth = [], 1
        while depth:
            token = self.peek()
            if token in ("{", "}"):  # scopes of calls: names in them do not clash
                self.take()
                depth += 1 if token == "{" else -1
            elif token == ".reg":
                self.take()
                self.registers(function)
            elif token in (".shared", ".local", ".param"):
                function.variables.append(self.variable(self.take()[1:]))
                self.take(";")
            elif token == ".pragma":
                while self.take() != ";":
                    pass
            elif self.peek(1) == ":":
                function.body.append(Label(self.take()))
                self.take(":")
            else:
                function.body.append(self.instruction())
        return function

    def registers(self, function: Function) -> None:
        kind = self.take()[1:]
        while True:
            name = self.take()
            if self.skip("<"):
                for n in range(int(self.take())):
                    function.registers[f"{name}{n}"] = kind
                self.take(">")
            else:
                function.registers[name] = kind
            if not self.skip(","):
                break
        self.take(";")

    def instruction(self) -> Instruction:
        line, start = self.line(), self.tokens[self.at].start()
        guard = None
        if self.skip("@"):
            wanted = not self.skip("!")
            guard = (self.take(), wanted)
        opcode, *modifiers = self.take().split(".")
        operands = []
        while not self.skip(";"):
            operands.append(self.operand())
            if self.peek() != ";":
                self.take(",")
        text = " ".join(self.source[start : self.tokens[self.at - 1].end()].split())
        return Instruction(opcode, tuple(modifiers), operands, guard, text, line)

    def operand(self) -> object:
        if self.skip("["):
            base = self.take()
            offset = 0
            if self.skip("+") or self.peek() != "]":
                offset = int(self.take(), 0)
            self.take("]")
            return Address(base, offset)
        for opening, closing, kind in (("{", "}", Vector), ("(", ")", Arguments)):
            if self.skip(opening):
                values: list[object] = []
                while not self.skip(closing):
                    values.append(self.operand())
                    self.skip(",")
                return kind(values)
        name = ("!" if self.skip("!") else "") + self.take()
        return Pair(name, self.take()) if self.skip("|") else name


def literal(text: str, kind: str) -> bytes:
    """The bytes of a number, as a value of type `kind`."""
    size = SIZES[kind]
    if text[:2] in ("0f", "0F", "0d", "0D"):
        number = int(text[2:], 16)
        if len(text) - 2 != 2 * size:
            raise Unsupported(f"{text} is not of type {kind}")
    elif kind.startswith("f"):
        raise Unsupported(f"{text} is not of type {kind}")
    else:
        number = int(text.rstrip("U"), 0)
    return (number % (1 << (8 * size))).to_bytes(size, "little")
