"""Single numbers and bytes from global memory and back; some of types known only at run time."""

from typing import Any

from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

from numbabn.cuda.memory import narrowed, place, read, stored_as, widened, write
from numbabn.cuda.vector import DOUBLE, FLOAT, I8, I32, ITEMSIZE, Pointer


@intrinsic
def scalar(typingctx: Any, pointer: Any, i: Any) -> Any:
    """The number ``pointer[i]``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size = ITEMSIZE[pointer.storage]
        number = read(builder, place(builder, args[0], args[1], size, stored_as(pointer)), size)
        return widened(builder, pointer, number)

    return pointer.dtype(pointer, i), codegen


@intrinsic
def store_scalar(typingctx: Any, pointer: Any, i: Any, value: Any) -> Any:
    """A number, of the type that is computed with, to ``pointer[i]``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, i, value = args
        size = ITEMSIZE[pointer.storage]
        number = narrowed(builder, pointer, value)
        write(builder, number, place(builder, base, i, size, stored_as(pointer)), size)
        return context.get_dummy_value()

    return types.void(pointer, i, pointer.dtype), codegen


@intrinsic
def load_float64(typingctx: Any, address: Any, i: Any) -> Any:
    """The float64 number `i` at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return read(builder, place(builder, args[0], args[1], 8, DOUBLE), 8)

    return types.float64(types.uint64, i), codegen


@intrinsic
def store_float64(typingctx: Any, address: Any, i: Any, value: Any) -> Any:
    """`value` to number `i` of the float64 numbers at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        write(builder, args[2], place(builder, args[0], args[1], 8, DOUBLE), 8)
        return context.get_dummy_value()

    return types.void(types.uint64, i, types.float64), codegen


def _part_of(pointer: Any) -> tuple[Any, int]:
    """The type, and its size, of sums of what `pointer` points to, where chunks leave them."""
    return (FLOAT, 4) if ITEMSIZE[pointer.storage] == 2 else (DOUBLE, 8)


@intrinsic
def load_sum(typingctx: Any, pointer: Any, address: Any, i: Any) -> Any:
    """Number `i` of the sums at `address`, as float64: they are float32 of 16-bit numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, size = _part_of(pointer)
        value = read(builder, place(builder, args[1], args[2], size, kind), size)
        return value if kind == DOUBLE else builder.fpext(value, DOUBLE)

    return types.float64(pointer, types.uint64, i), codegen


@intrinsic
def store_sum(typingctx: Any, pointer: Any, address: Any, i: Any, value: Any) -> Any:
    """The float64 `value` to where `load_sum` would find it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, size = _part_of(pointer)
        value = args[3] if kind == DOUBLE else builder.fptrunc(args[3], FLOAT)
        write(builder, value, place(builder, args[1], args[2], size, kind), size)
        return context.get_dummy_value()

    return types.void(pointer, types.uint64, i, types.float64), codegen


def _for_each_kind(builder: Any, kind: Any, emit: Any) -> None:
    """``emit(storage)`` for the storage whose number is `kind`."""
    after = builder.append_basic_block("after")
    switch = builder.switch(kind, after)
    for storage in range(4):
        block = builder.append_basic_block(f"kind{storage}")
        switch.add_case(kind.type(storage), block)
        builder.position_at_end(block)
        emit(Pointer(storage, False))
        builder.branch(after)
    builder.position_at_end(after)


@intrinsic
def load_any(typingctx: Any, address: Any, kind: Any, i: Any) -> Any:
    """Number `i` at `address`, stored as `kind` (FLOAT32 and so on) says, as float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        result = cgutils.alloca_once(builder, DOUBLE)

        def emit(pointer: Pointer) -> None:
            size = ITEMSIZE[pointer.storage]
            number = read(builder, place(builder, args[0], args[2], size, stored_as(pointer)), size)
            value = widened(builder, pointer, number)
            builder.store(value if size == 8 else builder.fpext(value, DOUBLE), result)

        _for_each_kind(builder, args[1], emit)
        return builder.load(result)

    return types.float64(types.uint64, types.int64, i), codegen


@intrinsic
def store_any(typingctx: Any, address: Any, kind: Any, i: Any, value: Any) -> Any:
    """The float64 `value` to where `load_any` would find it, rounded."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def emit(pointer: Pointer) -> None:
            size = ITEMSIZE[pointer.storage]
            value = args[3] if size == 8 else builder.fptrunc(args[3], FLOAT)
            number = narrowed(builder, pointer, value)
            write(
                builder,
                number,
                place(builder, args[0], args[2], size, stored_as(pointer)),
                size,
            )

        _for_each_kind(builder, args[1], emit)
        return context.get_dummy_value()

    return types.void(types.uint64, types.int64, i, types.float64), codegen


@intrinsic
def load_byte(typingctx: Any, address: Any, i: Any) -> Any:
    """Byte `i` at `address`, as 32 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(read(builder, place(builder, args[0], args[1], 1, I8), 1), I32)

    return types.uint32(types.uint64, i), codegen


@intrinsic
def store_byte(typingctx: Any, address: Any, i: Any, value: Any) -> Any:
    """The lowest 8 bits of `value` to byte `i` at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = builder.trunc(args[2], I8)
        write(builder, byte, place(builder, args[0], args[1], 1, I8), 1)
        return context.get_dummy_value()

    return types.void(types.uint64, i, types.uint32), codegen
