"""Instructions that compute a register from registers, as functions over arrays of lanes.

`compute` gives for such an instruction functions of the register file. An opcode or a modifier that
is not known here is an error.
"""

from __future__ import annotations

import numpy as np

from ptx import arithmetic as ar
from ptx.parse import Instruction, Pair, Unsupported, Vector
from ptx.registers import LOCAL_WINDOW, SHARED_WINDOW, Modifiers, Slots, dtype_of, signless

# --- floating point -------------------------------------------------------------------------


def _in_double(function):
    """An approximation of the hardware, as the rounded value of float64's function."""
    return lambda *args: function(*(a.astype(np.float64) for a in args)).astype(args[0].dtype)


_FLOAT = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": ar.fma, "mad": ar.fma,
    "abs": np.abs, "neg": np.negative, "copysign": lambda a, b: np.copysign(b, a),
}  # fmt: skip
_EXACT = {"div": np.divide, "rcp": lambda a: a.dtype.type(1) / a, "sqrt": np.sqrt}
_APPROXIMATE = {
    **{name: _in_double(function) for name, function in _EXACT.items()},
    "rsqrt": _in_double(lambda a: 1 / np.sqrt(a)),
    "ex2": _in_double(np.exp2), "lg2": _in_double(np.log2), "tanh": _in_double(np.tanh),
    "sin": _in_double(np.sin), "cos": _in_double(np.cos),
}  # fmt: skip
_ARITY = {"fma": 3, "mad": 3, "abs": 1, "neg": 1, "rcp": 1, "sqrt": 1, "rsqrt": 1, "ex2": 1,
          "lg2": 1, "tanh": 1, "sin": 1, "cos": 1}  # fmt: skip


def _flush(x):
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def _pairs(function):
    """A function of float16 as one of two in 32 bits."""

    def packed(*args):
        args = np.broadcast_arrays(*args)
        return function(*(np.ascontiguousarray(a).view(np.float16) for a in args)).view(np.uint32)

    return packed


def _float(op: str, kind: str, m: Modifiers):
    if op in ("min", "max"):
        nan = m.take("NaN")
        function = getattr(ar, {"min": "minimum", "max": "maximum"}[op] + ("_nan" if nan else ""))
    elif op in _FLOAT:
        function = _FLOAT[op]
        if m.take("rn") == "" and op in ("fma", "mad"):
            m.fail("no rounding")
    elif m.take("approx", "full"):
        function = _APPROXIMATE.get(op) or m.fail()
    else:
        function = _EXACT.get(op) or m.fail()
        m.need("rn")
    flush, saturate = m.take("ftz"), m.take("sat")
    if flush:
        plain = function
        function = lambda *args: _flush(plain(*map(_flush, args)))  # noqa: E731
    if saturate:
        unclamped = function
        function = lambda *args: ar.saturate(unclamped(*args))  # noqa: E731
    if kind == "f16x2":
        function = _pairs(function)
    return function, [dtype_of(kind)] * _ARITY.get(op, 2), dtype_of(kind)


# --- integers -------------------------------------------------------------------------------

# Those that do the same to signed and unsigned numbers; * takes the shift's 32-bit amount.
_BITS = {
    "add": (np.add, 2), "sub": (np.subtract, 2), "and": (np.bitwise_and, 2),
    "or": (np.bitwise_or, 2), "xor": (np.bitwise_xor, 2), "not": (np.invert, 1),
    "neg": (np.negative, 1), "popc": (ar.count_ones, 1), "clz": (ar.count_leading_zeros, 1),
    "brev": (ar.reverse_bits, 1),
    "cnot": (lambda a: (a == 0).astype(a.dtype), 1),
}  # fmt: skip
_SIGNED = {
    "div": (ar.divide, 2), "rem": (ar.remainder, 2), "min": (np.minimum, 2),
    "max": (np.maximum, 2), "abs": (np.abs, 1),
}  # fmt: skip


def _integer(op: str, kind: str, m: Modifiers):
    dtype, u32 = dtype_of(kind), np.dtype("u4")
    plain = signless(dtype)
    if op in _BITS:
        function, arity = _BITS[op]
        return function, [plain] * arity, u32 if op in ("popc", "clz") else plain
    if op in _SIGNED:
        function, arity = _SIGNED[op]
        return function, [dtype] * arity, dtype
    if op in ("mul", "mad"):
        part = m.need("lo", "hi", "wide")
        function = {"lo": np.multiply, "hi": ar.multiply_high, "wide": ar.widening}[part]
        if part == "lo":
            dtype = plain
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}") if part == "wide" else dtype
        if op == "mul":
            return function, [dtype] * 2, wide
        return lambda a, b, c: function(a, b) + c, [dtype, dtype, wide], wide
    if op in ("shl", "shr"):
        function, dtype = (ar.shift_left, plain) if op == "shl" else (ar.shift_right, dtype)
        return function, [dtype, u32], dtype
    if op == "shf":
        left, wrap = m.need("l", "r") == "l", m.need("wrap", "clamp") == "wrap"
        return lambda a, b, c: ar.funnel(a, b, c, left, wrap), [u32] * 3, u32
    if op == "bfe":
        return ar.extract_bits, [dtype, u32, u32], dtype
    if op == "bfi":
        return ar.insert_bits, [plain, plain, u32, u32], plain
    if op == "prmt":
        return ar.permute_bytes, [u32] * 3, u32
    if op == "lop3":
        table = int(m.instruction.operands[4], 0)
        return lambda a, b, c: ar.lookup3(a, b, c, table), [u32] * 3, u32
    return m.fail()


# --- comparison, selection, conversion ------------------------------------------------------


def _differs(a, b):
    return (a < b) | (a > b)


_COMPARE = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
            "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
            "hs": np.greater_equal}  # fmt: skip
_UNORDERED = {
    "equ": lambda a, b: ~_differs(a, b), "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
}  # fmt: skip


def _compare(instruction: Instruction, slots: Slots, m: Modifiers):
    kind = m.type()
    floating = kind.startswith("f")
    known = {**_COMPARE, "ne": _differs if floating else np.not_equal}
    if floating:
        known |= _UNORDERED
    function = known[m.need(*known)]
    join = m.take("and", "or", "xor")
    if m.take("ftz"):
        exact = function
        function = lambda a, b: exact(_flush(a), _flush(b))  # noqa: E731
    m.done()
    results, dtype = instruction.operands[0], dtype_of(kind)
    first, second, *more = instruction.operands[1:]
    a, b = slots.reader(first, dtype), slots.reader(second, dtype)
    outcome = lambda R: function(a(R), b(R))  # noqa: E731
    outcomes = (outcome, lambda R: ~outcome(R))
    if join:
        join_function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[join]
        c = slots.reader(more[0], np.dtype(bool))
        outcomes = tuple((lambda R, o=o: join_function(o(R), c(R))) for o in outcomes)
    registers = results if isinstance(results, Pair) else (results,)
    return [(slots.number[r], o) for r, o in zip(registers, outcomes, strict=False) if r != "_"]


def _move(instruction: Instruction, slots: Slots, m: Modifiers):
    dtype = dtype_of(m.type())
    m.done()
    target, source = instruction.operands
    if isinstance(target, Vector):  # unpack
        whole = slots.reader(source, dtype)
        bits = 8 * dtype.itemsize // len(target)
        part = np.dtype(f"u{bits // 8}")
        shifts = [dtype.type(bits * n) for n in range(len(target))]
        return [
            _assign(slots, name, part, lambda R, by=by: (whole(R) >> by).astype(part))
            for name, by in zip(target, shifts, strict=True) if name != "_"
        ]  # fmt: skip
    if isinstance(source, Vector):  # pack
        bits = 8 * dtype.itemsize // len(source)
        parts = [slots.reader(name, np.dtype(f"u{bits // 8}")) for name in source]

        def pack(R):
            value = parts[0](R).astype(dtype)
            for n, part in enumerate(parts[1:], 1):
                value = value | (part(R).astype(dtype) << dtype.type(bits * n))
            return value

        return [_assign(slots, target, dtype, pack)]
    return [_assign(slots, target, dtype, slots.reader(source, dtype))]


def _convert(instruction: Instruction, slots: Slots, m: Modifiers):
    source, target = m.type(), m.type()
    mode = m.take("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi")
    saturate, flush = m.take("sat"), m.take("ftz")
    m.done()
    name, *operands = instruction.operands
    have, want = dtype_of(source), dtype_of(target)
    readers = [slots.reader(operand, have, narrow=True) for operand in operands]
    floats = ("f", "bf")
    if target in ("f16x2", "bf16x2") and source == "f32" and mode == "rn" and not saturate:
        one = ar.to_bfloat16 if target == "bf16x2" else lambda x: x.astype("f2").view("u2")
        high, low = readers
        pack = lambda R: (one(high(R)).astype("u4") << np.uint32(16)) | one(low(R))  # noqa: E731
        return [_assign(slots, name, want, pack)]
    if target == "bf16" and source == "f32" and mode == "rn":
        function = ar.to_bfloat16
    elif source == "bf16" and target == "f32":
        function = ar.from_bfloat16
    elif "bf16" in (source, target) or "x2" in source + target:
        m.fail()
    elif source.startswith(floats) and target.startswith(floats):
        if mode.endswith("i"):
            function = lambda x: ar.TO_INTEGRAL[mode](x).astype(want)  # noqa: E731
        elif want.itemsize < have.itemsize:
            if not mode:
                m.fail("no rounding")
            function = lambda x: ar.narrow(x, want, mode)  # noqa: E731
        else:
            function = lambda x: x.astype(want)  # noqa: E731
    elif source.startswith("f"):
        if not mode.endswith("i"):
            m.fail("no rounding to integers")
        function = lambda x: ar.float_to_integer(x, want, mode)  # noqa: E731
    elif target.startswith("f"):
        if mode not in ("rn", "rz", "rm", "rp") or (mode != "rn" and have.itemsize == 8):
            m.fail()
        function = lambda x: ar.narrow(x, want, mode)  # noqa: E731
    else:
        function = lambda x: ar.integer_to_integer(x, want, saturate)  # noqa: E731
    if flush:
        exact = function
        flush_in, flush_out = (_flush if k.startswith("f") else (lambda x: x)
                               for k in (source, target))  # fmt: skip
        function = lambda x: flush_out(exact(flush_in(x)))  # noqa: E731
    if saturate and target.startswith("f"):
        unclamped = function
        function = lambda x: ar.saturate(unclamped(x))  # noqa: E731
    return [_assign(slots, name, want, lambda R: function(readers[0](R)))]


def _select(instruction: Instruction, slots: Slots, m: Modifiers):
    dtype = signless(dtype_of(m.type()))
    m.done()
    name, a, b, p = instruction.operands
    a, b = slots.reader(a, dtype), slots.reader(b, dtype)
    p = slots.reader(p, np.dtype(bool))
    return [_assign(slots, name, dtype, lambda R: np.where(p(R), a(R), b(R)))]


def _generic(instruction: Instruction, slots: Slots, m: Modifiers):
    """cvta: addresses of a space to and from generic ones."""
    m.need("u64")
    back = m.take("to")
    space = m.need("global", "shared", "local", "const")
    m.done()
    base = np.uint64({"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0))
    name, source = instruction.operands
    read = slots.reader(source, np.dtype("u8"))
    move = (lambda R: read(R) - base) if back else (lambda R: read(R) + base)
    return [_assign(slots, name, np.dtype("u8"), move)]


_OTHER = {"setp": _compare, "mov": _move, "cvt": _convert, "selp": _select, "cvta": _generic}


def _assign(slots: Slots, register: str, dtype: np.dtype, function):
    """(slot, function of the register file) that puts the function's value into a register."""
    slot, convert = slots.result(register, dtype)
    if convert is None:
        return slot, function
    return slot, lambda R: convert(function(R))


def compute(instruction: Instruction, slots: Slots):
    """What to put where: a list of slots and functions of the register file."""
    m, op = Modifiers(instruction), instruction.opcode
    try:
        if op in _OTHER:
            return _OTHER[op](instruction, slots, m)
        kind = m.type()
        make = _float if kind in ("f16", "f32", "f64", "f16x2") else _integer
        function, dtypes, result = make(op, kind, m)
        m.done()
        name, *operands = instruction.operands
        slot, convert = slots.result(name, result)
        if op == "lop3":
            del operands[3]  # the table
        readers = [slots.reader(o, dtype) for o, dtype in zip(operands, dtypes, strict=True)]
    except (Unsupported, KeyError, ValueError) as error:
        if isinstance(error, Unsupported) and str(error).startswith("line "):
            raise
        raise instruction.unsupported(str(error)) from error
    if convert:
        exact = function
        function = lambda *args: convert(exact(*args))  # noqa: E731
    if len(readers) == 1:
        (a,) = readers
        return [(slot, lambda R: function(a(R)))]
    if len(readers) == 2:
        a, b = readers
        return [(slot, lambda R: function(a(R), b(R)))]
    return [(slot, lambda R: function(*[read(R) for read in readers]))]
