"""Vectors from memory and back: whole, in part, and past the caches.

Memory is a pointer, from `pointer(array)`, and an index: in inner loops arrays would cost atomic
reference counting, and negative-index checks. A pointer does not keep its array alive, so take
it in a function that was given the array, never in the one that made it.

==========  ==============  ===================
pointer to  holds           is computed with as
==========  ==============  ===================
float32     float32         float32
float64     float64         float64
int16       float16 bits    float32
uint16      bfloat16 bits   float32
==========  ==============  ===================
"""

from functools import cache
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba.core import config, types
from numba.extending import intrinsic, overload

from numbabn.cpu.boundaries import boundary_of, elements_to_boundary
from numbabn.cpu.options import inline
from numbabn.cpu.vector import (
    DOUBLE,
    FLOAT,
    HALF,
    I16,
    I32,
    I64,
    LANES,
    call,
    first_lanes,
    float64x16,
    suffix,
    vector_of,
)


def _memory_type(pointer: Any) -> ir.VectorType:
    scalar = {types.float32: FLOAT, types.float64: DOUBLE}.get(pointer.dtype, I16)
    return ir.VectorType(scalar, LANES)


def _at(builder: Any, pointer: Any, index: Any, kind: Any) -> Any:
    """``&pointer[index]``, as a pointer to `kind`; negative indices are not wrapped round."""
    return builder.bitcast(builder.gep(pointer, [index]), kind.as_pointer())


def _decode(builder: Any, pointer: Any, value: Any) -> Any:
    """Lanes as they lie in memory -> lanes to compute with."""
    if pointer.dtype == types.int16:
        return builder.fpext(
            builder.bitcast(value, ir.VectorType(HALF, LANES)), ir.VectorType(FLOAT, LANES)
        )
    if pointer.dtype == types.uint16:
        wide = builder.zext(value, ir.VectorType(I32, LANES))
        shifted = builder.shl(wide, ir.Constant(wide.type, [16] * LANES))
        return builder.bitcast(shifted, ir.VectorType(FLOAT, LANES))
    return value


@cache
def _has(feature: str) -> bool:
    """Whether kernels are compiled for this processor, and it has such instructions of AVX's."""
    if config.CPU_NAME or config.CPU_FEATURES or not config.ENABLE_AVX:
        return False
    return bool(llvmlite.binding.get_host_cpu_features().get(feature))


def _to_half(builder: Any, value: Any) -> Any:
    """Lanes rounded to float16, as integers."""
    integers = ir.VectorType(I16, LANES)
    if _has("avx512fp16") and value.type.element == FLOAT:
        # There LLVM would store halves as such, for which it knows no streaming store.
        name = "llvm.x86.avx512.mask.vcvtps2ph.512"
        current_rounding, all_lanes = I32(4), I16(0xFFFF)
        old = ir.Constant(integers, ir.Undefined)
        return call(builder, name, integers, [value, current_rounding, old, all_lanes])
    return builder.bitcast(builder.fptrunc(value, ir.VectorType(HALF, LANES)), integers)


def _encode(builder: Any, pointer: Any, value: Any) -> Any:
    """Lanes computed with -> lanes as they lie in memory, rounded to nearest even."""
    if pointer.dtype == types.int16:
        return _to_half(builder, value)
    if pointer.dtype == types.uint16:
        # Adding 0x7FFF, or 0x8000 where the last kept bit is odd, carries into the kept half
        # exactly when nearest-even rounds up. NaN would overflow into infinity: keep it quiet.
        wide = ir.VectorType(I32, LANES)
        bits = builder.bitcast(value, wide)

        def const(number: int) -> Any:
            return ir.Constant(wide, [number] * LANES)

        odd = builder.and_(builder.lshr(bits, const(16)), const(1))
        rounded = builder.add(builder.add(bits, const(0x7FFF)), odd)
        is_nan = builder.fcmp_unordered("uno", value, value)
        chosen = builder.select(is_nan, builder.or_(bits, const(0x400000)), rounded)
        return builder.trunc(builder.lshr(chosen, const(16)), ir.VectorType(I16, LANES))
    return value


@intrinsic
def _array_pointer(typingctx: Any, array: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_array(array)(context, builder, value=args[0]).data

    return types.CPointer(array.dtype)(array), codegen


def pointer(array: Any) -> Any:
    """Pointer to a C-contiguous array's first element; None of None."""
    raise NotImplementedError("for use in @njit code only")


@overload(pointer)
def _pointer(array):
    if isinstance(array, types.Array):
        return lambda array: _array_pointer(array)
    return lambda array: None


@intrinsic
def address(typingctx: Any, array: Any) -> Any:
    """Where an array's first element lies; its own ``ctypes.data`` would count references."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, value=args[0]).data
        return builder.ptrtoint(data, I64)

    return types.int64(array), codegen


@intrinsic
def offset(typingctx: Any, source: Any, index: Any) -> Any:
    """Pointer to ``source[index]``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return source(source, types.int64), codegen


@intrinsic
def load(typingctx: Any, source: Any, index: Any) -> Any:
    """``source[index : index + 16]``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _at(builder, args[0], args[1], _memory_type(source))
        value = builder.load(place, align=source.dtype.bitwidth // 8)
        return _decode(builder, source, value)

    return vector_of(source)(source, types.int64), codegen


@intrinsic
def load_first(typingctx: Any, source: Any, index: Any, count: Any, fill: Any) -> Any:
    """``source[index : index + count]`` in the first `count` lanes, `fill`'s lanes in the rest."""
    vector = vector_of(source)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _memory_type(source)
        place = _at(builder, args[0], args[1], kind)
        align = I32(source.dtype.bitwidth // 8)
        mask = first_lanes(builder, args[2])
        name = f"llvm.masked.load.{suffix(kind)}.p0"
        raw = call(builder, name, kind, [place, align, mask, ir.Constant(kind, None)])
        return builder.select(mask, _decode(builder, source, raw), args[3])

    return vector(source, types.int64, types.int64, vector), codegen


@intrinsic
def store(typingctx: Any, target: Any, index: Any, value: Any) -> Any:
    """``target[index : index + 16] = value``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        encoded = _encode(builder, target, args[2])
        place = _at(builder, args[0], args[1], encoded.type)
        builder.store(encoded, place, align=target.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(target, types.int64, vector_of(target)), codegen


@intrinsic
def stream(typingctx: Any, target: Any, index: Any, value: Any) -> Any:
    """`store` past the caches; the address must be a multiple of 64 bytes (32 for 16 bits)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        encoded = _encode(builder, target, args[2])
        if encoded.type.element == I16 and _has("avx"):
            # LLVM would narrow and store by one instruction, of which there is none that streams.
            same = ir.FunctionType(encoded.type, [encoded.type])
            encoded = builder.asm(same, "", "=x,0", [encoded], side_effect=False)
        place = _at(builder, args[0], args[1], encoded.type)
        instruction = builder.store(encoded, place, align=boundary_of(target))
        instruction.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))
        return context.get_dummy_value()

    return types.void(target, types.int64, vector_of(target)), codegen


@intrinsic
def store_first(typingctx: Any, target: Any, index: Any, count: Any, value: Any) -> Any:
    """``target[index : index + count] = value[:count]``, for count < 16.

    In pieces of 8, 4, 2 and 1: a masked store takes over a hundred cycles on some AMD cores.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, index, count, value = args
        rest = _encode(builder, target, value)
        for width in (8, 4, 2, 1):
            low = ir.Constant(ir.VectorType(I32, width), list(range(width)))
            high = ir.Constant(ir.VectorType(I32, width), list(range(width, 2 * width)))
            first = builder.shuffle_vector(rest, rest, low)
            other = builder.shuffle_vector(rest, rest, high)
            has_piece = builder.icmp_unsigned("!=", builder.and_(count, I64(width)), I64(0))
            with builder.if_then(has_piece):
                place = _at(builder, pointer, index, first.type)
                builder.store(first, place, align=target.dtype.bitwidth // 8)
            index = builder.select(has_piece, builder.add(index, I64(width)), index)
            rest = builder.select(has_piece, other, first)
        return context.get_dummy_value()

    return types.void(target, types.int64, types.int64, vector_of(target)), codegen


# Bytes to fetch ahead of where one reads. The hardware's own prefetchers follow too closely on it
# to keep a core's share of the memory busy (measured: 24 GB/s without, 54 GB/s from 8 KiB on).
AHEAD = 16 << 10


@intrinsic
def values_in(typingctx: Any, source: Any, nbytes: Any) -> Any:
    """How many elements of `source` so many bytes are."""
    size = source.dtype.bitwidth // 8

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.lshr(args[1], I64(size.bit_length() - 1))

    return types.int64(source, types.int64), codegen


@inline
def values_ahead(source):
    """`AHEAD` in elements."""
    return values_in(source, AHEAD)


@cache
def _follows_sequences() -> bool:
    """Whether the processor's own prefetchers keep up with what is read in sequence.

    Measured: those of Zen 4 do, and hints cost up to a tenth; those of Sapphire Rapids do not. Both
    need hints where pieces of rows are read.
    """
    name = config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
    return bool(name.startswith("znver"))


def if_needed(ahead: Any) -> Any:
    """`ahead`, or None on a processor that needs no hints of what is read in sequence."""
    raise NotImplementedError("for use in @njit code only")


@overload(if_needed)
def _if_needed(ahead):
    if _follows_sequences():
        return lambda ahead: None
    return lambda ahead: ahead


def follows_sequences() -> bool:
    """Whether that is such a processor."""
    raise NotImplementedError("for use in @njit code only")


@overload(follows_sequences)
def _follows() -> Any:
    answer = _follows_sequences()
    return lambda: answer


@intrinsic
def prefetch(typingctx: Any, source: Any, index: Any) -> Any:
    """Ask for the cache lines of ``source[index : index + 16]``, if they begin on a boundary.

    Any index is allowed: nothing is read.
    """
    lines = max(1, LANES * source.dtype.bitwidth // 8 // 64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        hints = [I32(0), I32(2), I32(1)]  # to read, to be kept in L2, from the data cache
        for line in range(lines):
            index = builder.add(args[1], I64(line * (LANES // lines)))
            place = _at(builder, args[0], index, ir.IntType(8))
            call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, *hints])
        return context.get_dummy_value()

    return types.void(source, types.int64), codegen


@intrinsic
def scalar(typingctx: Any, source: Any, index: Any) -> Any:
    """``float64(source[index])``, whatever `source` holds."""
    vector = vector_of(source)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = builder.load(builder.gep(args[0], [args[1]]))
        if source.dtype == types.int16:
            raw = builder.fpext(builder.bitcast(raw, HALF), FLOAT)
        elif source.dtype == types.uint16:
            raw = builder.bitcast(builder.shl(builder.zext(raw, I32), I32(16)), FLOAT)
        return raw if vector == float64x16 else builder.fpext(raw, DOUBLE)

    return types.float64(source, types.int64), codegen


def empty_like_computed(pointer: Any, shape: Any) -> Any:
    """Uninitialised array of the numbers that what `pointer` points to is computed with."""
    raise NotImplementedError("for use in @njit code only")


@overload(empty_like_computed)
def _empty_like_computed(pointer, shape):
    if vector_of(pointer) == float64x16:
        return lambda pointer, shape: np.empty(shape, np.float64)
    return lambda pointer, shape: np.empty(shape, np.float32)


@inline
def load_upto(source, index, count, fill):
    """`load` if `count` is 16 or more, else `load_first`."""
    return load(source, index) if count >= LANES else load_first(source, index, count, fill)


@inline
def put(target, index, count, value, streaming):
    """`store`, `stream` or `store_first`; nothing where `target` is None."""
    if target is not None:
        if count < LANES:
            store_first(target, index, count, value)
        elif streaming:
            stream(target, index, value)
        else:
            store(target, index, value)


@inline
def aligned(source):
    """The first number at or after `source`, scratch memory, that is on a boundary of 64 bytes."""
    return offset(source, elements_to_boundary(source, 0))
