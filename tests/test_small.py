"""Small arrays go through a whole pass in one kernel: the results are those of the ordinary way."""

import numpy as np
import pytest
from grid import MODES
from support import as_dtype, same_bits

import numbabn
from numbabn import calls
from numbabn.cpu import launch, schedule
from numbabn.cpu.caches import Caches

SHAPES = [((2, 64), 1), ((4, 3, 160), 1), ((3, 16, 7, 7), 1), ((6, 5, 33), 2), ((2, 5, 3, 4), 0)]


class Counting:
    """A call's kernels, counted."""

    def __init__(self, monkeypatch, known):
        self.count = 0
        passes = known.small
        assert passes is not None
        counted = {name: self._count(getattr(passes, name)) for name in ("forward", "backward")}
        monkeypatch.setattr(known, "small", passes._replace(**counted))

    def _count(self, kernel):
        def run(*arguments):
            self.count += 1
            return kernel(*arguments)

        return run


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
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_one_kernel_does_what_many_do(shape, axis, dtype, training, relu, out, monkeypatch):
    x = np.random.default_rng(0).standard_normal(shape).astype(as_dtype(dtype))
    known = calls.known(x, axis)
    assert known is not None
    kernels = Counting(monkeypatch, known)
    small = step(x, axis, training, relu, out)
    assert kernels.count == 2
    monkeypatch.setattr(known, "small", None)
    for one, other in zip(small, step(x, axis, training, relu, out), strict=True):
        assert same_bits(one, other)
    assert kernels.count == 2


def test_only_small_arrays_go_that_way(monkeypatch, on_machine):
    # Where L2 is smaller, it is what training of these arrays outgrows first, in two kernels.
    on_machine(Caches(1 << 20, 32 << 20, 2))
    monkeypatch.setattr(calls, "_known", {})
    # Rows are shared out later than planes, and than rows that have pages for each thread.
    for channels, axis, least in (
        (64, 1, schedule.SHARED_ROWS_FROM),
        (2048, 1, launch.PARALLEL_FROM["omp"]),
        (64, 0, launch.PARALLEL_FROM["omp"]),
    ):
        for rows, expected in ((least // channels, False), (least // channels - 1, True)):
            shape = (rows, channels) if axis == 1 else (channels, rows)
            known = calls.known(np.empty(shape, np.float32), axis)
            assert (known.small is not None) == expected
    known = calls.known(np.empty((launch.PARALLEL_FROM["omp"] // 64, 64), np.float32), 1)
    assert known.small is not None
    assert known.small.backward is None


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
