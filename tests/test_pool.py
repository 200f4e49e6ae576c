"""Memory for outputs: reused once nothing refers to it, and never before."""

import ctypes
import functools
import gc
import itertools
import mmap
import queue
import random
import sys
import threading

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import numbabn
from numbabn import pool

MIB = 1 << 20
X = np.ones((8, 64, 32, 32), np.float32)  # 2 MiB
MEAN, VAR = np.zeros(64, np.float32), np.ones(64, np.float32)
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")


def address(array):
    return array.__array_interface__["data"][0]


def output(x=X):
    return numbabn.batch_norm(x, MEAN, VAR)


def in_pool(array):
    """Whether the memory of `array` belongs to the pool."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, pool._Lease)


@pytest.fixture(scope="module", autouse=True)
def _quick_collection():
    """Numba's many objects need not be looked at by every ``gc.collect`` below."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _empty_pool():
    """Every test begins with an empty pool, and leaves one of the usual limit behind."""
    limit = pool._pool.limit
    gc.collect()
    numbabn.clear_pool()
    yield
    numbabn.set_pool_limit(limit)
    gc.collect()
    numbabn.clear_pool()


# --- outputs come from the pool ---------------------------------------------------------------


def test_large_outputs_are_pooled_aligned_and_reused():
    y = output()
    assert in_pool(y)
    assert y.flags.writeable
    assert y.flags.c_contiguous
    first = address(y)
    assert first % 64 == 0
    del y
    for _ in range(5):
        y = output()
        assert address(y) == first
        del y


@pytest.mark.parametrize("size", [pool.SMALLEST, pool.SMALLEST + 4, 3 * MIB + 8, 9 * MIB - 4])
def test_every_large_size_is_aligned(size):
    y = pool.empty((size // 4,), np.dtype(np.float32))
    assert in_pool(y)
    assert address(y) % 64 == 0
    assert y.nbytes == size
    y[0] = y[-1] = 7  # all of it is mapped


def test_small_outputs_are_left_to_numpy():
    y = pool.empty((pool.SMALLEST // 4 - 1,), np.dtype(np.float32))
    assert not in_pool(y)
    assert not in_pool(output(X[:1]))


def test_similar_sizes_share_memory_and_larger_ones_do_not():
    small = pool.empty((2 * MIB,), np.dtype(np.uint8))
    first = address(small)
    del small
    large = pool.empty((16 * MIB,), np.dtype(np.uint8))
    assert address(large) != first
    again = pool.empty((2 * MIB - 100,), np.dtype(np.uint8))
    assert address(again) == first


def test_all_passes_without_out_use_it():
    y, saved = numbabn.batch_norm_forward(X, None, None, training=True)
    dx, _, _ = numbabn.batch_norm_backward(y, saved)
    z = numbabn.normalize(X, VAR, MEAN)
    assert all(map(in_pool, (y, dx, z)))
    assert len({address(a) for a in (y, dx, z)}) == 3


def test_given_out_does_not():
    out = np.empty_like(X)
    assert numbabn.batch_norm(X, MEAN, VAR, out=out) is out
    assert not in_pool(out)


def test_channels_last_outputs_are_pooled():
    x = np.moveaxis(np.moveaxis(X, 1, -1).copy(), -1, 1)
    y = output(x)
    assert y.strides == x.strides
    assert in_pool(y)
    first = address(y)
    del y
    assert address(output(x)) == first


def test_results_are_right_in_reused_memory():
    expected = numbabn.batch_norm(X, MEAN, VAR, out=np.empty_like(X))
    y = output()
    y[...] = np.nan
    del y
    assert np.array_equal(output(), expected)


# --- never while anything refers to it --------------------------------------------------------


def cycle(y):
    ring = [y]
    ring.append(ring)
    return ring


def closure(y):
    return lambda: y[0]


def exception(y):
    try:
        raise ValueError(y)
    except ValueError as error:
        return error


HOLDERS = {
    "array": lambda y: y,
    "one element's slice": lambda y: y[0, 0, 0, :1],
    "last element's slice": lambda y: y[-1:, -1:, -1:, -1:],
    "empty slice": lambda y: y[:0],
    "reversed": lambda y: y[::-1],
    "reshaped": lambda y: y.reshape(-1),
    "transposed": lambda y: y.transpose(0, 2, 3, 1),
    "other dtype": lambda y: y.view(np.uint8),
    "slice of a view": lambda y: y.T.reshape(32, -1, order="F").view(np.int32)[3:4],
    "broadcast": lambda y: np.broadcast_to(y[0], (3, *y.shape[1:])),
    "subclass": lambda y: y.view(np.recarray),
    "memoryview": memoryview,
    "slice of a memoryview": lambda y: memoryview(y)[2:3],
    "cast memoryview": lambda y: memoryview(y).cast("B"),
    "frombuffer": lambda y: np.frombuffer(y, np.uint8),
    "ctypes, from buffer": lambda y: (ctypes.c_char * y.nbytes).from_buffer(y),
    "ctypes, as_ctypes": lambda y: np.ctypeslib.as_ctypes(y.reshape(-1)),
    "DLPack": np.from_dlpack,
    "DLPack capsule": lambda y: y.__dlpack__(),
    "array interface": lambda y: np.asarray(type("Holder", (), {
        "__array_interface__": y.__array_interface__, "keep": y})()),
    "closure": closure,
    "list": lambda y: [y[1:]],
    "reference cycle": cycle,
    "exception": exception,
    "iterator": iter,
    "flat iterator": lambda y: y.flat,
    "partial": lambda y: functools.partial(np.add, y),
    "half of a split": lambda y: np.split(y, 2)[1],
    "saved of a forward pass": lambda y: numbabn.batch_norm_forward(y, MEAN, VAR)[1],
}  # fmt: skip


# These copy, or refuse, an array that is not in C order.
C_ORDER_ONLY = {
    "reshaped",
    "other dtype",
    "slice of a view",
    "cast memoryview",
    "frombuffer",
    "ctypes, from buffer",
    "ctypes, as_ctypes",
}


@pytest.mark.parametrize(
    ("name", "last"),
    [(name, False) for name in HOLDERS]
    + [(name, True) for name in HOLDERS if name not in C_ORDER_ONLY],
)
def test_memory_in_use_is_not_handed_out(name, last):
    x = np.moveaxis(np.moveaxis(X, 1, -1).copy(), -1, 1) if last else X
    y = output(x)
    first, size = address(y), y.nbytes
    holder = HOLDERS[name](y)
    del y
    gc.collect()
    others = [output() for _ in range(3)]
    others += [output(x) for _ in range(3)]
    for other in others:
        assert abs(address(other) - first) >= size
    del holder, other, others
    gc.collect()
    # And once it is let go, it comes back.
    again = [output(x) for _ in range(8)]
    assert first in [address(y) for y in again]


def test_torch_tensor_keeps_it():
    torch = pytest.importorskip("torch")
    y = output()
    first = address(y)
    tensor = torch.from_numpy(y)[3:]
    del y
    assert all(address(y) != first for y in [output() for _ in range(3)])
    del tensor
    assert first in [address(y) for y in [output() for _ in range(5)]]


class _Use(RuleBasedStateMachine):
    """Outputs taken, filled, sliced and dropped in any order: each keeps what was written to it."""

    def __init__(self):
        super().__init__()
        self.arrays = []
        self.marks = itertools.count()

    @rule(megabytes=st.sampled_from([1, 1, 2, 3]), extra=st.sampled_from([0, 64, 60_000]))
    def take(self, megabytes, extra):
        array = pool.empty((megabytes * MIB // 4 + extra,), np.dtype(np.int32))
        mark = next(self.marks)
        array[::512] = mark  # every page
        self.arrays.append((array, 0, mark))

    @rule(which=st.integers(0, 99), start=st.integers(0, 400))
    def keep_a_slice(self, which, start):
        if self.arrays:
            array, _, mark = self.arrays.pop(which % len(self.arrays))
            self.arrays.append((array[512 * start :], 0, mark))

    @rule(which=st.integers(0, 99))
    def drop(self, which):
        if self.arrays:
            self.arrays.pop(which % len(self.arrays))

    @rule(limit=st.sampled_from([0, 2 * MIB, 64 * MIB]))
    def limit(self, limit):
        numbabn.set_pool_limit(limit)

    @rule()
    def clear(self):
        numbabn.clear_pool()

    @invariant()
    def nothing_was_overwritten(self):
        assert all((array[offset::512] == mark).all() for array, offset, mark in self.arrays)

    @invariant()
    def the_books_are_right(self):
        idle = pool._pool.idle
        assert sum(block.size for block in idle.values()) == pool._pool.idle_bytes
        assert pool._pool.idle_bytes <= pool._pool.limit
        used = [address(array) for array, _, _ in self.arrays]
        for block in idle.values():
            assert not any(block.address <= a < block.address + block.size for a in used)


TestAnyOrder = _Use.TestCase


def test_threads_that_take_and_drop():
    # Arrays also change hands, so that one thread returns what another took.
    numbabn.set_pool_limit(6 * MIB)
    passed, wrong = queue.SimpleQueue(), []

    def work(number):
        chance = random.Random(number)
        held = []
        try:
            for turn in range(300):
                size = MIB // 4 * chance.choice([1, 1, 2]) + 16 * chance.randrange(3)
                array = pool.empty((size,), np.dtype(np.int32))
                mark = number << 16 | turn
                array[::1024] = mark
                held.append((array, mark))
                if chance.random() < 0.3:
                    passed.put(held.pop(chance.randrange(len(held))))
                if chance.random() < 0.3 and not passed.empty():
                    held.append(passed.get_nowait())
                while len(held) > chance.randrange(5):
                    array, mark = held.pop(chance.randrange(len(held)))
                    if not (array[::1024] == mark).all():
                        wrong.append((number, turn))
                if turn % 100 == 50:
                    numbabn.clear_pool()
        except queue.Empty:
            pass  # another thread was faster
        except BaseException as error:
            wrong.append(error)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert wrong == []


# --- bounds -----------------------------------------------------------------------------------


def mapped():
    """Bytes of this process's mappings of 1 MiB and more that are not files."""
    total = 0
    with open("/proc/self/maps", encoding="ascii") as maps:
        for line in maps:
            span, _, _, _, inode, *_ = line.split()
            start, end = (int(text, 16) for text in span.split("-"))
            if inode == "0" and end - start >= MIB:
                total += end - start
    return total


def resident():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def test_limit_of_zero_keeps_nothing():
    output()
    assert pool._pool.idle_bytes > 0
    numbabn.set_pool_limit(0)
    assert pool._pool.idle_bytes == 0
    y = output()
    del y
    assert not pool._pool.idle
    assert not pool._pool.returned


def test_arrays_taken_before_the_limit_sank_are_not_kept():
    y = output()
    numbabn.set_pool_limit(0)
    assert np.isfinite(y).all()
    del y
    assert not pool._pool.idle


def test_the_oldest_go_first():
    dtype = np.dtype(np.uint8)
    numbabn.set_pool_limit(3 * 2 * MIB)
    taken = [pool.empty((2 * MIB,), dtype) for _ in range(5)]
    addresses = [address(array) for array in taken]
    for _ in range(5):
        taken.pop(0)
    assert list(pool._pool.idle) == addresses[2:]
    assert pool._pool.idle_bytes == 6 * MIB
    # The one that came back last is likeliest in cache.
    assert address(pool.empty((2 * MIB,), dtype)) == addresses[-1]


def test_larger_than_the_limit_is_left_to_numpy():
    numbabn.set_pool_limit(2 * MIB)
    assert not in_pool(pool.empty((4 * MIB,), np.dtype(np.uint8)))


@LINUX
def test_memory_goes_back_to_the_system():
    size = 64 * MIB
    numbabn.set_pool_limit(2 * size)
    before, rss = mapped(), resident()
    array = pool.empty((size,), np.dtype(np.uint8))
    array[...] = 1
    del array
    assert mapped() - before >= size  # kept for later
    assert resident() - rss > size // 2
    numbabn.clear_pool()
    assert mapped() - before < size // 2
    assert resident() - rss < size // 2
    assert pool._pool.idle_bytes == 0


@LINUX
def test_many_calls_do_not_pile_up():
    output()
    before = mapped()
    for _ in range(50):
        y, saved = numbabn.batch_norm_forward(X, None, None, training=True)
        numbabn.batch_norm_backward(y, saved)
    assert mapped() - before <= 4 * (X.nbytes + pool._HUGE_PAGE)


@pytest.mark.parametrize("wrong", [1.5, "1", None, True, [1]])
def test_limit_of_the_wrong_type(wrong):
    before = pool._pool.limit
    with pytest.raises(TypeError, match="nbytes: expected an int"):
        numbabn.set_pool_limit(wrong)
    assert pool._pool.limit == before


def test_negative_limit():
    before = pool._pool.limit
    with pytest.raises(ValueError, match="nbytes: expected at least 0, got -1"):
        numbabn.set_pool_limit(-1)
    assert pool._pool.limit == before


def test_limit_takes_numpy_integers_and_large_ones():
    numbabn.set_pool_limit(np.int64(5 * MIB))
    assert pool._pool.limit == 5 * MIB
    numbabn.set_pool_limit(1 << 70)
    assert in_pool(output())


# --- locks -----------------------------------------------------------------


def test_a_lease_may_end_while_the_lock_is_held():
    # As when garbage is collected inside the pool: waiting would be for ever.
    y = output()
    first = address(y)
    with pool._pool.lock:
        dropping = threading.Thread(target=lambda array: None, args=(y,), daemon=True)
        del y
        dropping.start()
        dropping.join(10)
        assert not dropping.is_alive()
        del dropping
        gc.collect()
        assert len(pool._pool.returned) == 1
    assert address(output()) == first  # and the block is not lost


def test_a_lease_that_ends_in_the_very_thread_that_holds_the_lock():
    arrays = [output() for _ in range(3)]
    addresses = {address(array) for array in arrays}

    def collect():
        with pool._pool.lock:
            arrays.clear()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    again = [output() for _ in range(3)]
    assert {address(array) for array in again} == addresses


def test_fork_between_the_books_and_the_blocks():
    # The parent's other threads do not exist in the child, where what they began stays undone.
    books = pool._Pool(4 * MIB)
    books.give_back(pool._Block(2 * MIB))
    books.idle_bytes += 16 * MIB
    books.forked()
    assert books.idle_bytes == 2 * MIB
    books.set_limit(0)
    assert not books.idle
