"""Slots and numbers from global memory and back: whole, in part, and of any storage type.

A pointer knows how what it points to is stored, and whether slots there may be accessed whole.
Where they may not, the same slots are read and written number by number.
"""

from typing import Any

from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

from numbabn.cuda.vector import (
    DOUBLE,
    FLOAT,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    GLOBAL,
    HALF,
    I1,
    I16,
    I32,
    I64,
    ITEMSIZE,
    RAW,
    Index,
    Pointer,
    array_of,
    call,
    lanes_of,
    pack,
    resize,
    slot_type,
    vector_of,
)


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
        row, stride, column = (resize(builder, arg, kind) for arg in args[1:])
        return builder.add(builder.mul(row, stride), column)

    return pointer.index(pointer, row, stride, column), codegen


@intrinsic
def is_double(typingctx: Any, pointer: Any) -> Any:
    """Whether numbers there are computed with as float64: a constant."""
    answer = pointer.dtype == types.float64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return I1(answer)

    return types.boolean(pointer), codegen


def place(builder: Any, base: Any, i: Any, itemsize: int, kind: Any) -> Any:
    """``&base[i]``, as a global pointer to `kind`."""
    offset = builder.mul(resize(builder, i, I64), I64(itemsize))
    return builder.inttoptr(builder.add(base, offset), kind.as_pointer(GLOBAL))


def read(builder: Any, pointer: Any, align: int) -> Any:
    value = builder.load(pointer)
    value.align = align
    return value


def write(builder: Any, value: Any, pointer: Any, align: int) -> None:
    builder.store(value, pointer).align = align


def stored_as(pointer: Pointer) -> Any:
    return ir.IntType(8 * ITEMSIZE[pointer.storage])


def words_of(builder: Any, numbers: list[Any]) -> Any:
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
    return pack(builder, RAW, words)


def numbers_of(builder: Any, pointer: Pointer, slot: Any) -> list[Any]:
    """The four words of a slot -> numbers as integers of their size."""
    words = lanes_of(builder, slot)
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
        vector = read(builder, place(builder, base, i, size, kind), 16)
        return pack(builder, RAW, [builder.extract_element(vector, I32(j)) for j in range(4)])
    kind = stored_as(pointer)
    first = place(builder, base, i, size, kind)
    numbers = [read(builder, builder.gep(first, [I32(j)]), size) for j in range(pointer.lanes)]
    return words_of(builder, numbers)


def _store_slot(builder: Any, pointer: Pointer, base: Any, i: Any, slot: Any) -> None:
    size = ITEMSIZE[pointer.storage]
    if pointer.aligned:
        kind = ir.VectorType(I32, 4)
        vector = ir.Constant(kind, ir.Undefined)
        for j, word in enumerate(lanes_of(builder, slot)):
            vector = builder.insert_element(vector, word, I32(j))
        write(builder, vector, place(builder, base, i, size, kind), 16)
        return
    first = place(builder, base, i, size, stored_as(pointer))
    for j, number in enumerate(numbers_of(builder, pointer, slot)):
        write(builder, number, builder.gep(first, [I32(j)]), size)


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


def _load_if(builder: Any, pointer: Pointer, base: Any, i: Any, wanted: Any) -> Any:
    """A slot, or zeros if it is not wanted."""
    if pointer.aligned:
        # One predicated instruction: from a branch the compiler copies what was loaded to where the
        # paths meet, and so waits for it before the next load. No order is needed: what a thread
        # reads nobody writes but itself, afterwards.
        address = builder.ptrtoint(place(builder, base, i, ITEMSIZE[pointer.storage], I32), I64)
        code = "{ .reg .pred %wanted; setp.ne.u32 %wanted, $5, 0; "
        code += "".join(f"mov.b32 ${j}, 0; " for j in range(4))
        code += "@%wanted ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }"
        kind = ir.FunctionType(ir.LiteralStructType([I32] * 4), [I64, I32])
        words = builder.call(
            ir.InlineAsm(kind, code, "=r,=r,=r,=r,l,r", side_effect=True),
            [address, builder.zext(wanted, I32)],
        )
        return pack(builder, RAW, [builder.extract_value(words, j) for j in range(4)])
    result = cgutils.alloca_once_value(builder, ir.Constant(RAW, [I32(0)] * 4))
    with builder.if_then(wanted):
        builder.store(_load_slot(builder, pointer, base, i), result)
    return builder.load(result)


@intrinsic
def load_wanted(typingctx: Any, pointer: Any, i: Any, wanted: Any) -> Any:
    """The slot whose first number is ``pointer[i]``, or zeros if it is not wanted."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load_if(builder, pointer, *args)

    return slot_type(pointer, i, types.boolean), codegen


@intrinsic
def load_part(typingctx: Any, pointer: Any, i: Any, lo: Any, hi: Any) -> Any:
    """Numbers lo:hi of a slot, and zeros; ``pointer[i]`` is number 0, whether or not it exists."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, i, lo, hi = args
        kind, size = stored_as(pointer), ITEMSIZE[pointer.storage]
        whole = _covers(builder, pointer, lo, hi)
        result = cgutils.alloca_once(builder, RAW)
        builder.store(_load_if(builder, pointer, base, i, whole), result)
        part = builder.and_(builder.not_(whole), builder.icmp_unsigned("<", lo, hi))
        with builder.if_then(part, likely=False):
            first = place(builder, base, i, size, kind)
            numbers = []
            for j in range(pointer.lanes):
                number = cgutils.alloca_once_value(builder, kind(0))
                with builder.if_then(_in_part(builder, j, lo, hi)):
                    builder.store(read(builder, builder.gep(first, [I32(j)]), size), number)
                numbers.append(builder.load(number))
            builder.store(words_of(builder, numbers), result)
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
        lanes = lanes_of(builder, args[0])
        return pack(builder, args[0].type, [move(builder, lane) for lane in lanes])

    return value(value), codegen


@intrinsic
def hidden(typingctx: Any, value: Any) -> Any:
    """The same slot or index, but not even ptxas can know, which sees through `opaque`.

    It combines the value with the block's z, which is 0 as grids have two dimensions. ptxas else
    keeps all the 16-bit numbers that it once took from a slot, each in a register of its own.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(I32, [I32, I32])
        combine = ir.InlineAsm(kind, "xor.b32 $0, $1, $2;", "=r,r,r", side_effect=True)
        zero = call(builder, "llvm.nvvm.read.ptx.sreg.ctaid.z", I32, [])
        if isinstance(value, Index):
            return builder.call(combine, [args[0], zero])
        words = [builder.call(combine, [word, zero]) for word in lanes_of(builder, args[0])]
        return pack(builder, RAW, words)

    return value(value), codegen


def widened(builder: Any, pointer: Pointer, number: Any) -> Any:
    if pointer.storage == FLOAT64:
        return builder.bitcast(number, DOUBLE)
    if pointer.storage == FLOAT32:
        return builder.bitcast(number, FLOAT)
    if pointer.storage == FLOAT16:
        return builder.fpext(builder.bitcast(number, HALF), FLOAT)
    return builder.bitcast(builder.shl(builder.zext(number, I32), I32(16)), FLOAT)


def narrowed(builder: Any, pointer: Pointer, value: Any) -> Any:
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
    lanes = lanes_of(builder, vector)
    return words_of(builder, [narrowed(builder, pointer, value) for value in lanes])


@intrinsic
def decode(typingctx: Any, pointer: Any, slot: Any) -> Any:
    """A slot's numbers."""
    result = vector_of(pointer)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = numbers_of(builder, pointer, args[1])
        return pack(builder, array_of(result), [widened(builder, pointer, n) for n in numbers])

    return result(pointer, slot), codegen


@intrinsic
def number(typingctx: Any, pointer: Any, slot: Any, j: Any) -> Any:
    """A slot's number `j`, an index."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = numbers_of(builder, pointer, args[1])
        if ITEMSIZE[pointer.storage] == 2:  # by words: fewer registers, and fewer to choose from
            numbers = lanes_of(builder, args[1])
        j = resize(builder, args[2], I32)
        at = builder.lshr(j, I32(1)) if ITEMSIZE[pointer.storage] == 2 else j
        chosen = numbers[0]
        for n, one in enumerate(numbers[1:], 1):
            chosen = builder.select(builder.icmp_unsigned("==", at, I32(n)), one, chosen)
        if ITEMSIZE[pointer.storage] == 2:
            shift = builder.shl(builder.and_(j, I32(1)), I32(4))
            chosen = builder.trunc(builder.lshr(chosen, shift), I16)
        return widened(builder, pointer, chosen)

    return pointer.dtype(pointer, slot, j), codegen


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
                first = place(builder, base, i, size, stored_as(pointer))
                for j, number in enumerate(numbers_of(builder, pointer, slot)):
                    with builder.if_then(_in_part(builder, j, lo, hi)):
                        write(builder, number, builder.gep(first, [I32(j)]), size)
        return context.get_dummy_value()

    return types.void(pointer, i, lo, hi, vector), codegen
