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
from numba.cuda.extending import (
    intrinsic,
    lower_builtin,
    models,
    register_model,
    type_callable,
)

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


def _scalar(dtype: Any) -> Any:
    return {types.float32: FLOAT, types.float64: DOUBLE}[dtype]


def _array(vector: Vector) -> Any:
    return ir.ArrayType(_scalar(vector.dtype), vector.lanes)


def _model(name: str, kind: Any, of: Any) -> None:
    """Have values of Numba type `kind` be ``of(kind)`` to LLVM."""

    def init(self: Any, dmm: Any, fe_type: Any) -> None:
        models.PrimitiveModel.__init__(self, dmm, fe_type, of(fe_type))

    register_model(kind)(type(name, (models.PrimitiveModel,), {"__init__": init}))


_model("_IndexModel", Index, lambda index: ir.IntType(index.bits))
_model("_PointerModel", Pointer, lambda pointer: I64)
_model("_SlotModel", Slot, lambda slot: RAW)
_model("_VectorModel", Vector, _array)
_model("_SharedModel", Shared, lambda s: _scalar(s.dtype).as_pointer(SHARED))

slot_type = Slot()


def vector_of(pointer: Pointer) -> Vector:
    """The type of a slot's numbers there."""
    return Vector(pointer.dtype, pointer.lanes)


def _lanes(builder: Any, value: Any) -> list[Any]:
    return [builder.extract_value(value, j) for j in range(value.type.count)]


def _pack(builder: Any, kind: Any, values: list[Any]) -> Any:
    packed = ir.Constant(kind, ir.Undefined)
    for j, value in enumerate(values):
        packed = builder.insert_value(packed, value, j)
    return packed


def _call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in args]), name
    )
    return builder.call(function, args)


def _resize(builder: Any, value: Any, kind: Any) -> Any:
    if value.type.width > kind.width:
        return builder.trunc(value, kind)
    return builder.zext(value, kind) if value.type.width < kind.width else value


# --- indices --------------------------------------------------------------------------------


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
        return _resize(builder, args[1], ir.IntType(model.bits))

    return model(model, source), codegen


@intrinsic
def as_float(typingctx: Any, pointer: Any, value: Any) -> Any:
    """An index as a number of the type that what `pointer` points to is computed with."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.uitofp(args[1], _scalar(pointer.dtype))

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
        return emit(builder, args[0], _resize(builder, args[1], args[0].type))

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


# --- memory ---------------------------------------------------------------------------------


@intrinsic
def pointer(typingctx: Any, storage: Any, aligned: Any, wide: Any, address: Any) -> Any:
    """A pointer from an address; `storage`, `aligned` and `wide` are constants."""
    constants = (storage, aligned, wide)
    if not all(isinstance(constant, types.IntegerLiteral) for constant in constants):
        return None
    kind = Pointer(*(constant.literal_value for constant in constants))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[3]

    return kind(*constants, types.uint64), codegen


@intrinsic
def element(typingctx: Any, pointer: Any, row: Any, stride: Any, column: Any) -> Any:
    """``row * stride + column``, as wide as `pointer` needs."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.IntType(pointer.index.bits)
        row, stride, column = (_resize(builder, arg, kind) for arg in args[1:])
        return builder.add(builder.mul(row, stride), column)

    return pointer.index(pointer, row, stride, column), codegen


@intrinsic
def is_double(typingctx: Any, pointer: Any) -> Any:
    """Whether numbers there are computed with as float64: a constant."""
    answer = pointer.dtype == types.float64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return I1(answer)

    return types.boolean(pointer), codegen


def _at(builder: Any, base: Any, i: Any, itemsize: int, kind: Any) -> Any:
    """``&base[i]``, as a global pointer to `kind`."""
    offset = builder.mul(_resize(builder, i, I64), I64(itemsize))
    return builder.inttoptr(builder.add(base, offset), kind.as_pointer(GLOBAL))


def _load(builder: Any, pointer: Any, align: int) -> Any:
    value = builder.load(pointer)
    value.align = align
    return value


def _store(builder: Any, value: Any, pointer: Any, align: int) -> None:
    builder.store(value, pointer).align = align


def _stored(pointer: Pointer) -> Any:
    return ir.IntType(8 * ITEMSIZE[pointer.storage])


def _words(builder: Any, numbers: list[Any]) -> Any:
    """Numbers as integers of their size -> the four words of a slot."""
    words = []
    for number in numbers:
        if number.type.width == 64:
            words.append(builder.trunc(number, I32))
            words.append(builder.trunc(builder.lshr(number, I64(32)), I32))
        elif number.type.width == 32:
            words.append(number)
        else:
            words.append(builder.zext(number, I32))
    if len(words) == 8:
        words = [builder.or_(words[j], builder.shl(words[j + 1], I32(16))) for j in range(0, 8, 2)]
    return _pack(builder, RAW, words)


def _numbers(builder: Any, pointer: Pointer, slot: Any) -> list[Any]:
    """The four words of a slot -> numbers as integers of their size."""
    words = _lanes(builder, slot)
    size = ITEMSIZE[pointer.storage]
    if size == 4:
        return words
    if size == 8:
        wide = [builder.zext(word, I64) for word in words]
        return [builder.or_(wide[j], builder.shl(wide[j + 1], I64(32))) for j in range(0, 4, 2)]
    halves = []
    for word in words:
        halves.append(builder.trunc(word, I16))
        halves.append(builder.trunc(builder.lshr(word, I32(16)), I16))
    return halves


def _load_slot(builder: Any, pointer: Pointer, base: Any, i: Any) -> Any:
    size = ITEMSIZE[pointer.storage]
    if pointer.aligned:
        # Integers: of halves the compiler would make narrower loads.
        kind = ir.VectorType(I32, 4)
        vector = _load(builder, _at(builder, base, i, size, kind), 16)
        return _pack(builder, RAW, [builder.extract_element(vector, I32(j)) for j in range(4)])
    kind = _stored(pointer)
    first = _at(builder, base, i, size, kind)
    numbers = [_load(builder, builder.gep(first, [I32(j)]), size) for j in range(pointer.lanes)]
    return _words(builder, numbers)


def _store_slot(builder: Any, pointer: Pointer, base: Any, i: Any, slot: Any) -> None:
    size = ITEMSIZE[pointer.storage]
    if pointer.aligned:
        kind = ir.VectorType(I32, 4)
        vector = ir.Constant(kind, ir.Undefined)
        for j, word in enumerate(_lanes(builder, slot)):
            vector = builder.insert_element(vector, word, I32(j))
        _store(builder, vector, _at(builder, base, i, size, kind), 16)
        return
    first = _at(builder, base, i, size, _stored(pointer))
    for j, number in enumerate(_numbers(builder, pointer, slot)):
        _store(builder, number, builder.gep(first, [I32(j)]), size)


@intrinsic
def load(typingctx: Any, pointer: Any, i: Any) -> Any:
    """The slot whose first number is ``pointer[i]``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load_slot(builder, pointer, *args)

    return slot_type(pointer, i), codegen


def _covers(builder: Any, pointer: Pointer, lo: Any, hi: Any) -> Any:
    whole = builder.icmp_unsigned("==", lo, lo.type(0))
    return builder.and_(whole, builder.icmp_unsigned("==", hi, hi.type(pointer.lanes)))


def _in_part(builder: Any, j: int, lo: Any, hi: Any) -> Any:
    after = builder.icmp_unsigned("<=", lo, lo.type(j))
    return builder.and_(after, builder.icmp_unsigned(">", hi, hi.type(j)))


@intrinsic
def load_part(typingctx: Any, pointer: Any, i: Any, lo: Any, hi: Any) -> Any:
    """Numbers lo:hi of a slot, and zeros; ``pointer[i]`` is number 0, whether or not it exists."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, i, lo, hi = args
        kind, size = _stored(pointer), ITEMSIZE[pointer.storage]
        result = cgutils.alloca_once_value(builder, ir.Constant(RAW, [I32(0)] * 4))
        with builder.if_else(_covers(builder, pointer, lo, hi)) as (whole, part):
            with whole:
                builder.store(_load_slot(builder, pointer, base, i), result)
            with part, builder.if_then(builder.icmp_unsigned("<", lo, hi)):
                first = _at(builder, base, i, size, kind)
                numbers = []
                for j in range(pointer.lanes):
                    number = cgutils.alloca_once_value(builder, kind(0))
                    with builder.if_then(_in_part(builder, j, lo, hi)):
                        builder.store(_load(builder, builder.gep(first, [I32(j)]), size), number)
                    numbers.append(builder.load(number))
                builder.store(_words(builder, numbers), result)
        return builder.load(result)

    return slot_type(pointer, i, lo, hi), codegen


@intrinsic
def no_slot(typingctx: Any) -> Any:
    """A slot of zeros."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(RAW, [I32(0)] * 4)

    return slot_type(), codegen


@intrinsic
def opaque(typingctx: Any, value: Any) -> Any:
    """The same slot, vector or index, but the compiler cannot know.

    So it keeps nothing that was computed from it earlier, and unrolls no loop up to it: what is
    rarely done should not take registers from what is.
    """

    def move(builder: Any, number: Any) -> Any:
        kind = number.type
        suffix, register = {I32: ("b32", "r"), I64: ("b64", "l"), FLOAT: ("f32", "f")}.get(
            kind, ("f64", "d")
        )
        code = f"mov.{suffix} $0, $1;"
        function = ir.FunctionType(kind, [kind])
        return builder.call(
            ir.InlineAsm(function, code, f"={register},{register}", side_effect=True), [number]
        )

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if isinstance(value, Index):
            return move(builder, args[0])
        lanes = _lanes(builder, args[0])
        return _pack(builder, args[0].type, [move(builder, lane) for lane in lanes])

    return value(value), codegen


def _widened(builder: Any, pointer: Pointer, number: Any) -> Any:
    if pointer.storage == FLOAT64:
        return builder.bitcast(number, DOUBLE)
    if pointer.storage == FLOAT32:
        return builder.bitcast(number, FLOAT)
    if pointer.storage == FLOAT16:
        return builder.fpext(builder.bitcast(number, HALF), FLOAT)
    return builder.bitcast(builder.shl(builder.zext(number, I32), I32(16)), FLOAT)


def _narrowed(builder: Any, pointer: Pointer, value: Any) -> Any:
    """Rounded to nearest even."""
    if pointer.storage == FLOAT64:
        return builder.bitcast(value, I64)
    if pointer.storage == FLOAT32:
        return builder.bitcast(value, I32)
    if pointer.storage == FLOAT16:
        return builder.bitcast(builder.fptrunc(value, HALF), I16)
    # Adding 0x7FFF, or 0x8000 where the last kept bit is odd, carries into the kept half exactly
    # when nearest-even rounds up. NaN would overflow into infinity: keep it quiet.
    bits = builder.bitcast(value, I32)
    odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
    rounded = builder.add(builder.add(bits, I32(0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(is_nan, builder.or_(bits, I32(0x400000)), rounded)
    return builder.trunc(builder.lshr(chosen, I32(16)), I16)


def _encoded(builder: Any, pointer: Pointer, vector: Any) -> Any:
    lanes = _lanes(builder, vector)
    return _words(builder, [_narrowed(builder, pointer, value) for value in lanes])


@intrinsic
def decode(typingctx: Any, pointer: Any, slot: Any) -> Any:
    """A slot's numbers."""
    result = vector_of(pointer)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = _numbers(builder, pointer, args[1])
        return _pack(builder, _array(result), [_widened(builder, pointer, n) for n in numbers])

    return result(pointer, slot), codegen


@intrinsic
def store(typingctx: Any, pointer: Any, i: Any, vector: Any) -> Any:
    """Numbers to ``pointer[i]`` and what follows."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, i, vector = args
        _store_slot(builder, pointer, base, i, _encoded(builder, pointer, vector))
        return context.get_dummy_value()

    return types.void(pointer, i, vector), codegen


@intrinsic
def store_part(typingctx: Any, pointer: Any, i: Any, lo: Any, hi: Any, vector: Any) -> Any:
    """Numbers lo:hi of a vector to where `load_part` would find them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, i, lo, hi, vector = args
        size = ITEMSIZE[pointer.storage]
        slot = _encoded(builder, pointer, vector)
        with builder.if_else(_covers(builder, pointer, lo, hi)) as (whole, part):
            with whole:
                _store_slot(builder, pointer, base, i, slot)
            with part, builder.if_then(builder.icmp_unsigned("<", lo, hi)):
                first = _at(builder, base, i, size, _stored(pointer))
                for j, number in enumerate(_numbers(builder, pointer, slot)):
                    with builder.if_then(_in_part(builder, j, lo, hi)):
                        _store(builder, number, builder.gep(first, [I32(j)]), size)
        return context.get_dummy_value()

    return types.void(pointer, i, lo, hi, vector), codegen


@intrinsic
def scalar(typingctx: Any, pointer: Any, i: Any) -> Any:
    """The number ``pointer[i]``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size = ITEMSIZE[pointer.storage]
        number = _load(builder, _at(builder, args[0], args[1], size, _stored(pointer)), size)
        return _widened(builder, pointer, number)

    return pointer.dtype(pointer, i), codegen


@intrinsic
def load_float64(typingctx: Any, address: Any, i: Any) -> Any:
    """The float64 number `i` at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, _at(builder, args[0], args[1], 8, DOUBLE), 8)

    return types.float64(types.uint64, i), codegen


@intrinsic
def store_float64(typingctx: Any, address: Any, i: Any, value: Any) -> Any:
    """`value` to number `i` of the float64 numbers at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, args[2], _at(builder, args[0], args[1], 8, DOUBLE), 8)
        return context.get_dummy_value()

    return types.void(types.uint64, i, types.float64), codegen


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
            number = _load(builder, _at(builder, args[0], args[2], size, _stored(pointer)), size)
            value = _widened(builder, pointer, number)
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
            number = _narrowed(builder, pointer, value)
            _store(builder, number, _at(builder, args[0], args[2], size, _stored(pointer)), size)

        _for_each_kind(builder, args[1], emit)
        return context.get_dummy_value()

    return types.void(types.uint64, types.int64, i, types.float64), codegen


@intrinsic
def load_byte(typingctx: Any, address: Any, i: Any) -> Any:
    """Byte `i` at `address`, as 32 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(_load(builder, _at(builder, args[0], args[1], 1, I8), 1), I32)

    return types.uint32(types.uint64, i), codegen


@intrinsic
def store_byte(typingctx: Any, address: Any, i: Any, value: Any) -> Any:
    """The lowest 8 bits of `value` to byte `i` at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = builder.trunc(args[2], I8)
        _store(builder, byte, _at(builder, args[0], args[1], 1, I8), 1)
        return context.get_dummy_value()

    return types.void(types.uint64, i, types.uint32), codegen


# --- shared memory --------------------------------------------------------------------------


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
        return _shared_array(builder, _scalar(result.dtype), count.literal_value)

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


def _shared_at(builder: Any, array: Any, i: Any) -> Any:
    return builder.gep(array, [_resize(builder, i, I32)])


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
        if value.type != _scalar(shared.dtype):
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
        piece = ir.VectorType(_scalar(shared.dtype), 4 if shared.dtype == types.float32 else 2)
        lanes = []
        for j in range(0, result.lanes, piece.count):
            at = builder.bitcast(builder.gep(first, [I32(j)]), piece.as_pointer(SHARED))
            vector = _load(builder, at, 16)
            lanes += [builder.extract_element(vector, I32(n)) for n in range(piece.count)]
        return _pack(builder, _array(result), lanes)

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
            channel = builder.add(channel, _resize(builder, last, channel.type))
            column = builder.select(last, column.type(0), column)
        return _pack(builder, _array(result), lanes)

    return result(pointer, shared, k, L), codegen


@intrinsic
def put_vector(typingctx: Any, shared: Any, i: Any, vector: Any) -> Any:
    """A vector's numbers to those from `i` on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = _shared_at(builder, args[0], args[1])
        for j, lane in enumerate(_lanes(builder, args[2])):
            builder.store(lane, builder.gep(first, [I32(j)]))
        return context.get_dummy_value()

    return types.void(shared, i, vector), codegen


# --- arithmetic -----------------------------------------------------------------------------


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
        lanes = [builder.fpext(lane, DOUBLE) for lane in _lanes(builder, args[0])]
        return _pack(builder, _array(result), lanes)

    return result(value), codegen


@intrinsic
def splat(typingctx: Any, pointer: Any, value: Any) -> Any:
    """A scalar in all lanes of a vector as long as a slot at `pointer`."""
    result = Vector(value, pointer.lanes)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _pack(builder, _array(result), [args[1]] * result.lanes)

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
            return _call(builder, name, _scalar(dtype), list(args))
        columns = [
            _lanes(builder, arg) if isinstance(kind, Vector) else [arg] * result.lanes
            for kind, arg in zip(kinds, args, strict=True)
        ]
        lanes = [
            _call(builder, name, _scalar(dtype), list(lane)) for lane in zip(*columns, strict=True)
        ]
        return _pack(builder, _array(result), lanes)

    return result(a, b, c), codegen


@intrinsic
def clip_below(typingctx: Any, value: Any, floor: Any) -> Any:
    """Lanes under the scalar `floor` become `floor`; NaN stays NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = [
            builder.select(builder.fcmp_ordered("<", lane, args[1]), args[1], lane)
            for lane in _lanes(builder, args[0])
        ]
        return _pack(builder, args[0].type, lanes)

    return value(value, floor), codegen


@intrinsic
def positive_bits(typingctx: Any, value: Any) -> Any:
    """A number whose bit ``j`` says whether lane ``j`` is greater than zero (or NaN)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = I32(0)
        for j, lane in enumerate(_lanes(builder, args[0])):
            bit = builder.fcmp_unordered(">", lane, lane.type(0.0))
            bits = builder.or_(bits, builder.select(bit, I32(1 << j), I32(0)))
        return bits

    return types.uint32(value), codegen


@intrinsic
def keep(typingctx: Any, value: Any, bits: Any) -> Any:
    """Lanes of `value` whose bit is set; zero elsewhere."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = []
        for j, lane in enumerate(_lanes(builder, args[0])):
            bit = builder.icmp_unsigned("!=", builder.and_(args[1], I32(1 << j)), I32(0))
            lanes.append(builder.select(bit, lane, lane.type(0.0)))
        return _pack(builder, args[0].type, lanes)

    return value(value, types.uint32), codegen


@intrinsic
def part_bits(typingctx: Any, lo: Any, hi: Any) -> Any:
    """A number whose bits lo:hi are set (at most 8)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lo, hi = (_resize(builder, arg, I32) for arg in args)
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
def sum_lanes(typingctx: Any, value: Any) -> Any:
    """Sum of the lanes, by halving: a fixed order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = _lanes(builder, args[0])
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
        columns = [_lanes(builder, arg) if is_vector else [arg] for arg in args]
        lanes = []
        for a, b in zip(*columns, strict=True):
            usable = builder.fcmp_ordered("ord", b, b)
            lanes.append(builder.select(usable, builder.fadd(a, b), a))
        return _pack(builder, args[0].type, lanes) if is_vector else lanes[0]

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
            totals = [args[0]] if squares == types.float64 else _lanes(builder, args[0])
            for total in totals:
                infinite = builder.fcmp_unordered(">=", total, DOUBLE(float("inf")))
                bad = builder.or_(bad, infinite)
            return bad
        pairs = (
            [args]
            if squares == types.float32
            else zip(*(_lanes(builder, a) for a in args), strict=True)
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
        a = _lanes(builder, args[0])
        is_vector = isinstance(signature.args[1], Vector)
        b = _lanes(builder, args[1]) if is_vector else [args[1]] * len(a)
        emit = getattr(builder, instruction)
        lanes = [emit(*pair) for pair in zip(a, b, strict=True)]
        return _pack(builder, args[0].type, lanes)

    lower_builtin(operation, Vector, Vector)(lowering)
    lower_builtin(operation, Vector, types.Float)(lowering)


_vector_operator(operator.add, "fadd")
_vector_operator(operator.sub, "fsub")
_vector_operator(operator.mul, "fmul")
