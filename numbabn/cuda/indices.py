"""Indices: unsigned numbers of 32 or 64 bits, which arithmetic does not widen."""

import operator
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic, lower_builtin, type_callable

from numbabn.cuda.vector import DOUBLE, Index, resize, scalar_of


@intrinsic
def index(typingctx: Any, value: Any) -> Any:
    """An integer as an index of its own width."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    return Index(value.bitwidth)(value), codegen


@intrinsic
def like(typingctx: Any, model: Any, value: Any) -> Any:
    """An integer that is not negative, or an index, as an index as wide as `model`."""
    source = types.int64 if isinstance(value, types.IntegerLiteral) else value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return resize(builder, args[1], ir.IntType(model.bits))

    return model(model, source), codegen


@intrinsic
def as_float(typingctx: Any, pointer: Any, value: Any) -> Any:
    """An index as a number of the type that what `pointer` points to is computed with."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.uitofp(args[1], scalar_of(pointer.dtype))

    return pointer.dtype(pointer, value), codegen


@intrinsic
def as_float64(typingctx: Any, value: Any) -> Any:
    """An index as float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.uitofp(args[0], DOUBLE)

    return types.float64(value), codegen


def _index_operator(operation: Any, result: Any, emit: Any) -> None:
    @type_callable(operation)
    def typing(context: Any) -> Any:
        def typer(a: Any, b: Any) -> Any:
            if isinstance(a, Index) and isinstance(b, (Index, types.Integer)):
                return a if result is None else result
            return None

        return typer

    def lowering(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit(builder, args[0], resize(builder, args[1], args[0].type))

    lower_builtin(operation, Index, Index)(lowering)
    lower_builtin(operation, Index, types.Integer)(lowering)


for _operation, _name in (
    (operator.add, "add"),
    (operator.sub, "sub"),
    (operator.mul, "mul"),
    (operator.floordiv, "udiv"),
    (operator.mod, "urem"),
    (operator.and_, "and_"),
    (operator.rshift, "lshr"),
):
    _index_operator(_operation, None, lambda builder, a, b, n=_name: getattr(builder, n)(a, b))
for _operation, _sign in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
    (operator.ne, "!="),
):
    _index_operator(
        _operation, types.boolean, lambda builder, a, b, s=_sign: builder.icmp_unsigned(s, a, b)
    )


@intrinsic
def smaller(typingctx: Any, a: Any, b: Any) -> Any:
    """The smaller of two indices."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.icmp_unsigned("<", *args), *args)

    return a(a, a), codegen
