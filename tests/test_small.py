"""The ordinary call takes a quick way: one kernel per pass, and the results of the checked way."""

import numpy as np
import pytest
from grid import MODES
from support import as_dtype, same_bits

import numbabn
from numbabn import backward, calls, functional
from numbabn.cpu import launch, schedule, ways
from numbabn.cpu.caches import Caches

SMALL = [((2, 64), 1), ((4, 3, 160), 1), ((3, 16, 7, 7), 1), ((6, 5, 33), 2), ((2, 5, 3, 4), 0)]
LARGE = [((2048, 64), 1), ((3, 64, 400), 1), ((2, 1, 40000), 1), ((1, 2048, 7, 7), 1)]
CASES = [
    *((*case, dtype) for dtype in ("float32", "float64", "float16", "bfloat16") for case in SMALL),
    *((*case, "float32") for case in LARGE),
]


@pytest.fixture
def kernels(monkeypatch):
    """The names of the kernels that are called, as they are."""
    called = []

    def counting(kernel, threads):
        def run(*arguments):
            called.append(kernel.__name__)
            return kernel(*arguments)

        return run

    monkeypatch.setattr(launch, "caller", counting)
    ways.forget_plans()
    yield called
    monkeypatch.undo()
    ways.forget_plans()


def step(x, axis, training, relu, out):
    """Every array that a forward and a backward pass write."""
    C = x.shape[axis]
    rng = np.random.default_rng(1)
    wide = np.float64 if x.dtype == np.float64 else np.float32
    mean, var = rng.standard_normal(C).astype(wide), rng.uniform(1, 2, C).astype(wide)
    weight, bias = rng.standard_normal(C).astype(wide), rng.standard_normal(C).astype(wide)
    grad = rng.standard_normal(x.shape).astype(x.dtype)
    y, dx = (np.empty_like(x), np.empty_like(x)) if out else (None, None)
    y, saved = numbabn.batch_norm_forward(
        x, mean, var, weight, bias, training, channel_axis=axis,
        activation="relu" if relu else None, out=y,
    )  # fmt: skip
    return y, mean, var, saved.mean, saved.invstd, *numbabn.batch_norm_backward(grad, saved, out=dx)


@pytest.mark.parametrize("out", [False, True], ids=["fresh", "out"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@MODES
@pytest.mark.parametrize(("shape", "axis", "dtype"), CASES, ids=str)
def test_one_kernel_per_pass(shape, axis, dtype, training, relu, out, monkeypatch, kernels):
    x = np.random.default_rng(0).standard_normal(shape).astype(as_dtype(dtype))
    quick = step(x, axis, training, relu, out)
    assert len(kernels) == 2, kernels
    monkeypatch.setattr(functional, "quick_forward", lambda *arguments: None)
    monkeypatch.setattr(backward, "known", lambda *arguments: None)
    for one, other in zip(quick, step(x, axis, training, relu, out), strict=True):
        assert same_bits(one, other)
    assert kernels[:2] == kernels[2:]


def test_small_arrays_are_for_one_thread(monkeypatch, on_machine, set_threads):
    on_machine(Caches(1 << 20, 32 << 20, 2))
    monkeypatch.setattr(launch, "_worth_while", lambda: 0)  # whatever the layer
    set_threads(2)
    # Rows are shared out later than planes, and than rows that have pages for each thread.
    for channels, axis, least in (
        (64, 1, schedule.SHARED_ROWS_FROM),
        (2048, 1, launch.PARALLEL_FROM["omp"]),
        (64, 0, launch.PARALLEL_FROM["omp"]),
    ):
        for rows, expected in ((least // channels, 2), (least // channels - 1, 1)):
            shape = (rows, channels) if axis == 1 else (channels, rows)
            known = calls.known(np.empty(shape, np.float32), axis)
            assert known.ways.way("forward").threads == expected
    known = calls.known(np.empty((launch.PARALLEL_FROM["omp"] // 64, 64), np.float32), 1)
    assert known.ways.way("forward").threads == 1
    assert known.ways.way("backward").threads == 2


@MODES
def test_nothing_is_written_where_out_shares_memory(training):
    memory = np.random.default_rng(0).standard_normal(72).astype(np.float32)
    x, weight, out = memory[:64].reshape(8, 8), memory[64:], memory[4:68].reshape(8, 8)
    mean, var = np.zeros(8, np.float32), np.ones(8, np.float32)
    before = [array.copy() for array in (memory, mean, var)]
    for given, scale in ((x, None), (x.copy(), weight)):
        with pytest.raises(ValueError, match="out"):
            numbabn.batch_norm_forward(given, mean, var, scale, None, training, out=out)
    assert all(map(same_bits, (memory, mean, var), before))

    y, saved = numbabn.batch_norm_forward(x, mean, var, training=training)
    with pytest.raises(ValueError, match="out"):
        numbabn.batch_norm_backward(y, saved, out=out)
    assert same_bits(memory, before[0])
