"""Rows of few channels are taken several as one: what that is, and that no result shows it."""

import numpy as np
import pytest
from grid import MODES
from support import DTYPES, assert_close, check_backward, problem, same_bits

import numbabn
from numbabn import calls
from numbabn.cpu import narrow, ways
from numbabn.layout import View

# Rows that make whole vectors, or cannot, a prime number of rows, and columns of more than one.
SHAPES = {
    (400, 3): 16 * 5,
    (2048, 8): 32,
    (999, 7): 27,
    (331, 5): 1,
    (192, 6, 2): 16,
    (64, 48): 4,
    (64, 64): 1,
}
SKIP = {"activation": "relu", "residual": True}


@pytest.fixture
def small_too(monkeypatch):
    """Has rows of small arrays taken as one, too."""

    def forget():
        narrow.rows_as_one.cache_clear()
        ways.forget_plans()
        calls._known.clear()

    monkeypatch.setattr(narrow, "NARROW_FROM", 0)
    forget()
    yield
    monkeypatch.undo()
    forget()


def view_of(shape):
    return View(True, shape[0], shape[1], int(np.prod(shape[2:])), None)


def test_how_many_rows_are_one(small_too):
    assert {shape: narrow.rows_as_one(view_of(shape)) for shape in SHAPES} == SHAPES


def test_small_arrays_and_planes_stay_as_they_are():
    assert narrow.rows_as_one(View(True, 1000, 3, 1, None)) == 1
    assert narrow.rows_as_one(View(False, 1 << 16, 3, 32, None)) == 1
    assert narrow.rows_as_one(View(True, 1 << 16, 3, 1, None)) > 1


@MODES
@pytest.mark.parametrize(
    "options", [{}, {"activation": "relu", "residual": True}], ids=["", "skip"]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(shape, dtype, options, training, small_too):
    check_backward(problem(shape, dtype, training=training, **options))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", [1e4, 1e-30])
def test_far_from_zero_and_far_apart(offset, dtype, small_too):
    """Columns of a channel are summed relative to values of their own, and merged."""
    p = problem((400, 3), dtype, training=True)
    p.x[:200] += p.x.dtype.type(offset)
    p.x[1] = 1e6
    check_backward(p)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_infinity_and_nan_stay_in_their_channels(dtype, small_too):
    p = problem((400, 3), dtype, training=True)
    clean = numbabn.batch_norm_stats(p.x)
    p.x[7, 0], p.x[390, 1] = np.inf, np.nan
    stats = numbabn.batch_norm_stats(p.x)
    assert np.isinf(stats.mean[0])
    assert np.isnan(stats.mean[1])
    assert np.isnan(stats.m2[:2]).all()
    assert stats.mean[2] == clean.mean[2]
    assert stats.m2[2] == clean.m2[2]


@MODES
def test_the_stages_give_the_same_sums(training, small_too):
    p = problem((400, 3), training=training)
    _, saved = p.forward()
    _, dweight, dbias = numbabn.batch_norm_backward(p.grad_output, saved)
    sum_dy, sum_dy_xmu = numbabn.batch_norm_backward_reduce(
        p.grad_output, p.x, saved.mean, saved.invstd
    )
    terms = np.abs(p.grad_output * (p.x - saved.mean) * saved.invstd).sum(axis=0)
    assert_close(dbias, sum_dy, scale=np.abs(p.grad_output).sum(axis=0), what="dbias")
    assert_close(dweight, sum_dy_xmu * saved.invstd, scale=terms, what="dweight")


def test_any_number_of_threads(small_too, set_threads):
    found = []
    for threads in (1, 2):
        set_threads(threads)
        p = problem((20_000, 3), training=True)
        y, grads = p.gradients()
        found.append([y, *grads, p.running_mean, p.running_var])
    for one, other in zip(*found, strict=True):
        assert same_bits(one, other)
