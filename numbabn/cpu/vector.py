"""Sixteen numbers at a time: a SIMD vector type for `@njit` code.

Kernels are written with explicit vectors instead of relying on the loop vectorizer, for three
reasons: the order of every sum is fixed by the source, so results do not depend on the thread
count or on what a loop was inlined into; an access costs no negative-index check; and streaming
stores, masked tails and 16-bit floats need instructions that plain indexing cannot reach.

A vector has 16 lanes on every machine. LLVM cuts it into the registers at hand: one AVX-512
register of float32, two AVX2 registers, four NEON ones. There are two types, ``float32x16`` and
``float64x16``; `memory` loads and stores them.
"""

import operator
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import (
    intrinsic,
    lower_builtin,
    models,
    register_model,
    type_callable,
)

LANES = 16


I1, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()


class Vector(types.Type):
    """Numba's type of a vector of 16 float32 or float64 numbers."""

    def __init__(self, dtype: types.Float):
        self.dtype = dtype
        super().__init__(name=f"{dtype}x{LANES}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector):
        scalar = FLOAT if fe_type.dtype == types.float32 else DOUBLE
        super().__init__(dmm, fe_type, ir.VectorType(scalar, LANES))


float32x16 = Vector(types.float32)
float64x16 = Vector(types.float64)

_COMPUTE = {
    types.float32: float32x16,
    types.float64: float64x16,
    types.int16: float32x16,
    types.uint16: float32x16,
}


def vector_of(pointer: Any) -> Vector:
    """The vector type that what `pointer` points to is computed with."""
    return _COMPUTE[pointer.dtype]


def _llvm(vector: Vector) -> ir.VectorType:
    return ir.VectorType(FLOAT if vector.dtype == types.float32 else DOUBLE, LANES)


def splat(builder: Any, scalar: Any, kind: ir.VectorType) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def first_lanes(builder: Any, count: Any) -> Any:
    """Mask that is true in the first `count` lanes, 0 <= count <= 16."""
    bits = builder.sub(builder.shl(I64(1), count), I64(1))
    return builder.bitcast(builder.trunc(bits, I16), ir.VectorType(I1, LANES))


def call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in args]), name
    )
    return builder.call(function, args)


def suffix(kind: ir.VectorType) -> str:
    scalars = {"float": "f32", "double": "f64", "i16": "i16", "half": "f16"}
    return f"v{kind.count}{scalars[str(kind.element)]}"


@intrinsic
def round_like(typingctx: Any, source: Any, value: Any) -> Any:
    """A float64 `value` rounded to the type that what `source` points to is computed with."""
    dtype = vector_of(source).dtype

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[1] if dtype == types.float64 else builder.fptrunc(args[1], FLOAT)

    return dtype(source, types.float64), codegen


@intrinsic
def splat_like(typingctx: Any, source: Any, value: Any) -> Any:
    """A float64 `value` in all lanes, rounded to what what `source` points to is computed with."""
    vector = vector_of(source)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scalar = args[1] if vector == float64x16 else builder.fptrunc(args[1], FLOAT)
        return splat(builder, scalar, _llvm(vector))

    return vector(source, types.float64), codegen


@intrinsic
def splat64(typingctx: Any, value: Any) -> Any:
    """`value` in all lanes of a float64x16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return splat(builder, args[0], _llvm(float64x16))

    return float64x16(types.float64), codegen


@intrinsic
def is_double(typingctx: Any, source: Any) -> Any:
    """Whether `source` holds float64: a constant, so LLVM drops the branch not taken."""
    answer = source.dtype == types.float64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.boolean, answer)

    return types.boolean(source), codegen


@intrinsic
def widen(typingctx: Any, value: Any) -> Any:
    """float32x16 -> float64x16 (exact); a float64x16 stays as it is."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if value == float64x16 else builder.fpext(args[0], _llvm(float64x16))

    return float64x16(value), codegen


@intrinsic
def narrow_like(typingctx: Any, source: Any, value: Any) -> Any:
    """float64x16 -> the type that what `source` points to is computed with."""
    vector = vector_of(source)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[1] if vector == float64x16 else builder.fptrunc(args[1], _llvm(vector))

    return vector(source, float64x16), codegen


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, rounded once where the machine can."""
    if not (isinstance(a, Vector) and a == b == c):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _llvm(a)
        return call(builder, f"llvm.fmuladd.{suffix(kind)}", kind, list(args))

    return a(a, a, a), codegen


@intrinsic
def clip_below(typingctx: Any, value: Any, floor: Any) -> Any:
    """Lanes under `floor` become `floor`; NaN stays NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *args), args[1], args[0])

    return value(value, value), codegen


@intrinsic
def root(typingctx: Any, value: Any) -> Any:
    """Square roots, correctly rounded."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _llvm(value)
        return call(builder, f"llvm.sqrt.{suffix(kind)}", kind, list(args))

    return value(value), codegen


def _magnitude(builder: Any, value: Any) -> Any:
    return call(builder, f"llvm.fabs.{suffix(value.type)}", value.type, [value])


def _is_finite(builder: Any, value: Any) -> Any:
    limit = ir.Constant(value.type, [float("inf")] * LANES)
    return builder.fcmp_ordered("<", _magnitude(builder, value), limit)


@intrinsic
def where_finite(typingctx: Any, test: Any, value: Any, other: Any) -> Any:
    """Lanes of `value` where `test` is neither infinite nor NaN, of `other` elsewhere."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(_is_finite(builder, args[0]), args[1], args[2])

    return value(test, value, value), codegen


@intrinsic
def where_infinite(typingctx: Any, test: Any, value: Any, other: Any) -> Any:
    """Lanes of `value` where `test` is infinite, of `other` elsewhere."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        limit = ir.Constant(args[0].type, [float("inf")] * LANES)
        infinite = builder.fcmp_ordered("==", _magnitude(builder, args[0]), limit)
        return builder.select(infinite, args[1], args[2])

    return value(test, value, value), codegen


@intrinsic
def where_larger(typingctx: Any, a: Any, b: Any, value: Any, other: Any) -> Any:
    """Lanes of `value` where ``|a| >= |b|``, of `other` elsewhere."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        larger = builder.fcmp_ordered(
            ">=", _magnitude(builder, args[0]), _magnitude(builder, args[1])
        )
        return builder.select(larger, args[2], args[3])

    return value(a, b, value, value), codegen


@intrinsic
def where_nan(typingctx: Any, test: Any, value: Any, other: Any) -> Any:
    """Lanes of `value` where `test` is NaN, of `other` elsewhere."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_unordered("uno", args[0], args[0]), args[1], args[2])

    return value(test, value, value), codegen


@intrinsic
def positive_bits(typingctx: Any, value: Any) -> Any:
    """A 16-bit number whose bit ``i`` says whether lane ``i`` is greater than zero (or NaN)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = builder.fcmp_unordered(">", args[0], ir.Constant(args[0].type, None))
        return builder.bitcast(mask, I16)

    return types.uint16(value), codegen


@intrinsic
def keep(typingctx: Any, value: Any, bits: Any) -> Any:
    """Lanes of `value` whose bit in `bits` is set; zero elsewhere."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = builder.bitcast(args[1], ir.VectorType(I1, LANES))
        return builder.select(mask, args[0], ir.Constant(args[0].type, None))

    return value(value, types.uint16), codegen


@intrinsic
def blend(typingctx: Any, count: Any, first: Any, rest: Any) -> Any:
    """The first `count` lanes of `first`, and the other lanes of `rest`; 0 <= count <= 16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(first_lanes(builder, args[0]), args[1], args[2])

    return first(types.int64, first, first), codegen


@intrinsic
def sum_lanes(typingctx: Any, value: Any) -> Any:
    """Sum of the 16 lanes, by halving: ``(0+8, 1+9, …)``, then 4, 2, 1. A fixed order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total = args[0]
        width = LANES
        while width > 1:
            width //= 2
            low = ir.Constant(ir.VectorType(I32, width), list(range(width)))
            high = ir.Constant(ir.VectorType(I32, width), list(range(width, 2 * width)))
            total = builder.fadd(
                builder.shuffle_vector(total, total, low),
                builder.shuffle_vector(total, total, high),
            )
        return builder.extract_element(total, I32(0))

    return value.dtype(value), codegen


def _halve(width: int) -> Any:
    @intrinsic
    def halve(typingctx: Any, a: Any, b: Any) -> Any:
        starts = range(0, 2 * LANES, width)
        low = [start + lane for start in starts for lane in range(width // 2)]
        high = [lane + width // 2 for lane in low]

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.VectorType(I32, LANES)
            return builder.fadd(
                builder.shuffle_vector(*args, ir.Constant(kind, low)),
                builder.shuffle_vector(*args, ir.Constant(kind, high)),
            )

        return a(a, a), codegen

    return halve


# Of two vectors, which hold groups of so many lanes: to each group's first half, its second added.
# After halving 16, 8, 4 and 2, sixteen vectors have become one, of their `sum_lanes`.
halve_16, halve_8, halve_4, halve_2 = (_halve(width) for width in (16, 8, 4, 2))


def _operator(operation: Any, instruction: str) -> None:
    """Let `operation` work on two vectors of one type."""

    @type_callable(operation)
    def typing(context: Any) -> Any:
        def typer(a: Any, b: Any) -> Any:
            return a if isinstance(a, Vector) and a == b else None

        return typer

    @lower_builtin(operation, Vector, Vector)
    def lowering(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")
