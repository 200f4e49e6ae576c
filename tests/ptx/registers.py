"""The register file: what its arrays hold, and how instructions read and write them.

It is a list with one array a register: of as many lanes as a group has, or of one if all lanes
agree. Arrays are never written to, so they may be shared. Registers of integers are unsigned arrays
whatever is done with them, float16 lies as bits in 16-bit registers, and predicates are booleans.
Constants, parameters and special registers have places of their own.
"""

from __future__ import annotations

import numpy as np

from ptx.parse import SIZES, Instruction, Unsupported, literal

SHARED_WINDOW, LOCAL_WINDOW = 1 << 56, 1 << 57  # where generic addresses of these spaces begin

SPECIAL = {
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *(f"%lanemask_{relation}" for relation in ("eq", "lt", "le", "gt", "ge")),
    *("%laneid", "%warpid", "%nwarpid", "WARP_SZ"),
}


def dtype_of(kind: str) -> np.dtype:
    """What values of a PTX type are computed with."""
    if kind == "pred":
        return np.dtype(bool)
    letter = {"f": "f", "s": "i"}.get(kind[0], "u")
    if kind in ("f16x2", "bf16x2"):
        letter = "u"
    return np.dtype(f"{letter}{SIZES[kind]}")


def signless(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}") if dtype.kind == "i" else dtype


def _same_bits(one: np.dtype, other: np.dtype) -> bool:
    return one.itemsize == other.itemsize and (one.kind == "b") == (other.kind == "b")


class Modifiers:
    """The modifiers of an instruction, taken one by one; what is left in the end is unknown."""

    def __init__(self, instruction: Instruction):
        self.instruction, self.left = instruction, list(instruction.modifiers)

    def take(self, *names: str) -> str:
        """The one of these that is there, or ''."""
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return name
        return ""

    def need(self, *names: str) -> str:
        return self.take(*names) or self.fail(f"none of {', '.join(names)}")

    def type(self) -> str:
        if not self.left or self.left[-1] not in SIZES:
            self.fail("no type")
        return self.left.pop()

    def fail(self, why: str = "not known"):
        raise self.instruction.unsupported(why)

    def done(self) -> None:
        if self.left:
            self.fail(f".{self.left[0]} is not known")


class Slots:
    """Where registers, constants, parameters and special registers are in the register file."""

    def __init__(self, registers: dict[str, str]):
        self.number: dict[object, int] = {}
        self.dtypes: list[np.dtype] = []
        self.constants: dict[int, np.ndarray] = {}
        self.symbols: dict[str, int] = {}  # addresses of variables, known at launch
        self.special: dict[str, int] = {}
        for name, kind in registers.items():
            dtype = dtype_of(kind)
            self.new(name, np.dtype("u2") if dtype == np.float16 else signless(dtype))

    def new(self, key: object, dtype: np.dtype) -> int:
        if key not in self.number:
            self.number[key] = len(self.dtypes)
            self.dtypes.append(dtype)
        return self.number[key]

    def slot(self, operand: str, dtype: np.dtype) -> int:
        """Of a register, special register, variable's address or number (of that dtype)."""
        if operand in self.number:
            return self.number[operand]
        if operand in SPECIAL:
            self.special[operand] = self.new(operand, np.dtype("u4"))
            return self.special[operand]
        if operand[0].isdigit() or operand[0] == "-":
            letter = "f" if dtype.kind == "f" else "u"
            data = literal(operand, f"{letter}{8 * dtype.itemsize}")
            value = np.frombuffer(data, f"{letter}{dtype.itemsize}")
            slot = self.new((operand, dtype.str), signless(dtype))
            self.constants[slot] = value != 0 if dtype.kind == "b" else value
            return slot
        if operand.startswith("%"):
            raise Unsupported(f"unknown register {operand}")
        slot = self.new(operand, np.dtype("u8"))
        self.symbols[operand] = slot
        return slot

    def dtype(self, address: str) -> np.dtype:
        """Of a register or variable that is used as an address."""
        dtype = self.dtypes[self.slot(address, np.dtype("u8"))]
        if dtype.kind != "u" or dtype.itemsize < 4:
            raise Unsupported(f"{address} is no address")
        return dtype

    def reader(self, operand: str, dtype: np.dtype, narrow: bool = False):
        """A function of the register file that gives the operand as an array of `dtype`."""
        if not isinstance(operand, str):
            raise Unsupported(f"unexpected operand {operand}")
        if operand.startswith("!"):
            plain = self.reader(operand[1:], dtype)
            return lambda R: ~plain(R)
        slot = self.slot(operand, dtype)
        have = self.dtypes[slot]
        if have == dtype:
            return lambda R: R[slot]
        if _same_bits(have, dtype):
            return lambda R: R[slot].view(dtype)
        if have.itemsize > dtype.itemsize and (narrow or operand in self.symbols):
            bits = np.dtype(f"u{dtype.itemsize}")
            return lambda R: R[slot].astype(bits).view(dtype)
        if operand in self.symbols or operand in SPECIAL:
            return lambda R: R[slot].astype(dtype)
        raise Unsupported(f"{operand} is not of {8 * dtype.itemsize} bits")

    def result(self, register: str, dtype: np.dtype):
        """The slot of a register, and what makes its contents of an array of `dtype` (or None)."""
        slot = self.number[register]
        have = self.dtypes[slot]
        if have == dtype:
            return slot, None
        if _same_bits(have, dtype):
            return slot, lambda value: value.view(have)
        if have.itemsize > dtype.itemsize and dtype.kind in "iu" and have.kind == "u":
            return slot, lambda value: value.astype(have)
        if have.itemsize > dtype.itemsize and have.kind == "u":
            bits = np.dtype(f"u{dtype.itemsize}")
            return slot, lambda value: value.view(bits).astype(have)
        raise Unsupported(f"{register} does not hold {dtype}")
