"""Arrays in shared memory: of the type that is computed with, of float64, or of slots."""

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from numbabn.cuda.memory import read, write
from numbabn.cuda.vector import (
    DOUBLE,
    FLOAT,
    I32,
    RAW,
    SHARED,
    Shared,
    Vector,
    array_of,
    lanes_of,
    pack,
    resize,
    scalar_of,
    slot_type,
)


def _shared_array(builder: Any, kind: Any, count: int) -> Any:
    module = builder.module
    name = module.get_unique_name("shared")
    array = ir.GlobalVariable(module, ir.ArrayType(kind, count), name, addrspace=SHARED)
    array.linkage = "internal"
    array.align = 16
    array.initializer = ir.Constant(array.value_type, ir.Undefined)
    return builder.gep(array, [I32(0), I32(0)])


@intrinsic
def shared_like(typingctx: Any, pointer: Any, count: Any) -> Any:
    """`count` (a constant) numbers of the type that what `pointer` points to is computed with."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    result = Shared(pointer.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _shared_array(builder, scalar_of(result.dtype), count.literal_value)

    return result(pointer, count), codegen


@intrinsic
def shared_float64(typingctx: Any, count: Any) -> Any:
    """`count` (a constant) float64 numbers."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    result = Shared(types.float64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _shared_array(builder, DOUBLE, count.literal_value)

    return result(count), codegen


@intrinsic
def shared_slots(typingctx: Any, count: Any) -> Any:
    """`count` (a constant) slots."""
    if not isinstance(count, types.IntegerLiteral):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _shared_array(builder, I32, 4 * count.literal_value)

    return Shared(types.uint32)(count), codegen


def _shared_at(builder: Any, array: Any, i: Any) -> Any:
    return builder.gep(array, [resize(builder, i, I32)])


@intrinsic
def get(typingctx: Any, shared: Any, i: Any) -> Any:
    """Number `i` of an array in shared memory."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_shared_at(builder, *args))

    return shared.dtype(shared, i), codegen


@intrinsic
def put(typingctx: Any, shared: Any, i: Any, value: Any) -> Any:
    """`value` to number `i` of an array in shared memory, rounded to its type."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = args[2]
        if value.type != scalar_of(shared.dtype):
            value = builder.fptrunc(value, FLOAT)
        builder.store(value, _shared_at(builder, args[0], args[1]))
        return context.get_dummy_value()

    return types.void(shared, i, value), codegen


@intrinsic
def get_vector(typingctx: Any, pointer: Any, shared: Any, i: Any) -> Any:
    """As many numbers from `i` on, a multiple of that, as a slot at `pointer` has."""
    result = Vector(shared.dtype, pointer.lanes)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = _shared_at(builder, args[1], args[2])
        piece = ir.VectorType(scalar_of(shared.dtype), 4 if shared.dtype == types.float32 else 2)
        lanes = []
        for j in range(0, result.lanes, piece.count):
            at = builder.bitcast(builder.gep(first, [I32(j)]), piece.as_pointer(SHARED))
            vector = read(builder, at, 16)
            lanes += [builder.extract_element(vector, I32(n)) for n in range(piece.count)]
        return pack(builder, array_of(result), lanes)

    return result(pointer, shared, i), codegen


@intrinsic
def get_columns(typingctx: Any, pointer: Any, shared: Any, k: Any, L: Any) -> Any:
    """Numbers ``k // L``, ``(k + 1) // L`` and so on: those of the channels of columns from `k`."""
    result = Vector(shared.dtype, pointer.lanes)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        k, L = args[2:]
        channel, column = builder.udiv(k, L), builder.urem(k, L)
        lanes = []
        for _ in range(result.lanes):
            lanes.append(builder.load(_shared_at(builder, args[1], channel)))
            column = builder.add(column, column.type(1))
            last = builder.icmp_unsigned("==", column, L)
            channel = builder.add(channel, resize(builder, last, channel.type))
            column = builder.select(last, column.type(0), column)
        return pack(builder, array_of(result), lanes)

    return result(pointer, shared, k, L), codegen


@intrinsic
def put_vector(typingctx: Any, shared: Any, i: Any, vector: Any) -> Any:
    """A vector's numbers to those from `i` on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = _shared_at(builder, args[0], args[1])
        for j, lane in enumerate(lanes_of(builder, args[2])):
            builder.store(lane, builder.gep(first, [I32(j)]))
        return context.get_dummy_value()

    return types.void(shared, i, vector), codegen


def _slot_at(builder: Any, array: Any, i: Any) -> Any:
    first = _shared_at(builder, array, builder.mul(i, i.type(4)))
    return builder.bitcast(first, ir.VectorType(I32, 4).as_pointer(SHARED))


@intrinsic
def get_slot(typingctx: Any, shared: Any, i: Any) -> Any:
    """Slot `i` of an array of slots."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = read(builder, _slot_at(builder, *args), 16)
        return pack(builder, RAW, [builder.extract_element(vector, I32(j)) for j in range(4)])

    return slot_type(shared, i), codegen


@intrinsic
def put_slot(typingctx: Any, shared: Any, i: Any, slot: Any) -> Any:
    """A slot to number `i` of an array of slots."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.Constant(ir.VectorType(I32, 4), ir.Undefined)
        for j, word in enumerate(lanes_of(builder, args[2])):
            vector = builder.insert_element(vector, word, I32(j))
        write(builder, vector, _slot_at(builder, args[0], args[1]), 16)
        return context.get_dummy_value()

    return types.void(shared, i, slot), codegen
