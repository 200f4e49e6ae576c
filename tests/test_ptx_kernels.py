"""Kernels as numba-cuda compiles them, run by the interpreter and compared with NumPy."""

import re

import numpy as np
import ptx
import pytest

cuda = pytest.importorskip("numba.cuda", reason="numba-cuda compiles the kernels")
pytest.importorskip("numba_cuda", reason="numba-cuda compiles the kernels")

from llvmlite import ir  # noqa: E402
from numba.cuda import types  # noqa: E402
from numba.cuda.extending import intrinsic  # noqa: E402

ADDRESS, SIZE = types.uint64, types.uint32
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


def text_of(function, *kinds, cc=(9, 0)) -> str:
    """The PTX of a kernel."""
    text, _ = cuda.compile(
        function, types.void(*kinds), device=False, abi="numba", cc=cc, output="ptx"
    )
    return text


def parsed(text) -> ptx.Function:
    (entry,) = ptx.parse(text).entries.values()
    return entry


def compiled(function, *kinds, **options) -> ptx.Function:
    return parsed(text_of(function, *kinds, **options))


def launch(entry, grid, block, arrays, *numbers, **options):
    memory = ptx.Memory()
    addresses = [memory.register(array, f"array {n}") for n, array in enumerate(arrays)]
    return ptx.run(entry, grid, block, [*addresses, *numbers], memory, **options)


def _element(builder, base, i, kind, size):
    """``&base[i]``, where elements of `size` bytes lie, as a pointer to `kind`."""
    offset = builder.mul(builder.zext(i, base.type), base.type(size))
    return builder.inttoptr(builder.add(base, offset), kind.as_pointer(1))


I16, I32 = ir.IntType(16), ir.IntType(32)
FOUR = types.UniTuple(types.float32, 4)


@intrinsic
def load4(typingctx, base, i):
    """Four float32, by one load of 16 bytes."""

    def codegen(context, builder, signature, args):
        value = builder.load(_element(builder, *args, ir.VectorType(I32, 4), 16))
        value.align = 16
        parts = [builder.extract_element(value, I32(n)) for n in range(4)]
        return context.make_tuple(
            builder, FOUR, [builder.bitcast(part, ir.FloatType()) for part in parts]
        )

    return FOUR(types.uint64, types.uint32), codegen


@intrinsic
def load_half(typingctx, base, i):
    """A float16 as float32."""

    def codegen(context, builder, signature, args):
        bits = builder.load(_element(builder, *args, I16, 2))
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())

    return types.float32(types.uint64, types.uint32), codegen


@intrinsic
def store_half(typingctx, base, i, value):
    """A float32 as float16."""

    def codegen(context, builder, signature, args):
        *place, number = args
        bits = builder.bitcast(builder.fptrunc(number, ir.HalfType()), I16)
        builder.store(bits, _element(builder, *place, I16, 2))
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint32, types.float32), codegen


@intrinsic
def store_float(typingctx, base, i, value):
    """A float32."""

    def codegen(context, builder, signature, args):
        *place, number = args
        builder.store(number, _element(builder, *place, ir.FloatType(), 4))
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint32, types.float32), codegen


def aligned(array):
    """A copy that begins at a multiple of 32 bytes."""
    store = np.zeros(array.nbytes + 32, np.uint8)
    skip = -store.ctypes.data % 32
    copy = store[skip : skip + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def block_sums(x, out, slots):
    """out[block] = sum of the block's share of x, by shuffles and shared memory."""
    scratch = cuda.shared.array(32, types.float32)
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    total = np.float32(0)
    while i < slots:
        a, b, c, d = load4(x, np.uint32(i))
        total += (a + b) + (c + d)
        i += cuda.gridDim.x * cuda.blockDim.x
    for shift in (16, 8, 4, 2, 1):
        total += cuda.shfl_down_sync(0xFFFFFFFF, total, shift)
    if cuda.threadIdx.x % 32 == 0:
        scratch[cuda.threadIdx.x // 32] = total
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        total = np.float32(0)
        for warp in range(cuda.blockDim.x // 32):
            total += scratch[warp]
        store_float(out, np.uint32(cuda.blockIdx.x), total)


@SEEDS
@pytest.mark.parametrize("size", [16, 1000, 16384])
def test_reduction(seed, size):
    x = aligned(np.random.default_rng(0).integers(-50, 50, size).astype(np.float32))
    out = np.zeros(5, np.float32)
    entry = compiled(block_sums, ADDRESS, ADDRESS, SIZE)
    report = launch(entry, 5, 128, [x, out], size // 4, seed=seed)
    assert out.sum() == x.sum()  # small integers: every order gives the same
    assert report.bytes["load", 16] == x.nbytes
    assert report.wide_share("load") == report.efficiency("load") == 1
    assert report.first_touch["load"] == x.nbytes // 32
    assert report.barriers == 5


def test_reduction_without_its_barrier():
    text = text_of(block_sums, ADDRESS, ADDRESS, SIZE)
    text, removed = re.subn(r"bar\.sync\s+0;", "", text)
    assert removed == 1
    x, out = aligned(np.ones(64, np.float32)), np.zeros(1, np.float32)
    with pytest.raises((ptx.RaceFault, ptx.Uninitialised), match=r"ld\.shared"):
        launch(parsed(text), 1, 128, [x, out], 16)


def half_scale(x, y, n, factor):
    i = np.uint32(cuda.grid(1))
    if i >= n:
        return
    store_half(y, i, load_half(x, i) * factor)


@SEEDS
def test_half_precision(seed):
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    y = np.zeros_like(every)
    entry = compiled(half_scale, ADDRESS, ADDRESS, SIZE, types.float32)
    launch(entry, 400, 192, [every, y], every.size, np.float32(1.1), seed=seed)
    with np.errstate(all="ignore"):
        expected = (every.astype(np.float32) * np.float32(1.1)).astype(np.float16)
    np.testing.assert_array_equal(y, expected)


def collatz(out, n):
    i = np.uint32(cuda.grid(1))
    if i >= n:
        return
    value, steps = np.int64(i + 1), 0
    while value != 1:
        value = 3 * value + 1 if value & 1 else value >> 1
        steps += 1
        if steps > 100:
            break
    store_float(out, i, np.float32(steps))


@SEEDS
@pytest.mark.parametrize("cc", [(7, 5), (8, 0), (9, 0), (10, 0)])
def test_divergent_loops_and_early_return(seed, cc):
    out = np.zeros(300, np.float32)
    launch(compiled(collatz, ADDRESS, SIZE, cc=cc), 3, 128, [out], 300, seed=seed)
    expected = []
    for n in range(1, 301):
        steps = 0
        while n != 1 and steps <= 100:
            n, steps = 3 * n + 1 if n % 2 else n // 2, steps + 1
        expected.append(steps)
    np.testing.assert_array_equal(out, expected)


def array_kernel(x, y, histogram):
    """Numba's own arrays: strides, signed indices, atomics, and mathematics in float64."""
    i = cuda.grid(1)
    if i < x.shape[0]:
        total = 0.0
        for j in range(x.shape[1]):
            total += x[i, j] ** 2
        y[-1 - i] = total**0.5 / x.shape[1]
        cuda.atomic.add(histogram, int(total) % histogram.size, 1)


@SEEDS
def test_arrays(seed):
    entry = compiled(array_kernel, types.float64[:, :], types.float64[::1], types.int32[::1])
    rng = np.random.default_rng(0)
    x, y, histogram = rng.standard_normal((100, 7)), np.zeros(100), np.zeros(4, np.int32)
    memory = ptx.Memory()
    arguments = []
    for name, array in (("x", x), ("y", y), ("histogram", histogram)):
        # Numba passes an array as memory owner, parent, size, item size, data, shape, strides.
        address = memory.register(array, name)
        arguments += [0, 0, array.size, array.itemsize, address, *array.shape, *array.strides]
    ptx.run(entry, 4, 32, arguments, memory, seed=seed)
    total = np.array([sum(value * value for value in row) for row in x.tolist()])
    np.testing.assert_allclose(y[::-1], np.sqrt(total) / 7, rtol=1e-15)
    np.testing.assert_array_equal(histogram, np.bincount(total.astype(int) % 4, minlength=4))


def exclusive_prefix(out):
    """Lanes that vote yes are numbered: ballot, popc, and a lane mask."""
    lane = cuda.laneid
    yes = (lane * 7) % 5 < 2
    votes = cuda.ballot_sync(0xFFFFFFFF, yes)
    before = cuda.popc(votes & ((1 << lane) - 1))
    store_float(out, np.uint32(cuda.grid(1)), np.float32(before if yes else -1))


def test_votes():
    out = np.zeros(96, np.float32)
    launch(compiled(exclusive_prefix, ADDRESS), 1, 96, [out])
    yes = (np.arange(32) * 7) % 5 < 2
    expected = np.where(yes, np.cumsum(yes) - yes, -1)
    np.testing.assert_array_equal(out, np.tile(expected, 3))
