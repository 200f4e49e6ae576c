"""Where memory begins a vector that can be streamed, or a page, and which way to go through it."""

from typing import Any

from numba.core import types
from numba.extending import intrinsic

from numbabn.cpu.options import inline
from numbabn.cpu.vector import I64, LANES

# Bytes over whose ends no hardware prefetcher reads. Where two threads' pieces of rows share one,
# either's prefetchers take lines that the other writes: 196 rows of 512 columns took two threads
# 27 to 148 us so, depending on what it costs that day to move a line, and 22 us a single one.
PAGE = 4 << 10
# Bytes that writes may lie after reads, in their pages, for the reads to be held up.
HELD_UP = 128


def boundary_of(pointer: Any) -> int:
    """Bytes that the address of a streaming store has to be a multiple of."""
    return int(min(64, LANES * pointer.dtype.bitwidth // 8))


def _past_boundary(builder: Any, source: Any, pointer: Any, index: Any, nbytes: int) -> Any:
    """Elements from the last multiple of so many bytes, up to ``pointer[index]``."""
    address = builder.ptrtoint(builder.gep(pointer, [index]), I64)
    size = source.dtype.bitwidth // 8
    return builder.lshr(builder.and_(address, I64(nbytes - 1)), I64(size.bit_length() - 1))


def _to_boundary(builder: Any, source: Any, pointer: Any, index: Any, nbytes: int) -> Any:
    """Elements from ``pointer[index]`` to the next, 0 if it is one."""
    past = _past_boundary(builder, source, pointer, index, nbytes)
    elements = nbytes // (source.dtype.bitwidth // 8)
    return builder.and_(builder.neg(past), I64(elements - 1))


@intrinsic
def elements_past_boundary(typingctx: Any, source: Any, index: Any) -> Any:
    """Elements from the last boundary that `stream` may store at, up to ``source[index]``.

    Fewer than 16: the boundaries of vectors of 16-bit values are multiples of 32 bytes, else of 64.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _past_boundary(builder, source, args[0], args[1], boundary_of(source))

    return types.int64(source, types.int64), codegen


@intrinsic
def elements_to_boundary(typingctx: Any, source: Any, index: Any) -> Any:
    """Elements from ``source[index]`` to the next such boundary; 0 if it is on one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _to_boundary(builder, source, args[0], args[1], boundary_of(source))

    return types.int64(source, types.int64), codegen


@intrinsic
def elements_to_page(typingctx: Any, source: Any, index: Any) -> Any:
    """Elements from ``source[index]`` to the next page; 0 if it begins one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _to_boundary(builder, source, args[0], args[1], PAGE)

    return types.int64(source, types.int64), codegen


@intrinsic
def bytes_after(typingctx: Any, target: Any, source: Any) -> Any:
    """How far in its page `target` lies after where `source` lies in its own: less than a page."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, start = (builder.ptrtoint(pointer, I64) for pointer in args)
        return builder.and_(builder.sub(to, start), I64(PAGE - 1))

    return types.int64(target, source), codegen


@inline
def holds_up(target, source):
    """Whether reads of `source` in ascending order are held up by writes to `target`.

    A processor compares the last 12 bits of addresses first: a read waits for an earlier write that
    it may depend on, and one past the caches takes its time (measured on a Zen 1, in C: 10, 5 and
    3.3 ns a vector where the next, the second and the third vector is read where this one is
    written, instead of 2.3).
    """
    if target is not None:  # noqa: SIM102 - Numba drops the branches that a type decides
        if source is not None:
            return 0 < bytes_after(target, source) <= HELD_UP
    return False


@inline
def step_between(target, first, second):
    """The step from a vector to the next, given what is written and what is read; may be None.

    Backwards where only that keeps reads from being held up. Arrays that were allocated one after
    the other often lie so: each a little further in its page than the last.
    """
    up_waits = holds_up(target, first) or holds_up(target, second)
    down_waits = holds_up(first, target) or holds_up(second, target)
    return -LANES if up_waits and not down_waits else LANES


@inline
def onward(io, ahead):
    """So many elements on, for those who go through all rows by ``io.step``."""
    return ahead if io.step > 0 else -ahead
