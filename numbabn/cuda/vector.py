"""What kernels compute with: indices, pointers, slots of 16 bytes, and vectors, as Numba types.

Numba's own integers grow to 64 bits at every operation, its arrays wrap negative indices round,
and it has neither 128-bit accesses nor 16-bit floats that need no library. The types here do what
they say and nothing else:

========== ==============================================================================
`Index`    an unsigned number of 32 or 64 bits, which stays as wide as it is
`Pointer`  a global address, and how what it points to is stored
`Slot`     16 bytes as they lie in memory: 4 float32, 2 float64, or 8 of a 16-bit type
`Vector`   a slot's numbers as they are computed with: float32, or float64 for float64
========== ==============================================================================

A vector is an array of scalars to LLVM, never an LLVM vector: the compiler miscompiles some
conversions of those. All operations are unrolled here, so kernels hold slots in registers.
"""

import operator
from typing import Any

from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic, lower_builtin, models, register_model, type_callable

FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(4)
ITEMSIZE = (4, 8, 2, 2)
LANES = (4, 2, 8, 8)  # numbers in a slot

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
RAW = ir.ArrayType(I32, 4)
GLOBAL, SHARED = 1, 3  # address spaces


class Index(types.Type):
    """An unsigned integer that arithmetic does not widen."""

    def __init__(self, bits: int):
        self.bits = bits
        super().__init__(name=f"index{bits}")


class Pointer(types.Type):
    """An address in global memory; `aligned` if slots there may be read as a whole.

    `wide` if there are too many elements to count them with 32 bits.
    """

    def __init__(self, storage: int, aligned: bool, wide: bool = False):
        self.storage, self.aligned = storage, aligned
        self.index = Index(64 if wide else 32)
        self.lanes = LANES[storage]
        self.dtype = types.float64 if storage == FLOAT64 else types.float32
        super().__init__(name=f"pointer({storage}, {aligned}, {wide})")


class Slot(types.Type):
    """16 bytes of memory, in registers."""

    def __init__(self) -> None:
        super().__init__(name="slot")


class Vector(types.Type):
    """Numbers to compute with, one for each that a slot holds."""

    def __init__(self, dtype: Any, lanes: int):
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"{dtype}x{lanes}")


class Shared(types.Type):
    """An array in shared memory."""

    def __init__(self, dtype: Any):
        self.dtype = dtype
        super().__init__(name=f"shared({dtype})")


def scalar_of(dtype: Any) -> Any:
    return {types.float32: FLOAT, types.float64: DOUBLE, types.uint32: I32}[dtype]


def array_of(vector: Vector) -> Any:
    return ir.ArrayType(scalar_of(vector.dtype), vector.lanes)


def _model(name: str, kind: Any, of: Any) -> None:
    """Have values of Numba type `kind` be ``of(kind)`` to LLVM."""

    def init(self: Any, dmm: Any, fe_type: Any) -> None:
        models.PrimitiveModel.__init__(self, dmm, fe_type, of(fe_type))

    register_model(kind)(type(name, (models.PrimitiveModel,), {"__init__": init}))


_model("_IndexModel", Index, lambda index: ir.IntType(index.bits))
_model("_PointerModel", Pointer, lambda pointer: I64)
_model("_SlotModel", Slot, lambda slot: RAW)
_model("_VectorModel", Vector, array_of)
_model("_SharedModel", Shared, lambda s: scalar_of(s.dtype).as_pointer(SHARED))

slot_type = Slot()


def vector_of(pointer: Pointer) -> Vector:
    """The type of a slot's numbers there."""
    return Vector(pointer.dtype, pointer.lanes)


def lanes_of(builder: Any, value: Any) -> list[Any]:
    return [builder.extract_value(value, j) for j in range(value.type.count)]


def pack(builder: Any, kind: Any, values: list[Any]) -> Any:
    packed = ir.Constant(kind, ir.Undefined)
    for j, value in enumerate(values):
        packed = builder.insert_value(packed, value, j)
    return packed


def call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in args]), name
    )
    return builder.call(function, args)


def resize(builder: Any, value: Any, kind: Any) -> Any:
    if value.type.width > kind.width:
        return builder.trunc(value, kind)
    return builder.zext(value, kind) if value.type.width < kind.width else value


@intrinsic
def round_like(typingctx: Any, pointer: Any, value: Any) -> Any:
    """A float64 `value` rounded to the type that what `pointer` points to is computed with."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[1] if pointer.dtype == types.float64 else builder.fptrunc(args[1], FLOAT)

    return pointer.dtype(pointer, types.float64), codegen


@intrinsic
def widen(typingctx: Any, value: Any) -> Any:
    """A scalar or vector in float64, exactly."""
    is_vector = isinstance(value, Vector)
    result = Vector(types.float64, value.lanes) if is_vector else types.float64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if value == result:
            return args[0]
        if not is_vector:
            return builder.fpext(args[0], DOUBLE)
        lanes = [builder.fpext(lane, DOUBLE) for lane in lanes_of(builder, args[0])]
        return pack(builder, array_of(result), lanes)

    return result(value), codegen


@intrinsic
def splat(typingctx: Any, pointer: Any, value: Any) -> Any:
    """A scalar in all lanes of a vector as long as a slot at `pointer`."""
    result = Vector(value, pointer.lanes)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return pack(builder, array_of(result), [args[1]] * result.lanes)

    return result(pointer, value), codegen


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, rounded once: scalars or vectors, also mixed."""
    kinds = (a, b, c)
    vectors = [kind for kind in kinds if isinstance(kind, Vector)]
    result = vectors[0] if vectors else a
    dtype = result.dtype if vectors else a

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name = "llvm.fma.f32" if dtype == types.float32 else "llvm.fma.f64"
        if not vectors:
            return call(builder, name, scalar_of(dtype), list(args))
        columns = [
            lanes_of(builder, arg) if isinstance(kind, Vector) else [arg] * result.lanes
            for kind, arg in zip(kinds, args, strict=True)
        ]
        lanes = [
            call(builder, name, scalar_of(dtype), list(lane)) for lane in zip(*columns, strict=True)
        ]
        return pack(builder, array_of(result), lanes)

    return result(a, b, c), codegen


@intrinsic
def clip_below(typingctx: Any, value: Any, floor: Any) -> Any:
    """Lanes under the scalar `floor` become `floor`; NaN stays NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = [
            builder.select(builder.fcmp_ordered("<", lane, args[1]), args[1], lane)
            for lane in lanes_of(builder, args[0])
        ]
        return pack(builder, args[0].type, lanes)

    return value(value, floor), codegen


@intrinsic
def positive_bits(typingctx: Any, value: Any) -> Any:
    """A number whose bit ``j`` says whether lane ``j`` is greater than zero (or NaN)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = I32(0)
        for j, lane in enumerate(lanes_of(builder, args[0])):
            bit = builder.fcmp_unordered(">", lane, lane.type(0.0))
            bits = builder.or_(bits, builder.select(bit, I32(1 << j), I32(0)))
        return bits

    return types.uint32(value), codegen


@intrinsic
def keep(typingctx: Any, value: Any, bits: Any) -> Any:
    """Lanes of `value` whose bit is set; zero elsewhere."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = []
        for j, lane in enumerate(lanes_of(builder, args[0])):
            bit = builder.icmp_unsigned("!=", builder.and_(args[1], I32(1 << j)), I32(0))
            lanes.append(builder.select(bit, lane, lane.type(0.0)))
        return pack(builder, args[0].type, lanes)

    return value(value, types.uint32), codegen


@intrinsic
def part_bits(typingctx: Any, lo: Any, hi: Any) -> Any:
    """A number whose bits lo:hi are set (at most 8)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lo, hi = (resize(builder, arg, I32) for arg in args)
        below = [builder.shl(I32(1), n) for n in (lo, hi)]
        empty = builder.icmp_unsigned(">=", lo, hi)
        return builder.select(empty, I32(0), builder.sub(below[1], below[0]))

    return types.uint32(lo, hi), codegen


@intrinsic
def lane(typingctx: Any, value: Any, j: Any) -> Any:
    """Lane `j` (a constant) of a vector."""
    if not isinstance(j, types.IntegerLiteral):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_value(args[0], j.literal_value)

    return value.dtype(value, j), codegen


@intrinsic
def pick(typingctx: Any, value: Any, j: Any) -> Any:
    """Lane `j` (an index) of a vector."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = lanes_of(builder, args[0])
        chosen = lanes[0]
        for n, one in enumerate(lanes[1:], 1):
            here = builder.icmp_unsigned("==", args[1], args[1].type(n))
            chosen = builder.select(here, one, chosen)
        return chosen

    return value.dtype(value, j), codegen


@intrinsic
def sum_lanes(typingctx: Any, value: Any) -> Any:
    """Sum of the lanes, by halving: a fixed order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = lanes_of(builder, args[0])
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [builder.fadd(lanes[j], lanes[j + half]) for j in range(half)]
        return lanes[0]

    return value.dtype(value), codegen


@intrinsic
def close_sum(typingctx: Any, total: Any, lost: Any) -> Any:
    """``total + lost``, or the total alone where it is infinite, which makes what was lost NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        is_vector = isinstance(total, Vector)
        columns = [lanes_of(builder, arg) if is_vector else [arg] for arg in args]
        lanes = []
        for a, b in zip(*columns, strict=True):
            usable = builder.fcmp_ordered("ord", b, b)
            lanes.append(builder.select(usable, builder.fadd(a, b), a))
        return pack(builder, args[0].type, lanes) if is_vector else lanes[0]

    return total(total, lost), codegen


@intrinsic
def doubtful(typingctx: Any, squares: Any, shift: Any) -> Any:
    """Whether squares may have been lost, summing to `squares` about something near `shift`.

    A sum of float32 squares is good if it is neither near overflow (or NaN) nor so small that
    squares can have underflowed. It is 0, rightly, for equal numbers that are not tiny. Of float64
    only infinity and NaN are doubtful: they must be summed, not merged, to come out right.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bad = I1(0)
        if squares in (types.float64, Vector(types.float64, 2)):
            totals = [args[0]] if squares == types.float64 else lanes_of(builder, args[0])
            for total in totals:
                infinite = builder.fcmp_unordered(">=", total, DOUBLE(float("inf")))
                bad = builder.or_(bad, infinite)
            return bad
        pairs = (
            [args]
            if squares == types.float32
            else zip(*(lanes_of(builder, a) for a in args), strict=True)
        )
        for total, near in pairs:
            good = builder.and_(
                builder.fcmp_ordered(">", total, FLOAT(2.0**-100)),
                builder.fcmp_ordered("<", total, FLOAT(2.0**100)),
            )
            large = builder.or_(
                builder.fcmp_ordered(">", near, FLOAT(2.0**-40)),
                builder.fcmp_ordered("<", near, FLOAT(-(2.0**-40))),
            )
            equal = builder.and_(builder.fcmp_ordered("==", total, FLOAT(0.0)), large)
            bad = builder.or_(bad, builder.not_(builder.or_(good, equal)))
        return bad

    return types.boolean(squares, shift), codegen


def _vector_operator(operation: Any, instruction: str) -> None:
    """Let `operation` work on two vectors of one type, or a vector and its scalar."""

    @type_callable(operation)
    def typing(context: Any) -> Any:
        def typer(a: Any, b: Any) -> Any:
            if isinstance(a, Vector) and (a == b or b == a.dtype):
                return a
            return None

        return typer

    def lowering(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a = lanes_of(builder, args[0])
        is_vector = isinstance(signature.args[1], Vector)
        b = lanes_of(builder, args[1]) if is_vector else [args[1]] * len(a)
        emit = getattr(builder, instruction)
        lanes = [emit(*pair) for pair in zip(a, b, strict=True)]
        return pack(builder, args[0].type, lanes)

    lower_builtin(operation, Vector, Vector)(lowering)
    lower_builtin(operation, Vector, types.Float)(lowering)


_vector_operator(operator.add, "fadd")
_vector_operator(operator.sub, "fsub")
_vector_operator(operator.mul, "fmul")
