"""The same bits from any number of threads, from run to run, and from several Python threads."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numba
import numpy as np
import pytest
from grid import MODES
from support import ARRANGEMENTS, DTYPES, problem, same_bits

import numbabn

pytestmark = pytest.mark.skipif(
    numba.config.NUMBA_NUM_THREADS < 4, reason="NUMBA_NUM_THREADS is below 4"
)

# Fewer channels than threads, one channel, many small ones, tall and wide columns, odd sizes; most
# are large enough to be worth several threads.
SHAPES = [
    (8, 3, 65, 127),
    (1, 1, 200_003),
    (4, 2, 256, 256),
    (16, 129, 28, 28),
    (32, 130, 7, 7),
    (31, 66, 9, 9),
    (50_000, 5),
    (20_001, 37),
    (600, 700),
    (150, 512),
    (96, 1024),
    (7, 3),
]
SUMS_OF_ALL = [(8, 3, 65, 127), (32, 130, 7, 7), (20_001, 37)]


def everything(shape, dtype, layout, training, **options):
    """All results of both passes and of the stages."""
    p = problem(shape, dtype, training=training, arrange=ARRANGEMENTS[layout], **options)
    y, grads = p.gradients()
    stats = numbabn.batch_norm_stats(p.x)
    invstd = 1 / np.sqrt(stats.var + 1e-5)
    reduced = numbabn.batch_norm_backward_reduce(p.grad_output, p.x, stats.mean, invstd)
    return [y, *grads, p.running_mean, p.running_var, stats.mean, stats.m2, *reduced]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert same_bits(a, b)


@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_threads(shape, layout, training, set_threads):
    set_threads(1)
    expected = everything(shape, "float32", layout, training)
    for threads in (2, 3, 4):
        set_threads(threads)
        assert_same(expected, everything(shape, "float32", layout, training))


@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", SUMS_OF_ALL)
def test_any_number_of_threads_in_other_dtypes(shape, dtype, layout, training, set_threads):
    set_threads(1)
    expected = everything(shape, dtype, layout, training)
    for threads in (2, 3, 4):
        set_threads(threads)
        assert_same(expected, everything(shape, dtype, layout, training))


@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SUMS_OF_ALL)
def test_any_number_of_threads_with_relu_and_residual(shape, layout, training, set_threads):
    options = {"activation": "relu", "residual": True}
    set_threads(1)
    expected = everything(shape, "float32", layout, training, **options)
    for threads in (2, 3, 4):
        set_threads(threads)
        assert_same(expected, everything(shape, "float32", layout, training, **options))


@pytest.mark.parametrize("shape", SUMS_OF_ALL)
def test_run_after_run(shape, set_threads):
    set_threads(4)
    expected = everything(shape, "float32", "contiguous", True)
    for _ in range(20):
        assert_same(expected, everything(shape, "float32", "contiguous", True))


def test_alignment_and_place_in_memory_do_not_matter(set_threads):
    # Vector loops that peel to a boundary must not sum in another order for it.
    p = problem((4, 3, 33, 35))
    running = p.running_mean.copy(), p.running_var.copy()
    x, dy = p.x, p.grad_output
    results = []
    for arrangement in ("contiguous", "off_by_one_value", "misaligned"):
        p.x, p.grad_output = ARRANGEMENTS[arrangement](x), ARRANGEMENTS[arrangement](dy)
        p.running_mean, p.running_var = (a.copy() for a in running)
        y, grads = p.gradients()
        results.append([y, *grads, p.running_mean, p.running_var])
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@MODES
@pytest.mark.parametrize("shape", [(48, 2048), (40, 4096)])
def test_where_in_a_page_outputs_begin_does_not_matter(shape, training, set_threads):
    # Threads part rows that are whole pages at the pages of what they write.
    rng = np.random.default_rng(7)
    x, dy = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    page = 4096
    expected = None
    for threads, begin in [(1, 0), (2, 0), (2, 16), (4, 500), (2, 512), (4, 1008), (2, 1023)]:
        set_threads(threads)
        results = []
        for _ in range(2):
            memory = np.full(x.nbytes + 2 * page, 0xAB, np.uint8)
            first = -memory.ctypes.data % page + 4 * begin
            out = memory[first : first + x.nbytes].view(np.float32).reshape(shape)
            results.append((out, memory[:first], memory[first + x.nbytes :]))
        (y, *around), (dx, *around_dx) = results
        statistics = np.full(shape[1], 0.25, np.float32), np.full(shape[1], 2, np.float32)
        _, saved = numbabn.batch_norm_forward(x, *statistics, training=training, out=y)
        found = [*numbabn.batch_norm_backward(dy, saved, out=dx), y, *statistics]
        assert all(np.all(memory == 0xAB) for memory in (*around, *around_dx))
        if expected is None:
            expected = found
        assert_same(expected, found)


def test_calls_from_several_python_threads_at_once():
    calls = [
        ("float32", (8, 3, 65, 127)),
        ("float32", (32, 130, 7, 7)),
        ("float64", (20_001, 37)),
        ("float32", (7, 3)),
    ]
    expected = [everything(shape, dtype, "contiguous", True) for dtype, shape in calls]
    start = Barrier(len(calls))

    def work(call):
        dtype, shape = call
        start.wait()
        return [everything(shape, dtype, "contiguous", True) for _ in range(10)]

    with ThreadPoolExecutor(len(calls)) as pool:
        for reference, results in zip(expected, pool.map(work, calls), strict=True):
            for result in results:
                assert_same(reference, result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_input_in_a_batch_gives_the_same_output(dtype):
    # Two channels of one content, wherever they fall in blocks of channels.
    p = problem((6, 67, 5, 5), dtype, affine="none")
    p.x[:, 50] = p.x[:, 3]
    p.x[:, 66] = p.x[:, 3]
    y = p.batch_norm()
    assert np.array_equal(y[:, 50], y[:, 3])
    assert np.array_equal(y[:, 66], y[:, 3])
