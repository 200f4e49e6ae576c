"""Stores past the caches give the bits of ordinary ones, wherever an array begins in memory.

They want addresses on boundaries, which `schedule` asks of large arrays only; here of all.
"""

import numba
import numpy as np
import pytest
from support import as_dtype, same_bits

import numbabn
from numbabn import layout
from numbabn.cpu import caches, launch, serial, ways
from numbabn.cpu.boundaries import PAGE, step_between
from numbabn.cpu.memory import pointer
from numbabn.cpu.vector import LANES

DTYPES = ["float32", "float64", "float16", "bfloat16"]
# Planes that are columns to sums (4×4, 5×5), planes that are summed in pairs of rows and a last row
# (7×7), planes with an end that is no vector, with none, and of a few channels; channels last, in
# whole vectors, which go on from row to row, and not; long rows, of one block of columns and a
# short one; rows 2 KiB or a multiple apart, which are summed before they are stored
# (`gradient_columns.RIVALS`).
SHAPES = {
    "4x4": ((104, 40, 4, 4), 1),
    "5x5": ((56, 48, 5, 5), 1),
    "7x7": ((35, 40, 7, 7), 1),
    "16x17": ((28, 9, 16, 17), 1),
    "16x16": ((29, 9, 16, 16), 1),
    "chunks": ((4, 3, 7001), 1),
    "channels last": ((35, 40, 48), -1),
    "64 channels last": ((26, 40, 64), -1),
    "odd channels last": ((45, 40, 37), -1),
    "long rows": ((13, 5, 1056), -1),
    "rival rows": ((13, 5, 1024), -1),
    "rows in turn": ((13, 11, 512), -1),
}


def place(shape, dtype, past):
    """An uninitialised array that begins `past` elements after a page does."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + 2 * PAGE, np.uint8)
    at = -raw.ctypes.data % PAGE + past * dtype.itemsize
    return raw[at : at + nbytes].view(dtype).reshape(shape)


def results(shape, axis, dtype, past, after, options):
    """Outputs of the four passes, given arrays that begin `past` elements after a page does.

    What is written begins `after` elements further on than what is read.
    """
    rng = np.random.default_rng(1)
    x, dy, residual = (place(shape, dtype, past) for _ in range(3))
    out = place(shape, dtype, past + after)
    for array in (x, dy, residual):
        array[...] = rng.standard_normal(shape).astype(dtype)
    C = shape[axis]
    options = {**options, "residual": residual} if options.pop("skip", False) else options
    found = []
    for training in (True, False):
        mean, var = np.full(C, 0.25, np.float32), np.full(C, 2, np.float32)
        out.view(np.uint8)[...] = 0xAB
        _, saved = numbabn.batch_norm_forward(
            x, mean, var, training=training, channel_axis=axis, out=out, **options
        )
        found.append(out.copy())
        out.view(np.uint8)[...] = 0xAB
        found += numbabn.batch_norm_backward(dy, saved, out=out)[1:]
        found.append(out.copy())
    return found


@pytest.fixture
def plans_of_its_own():
    """Forget plans that were made for other caches than the machine's."""
    yield
    ways.forget_plans()


@pytest.mark.parametrize("options", [{}, {"activation": "relu", "skip": True}], ids=["", "skip"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.usefixtures("plans_of_its_own")
def test_outputs_that_begin_anywhere(monkeypatch, case, dtype, options):
    shape, axis = SHAPES[case]
    dtype = as_dtype(dtype)
    assert np.prod(shape) >= launch.PARALLEL_FROM["omp"]  # for several threads
    first = []
    places = [(past, 0) for past in sorted({0, 1, 5, 16 // dtype.itemsize, 40 // dtype.itemsize})]
    # Rows are gone through backwards for these.
    places += [(0, 64 // dtype.itemsize), (1, 16 // dtype.itemsize)]
    for past, after in places:
        ordinary, streamed = [], []
        for limit, found in ((1 << 60, ordinary), (0, streamed)):
            monkeypatch.setattr(caches, "_last_cache", lambda limit=limit: limit)
            ways.forget_plans()
            found += results(shape, axis, dtype, past, after, dict(options))
        first = first or ordinary
        for a, b, c in zip(first, ordinary, streamed, strict=True):
            assert same_bits(a, b)
            assert same_bits(a, c)


@numba.njit
def step_of(target, first, second):
    return step_between(pointer(target), pointer(first), pointer(second))


def test_the_way_through_rows_follows_from_where_they_lie():
    at = {past: place((64,), np.dtype(np.float32), past) for past in (0, 1, 16, 32, 33, 512, 1024)}
    upwards = [(0, 0, None), (0, 1, None), (512, 0, None), (1024, 0, 0), (33, 0, None)]
    upwards += [(16, 0, 32)]  # held up either way
    upwards += [(None, 0, None)]
    downwards = [(1, 0, None), (32, 0, None), (16, 512, 0), (16, 0, 512), (16, 0, 1)]
    for places, step in [(p, LANES) for p in upwards] + [(p, -LANES) for p in downwards]:
        arrays = (None if past is None else at[past] for past in places)
        assert step_of(*arrays) == step, places


@pytest.mark.parametrize("past", [1, 4, 15])
def test_infinity_and_nan_stay_in_their_columns(past):
    # Columns up to the first boundary are loaded along with some that do not belong to them.
    shape, axis = SHAPES["long rows"]
    x = place(shape, np.dtype(np.float32), past)
    x[...] = np.random.default_rng(3).standard_normal(shape)
    before = numbabn.batch_norm(x, None, None, training=True, channel_axis=axis)
    x[..., 14], x[..., 15], x[1, 2, 16] = np.inf, np.nan, -np.inf
    y, saved = numbabn.batch_norm_forward(x, None, None, training=True, channel_axis=axis)
    dx, dweight, dbias = numbabn.batch_norm_backward(x, saved)
    spoilt = np.zeros(shape[axis], bool)
    spoilt[14:17] = True
    assert same_bits(y[..., ~spoilt], before[..., ~spoilt])
    for found in (y, dx, dweight, dbias):
        assert np.isfinite(found[..., ~spoilt]).all()
    for found in (y, dx, dweight):
        assert not np.isfinite(found[..., spoilt]).all()


@pytest.mark.parametrize("past", [0, 1, 11])
def test_a_range_that_begins_near_the_end_of_a_plane(past):
    # 6 elements of a plane are left, fewer than may lie before the boundary.
    N, C, L, segment = 3, 4, 70, 64
    x = np.random.default_rng(2).standard_normal(N * C * L).astype(np.float32)
    table = np.arange(6.0 * C).reshape(6, C) + 1
    slopes = np.arange(3.0 * C).reshape(3, C)
    nothing = np.empty(0, np.float32)
    items = N * C * 2
    found = {}
    for streaming in (False, True):
        y, dx = (place((x.size,), x.dtype, past) for _ in range(2))
        y[...], dx[...] = 7, 7
        serial.normalize_planes(
            x, None, None, y, C, L, segment, nothing, nothing, nothing, nothing, 0.0, table,
            -np.inf, streaming, 1, items,
        )  # fmt: skip
        serial.backward_elements_planes(
            x, x, None, dx, None, C, L, segment, table, slopes, False, streaming, 1, items
        )
        assert (y[:segment] == 7).all()
        assert (dx[:segment] == 7).all()
        found[streaming] = y, dx
    for a, b in zip(found[False], found[True], strict=True):
        assert same_bits(a, b)
    scale, shift, mean = table[3, 0], table[4, 0], table[0, 0]
    expected = (x[segment:L] - mean) * scale + shift
    np.testing.assert_allclose(found[True][0][segment:L], expected, rtol=1e-5)


def test_layouts_are_as_meant():
    views = {name: layout.describe(*_of(*case)) for name, case in SHAPES.items()}
    assert {name for name, view in views.items() if view.columns and view.L >= 16} == {"4x4", "5x5"}
    assert {name for name, view in views.items() if not view.columns} == {
        "7x7", "16x17", "16x16", "chunks"
    }  # fmt: skip


def _of(shape, axis):
    x = np.empty(shape, np.float32)
    return x.shape, x.strides, x.itemsize, axis % x.ndim
