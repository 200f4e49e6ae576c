"""The stages that the two passes are made of, and that distributed layers use."""

import numpy as np
import pytest
from grid import MODES
from support import ARRANGEMENTS, DTYPES, assert_close, largest, problem, same_bits, wide

import numbabn
from numbabn import reference

LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
CASES = [((5, 3, 17, 33), 1), ((8, 65, 7, 7), 1), ((700, 37), 1), ((4, 9, 5, 6), 2)]


def rows(a, axis):
    return np.moveaxis(wide(a), axis, 0).reshape(a.shape[axis], -1)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_stats(shape, axis, dtype, layout):
    p = problem(shape, dtype, channel_axis=axis, arrange=ARRANGEMENTS[layout])
    stats = numbabn.batch_norm_stats(p.x, channel_axis=axis)
    values = rows(p.x, axis)
    assert stats.count == values.shape[1]
    assert stats.mean.dtype == stats.m2.dtype == np.float64
    np.testing.assert_allclose(stats.mean, values.mean(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats.var, values.var(1), rtol=1e-6)
    np.testing.assert_allclose(stats.unbiased_var, values.var(1, ddof=1), rtol=1e-6)


@LAYOUTS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_merged_stats_of_parts(parts, dtype, layout):
    # The parts differ widely in mean, where merging by sums of squares would fail.
    p = problem((29, 5, 6, 7), dtype, arrange=ARRANGEMENTS[layout])
    p.x[...] += 1000 * np.arange(29).reshape(-1, 1, 1, 1).astype(dtype)
    whole = numbabn.batch_norm_stats(p.x)
    merged = numbabn.merge_stats(
        [numbabn.batch_norm_stats(part) for part in np.array_split(p.x, parts)]
    )
    rtol = 1e-13 if dtype == "float64" else 1e-6
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=rtol)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=rtol)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"residual": True}], ids=str)
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_normalize(shape, axis, options, dtype, layout):
    p = problem(shape, dtype, channel_axis=axis, arrange=ARRANGEMENTS[layout])
    column = [-1 if i == axis else 1 for i in range(len(shape))]
    scale, shift = p.weight, p.bias
    expected = wide(p.x) * wide(scale).reshape(column) + wide(shift).reshape(column)
    size = largest(wide(p.x), axis) * wide(np.abs(scale)).reshape(column)
    residual = p.grad_output if options.get("residual") else None
    if residual is not None:
        expected, size = expected + wide(residual), size + largest(wide(residual), axis)
    if options.get("activation"):
        expected = np.maximum(expected, 0)
    options = {"channel_axis": axis, **options, "residual": residual}
    y = numbabn.normalize(p.x, scale, shift, **options)
    assert y.dtype == p.x.dtype
    assert_close(y, expected, scale=size, channel_axis=axis, what="y")
    out = ARRANGEMENTS[layout](np.zeros_like(p.x))
    assert numbabn.normalize(p.x, scale, shift, out=out, **options) is out
    assert np.array_equal(out, y)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_normalize_in_place(dtype):
    p = problem((4, 3, 9, 7), dtype)
    y = numbabn.normalize(p.x, p.weight, p.bias)
    assert numbabn.normalize(p.x, p.weight, p.bias, out=p.x) is p.x
    assert np.array_equal(p.x, y)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_backward_reduce(shape, axis, dtype, layout):
    p = problem(shape, dtype, channel_axis=axis, arrange=ARRANGEMENTS[layout])
    stats = numbabn.batch_norm_stats(p.x, channel_axis=axis)
    invstd = 1 / np.sqrt(stats.var + 1e-5)
    sum_dy, sum_dy_xmu = numbabn.batch_norm_backward_reduce(
        p.grad_output, p.x, stats.mean, invstd, channel_axis=axis
    )
    dy, xmu = rows(p.grad_output, axis), rows(p.x, axis) - stats.mean[:, None]
    assert sum_dy.dtype == sum_dy_xmu.dtype == np.float64
    # float64 arrays, but of the working precision's accuracy.
    unit = 2.0**-52 if dtype == "float64" else 2.0**-23
    assert (np.abs(sum_dy - dy.sum(1)) <= 8 * unit * np.abs(dy).sum(1)).all()
    terms = dy * xmu
    assert (np.abs(sum_dy_xmu - terms.sum(1)) <= 8 * unit * np.abs(terms).sum(1)).all()


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", ["both", "none"])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_training_step_spread_over_workers(shape, axis, workers, affine, dtype, layout):
    # Each worker has a share of the batch; together they do what one does with all of it.
    arrange = ARRANGEMENTS[layout]
    p = problem(shape, dtype, channel_axis=axis, affine=affine)
    expected = p.expected()
    xs, dys = ([arrange(part) for part in np.array_split(a, workers)] for a in (p.x, p.grad_output))
    at = {"channel_axis": axis}
    stats = numbabn.merge_stats([numbabn.batch_norm_stats(x, **at) for x in xs])
    invstd = 1 / np.sqrt(stats.var + p.options["eps"])
    sums = [
        numbabn.batch_norm_backward_reduce(dy, x, stats.mean, invstd, **at)
        for dy, x in zip(dys, xs, strict=True)
    ]
    sum_dy, sum_dy_xmu = (np.sum(part, axis=0) for part in zip(*sums, strict=True))
    dx = [
        numbabn.batch_norm_backward_elemt(
            dy, x, stats.mean, invstd, p.weight, sum_dy, sum_dy_xmu, stats.count, **at
        )
        for dy, x in zip(dys, xs, strict=True)
    ]
    assert all(part.dtype == p.x.dtype for part in dx)
    whole = np.concatenate(dx)
    assert_close(whole, expected.grads[0], scale=expected.dx_scale, channel_axis=axis, what="dx")
    assert_close(sum_dy, expected.grads[2], scale=expected.dbias_terms * 2.0**29)
    assert_close(sum_dy_xmu * invstd, expected.grads[1], scale=expected.dweight_terms * 2.0**29)
    out = arrange(np.zeros_like(xs[0]))
    again = numbabn.batch_norm_backward_elemt(
        dys[0], xs[0], stats.mean, invstd, p.weight, sum_dy, sum_dy_xmu, stats.count, out=out, **at
    )
    assert again is out
    assert np.array_equal(out, dx[0])


@MODES
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_saved_statistics_serve_the_stages(shape, axis, training):
    # What `saved` names mean and invstd is what the stages take under these names.
    p = problem(shape, channel_axis=axis, training=training)
    expected = p.expected()
    _, saved = p.forward()
    sum_dy, sum_dy_xmu = numbabn.batch_norm_backward_reduce(
        p.grad_output, p.x, saved.mean, saved.invstd, channel_axis=axis
    )
    _, dweight, dbias = numbabn.batch_norm_backward(p.grad_output, saved)
    assert_close(dweight, sum_dy_xmu * saved.invstd, scale=expected.dweight_terms)
    assert_close(dbias, sum_dy, scale=expected.dbias_terms)


def test_eval_is_normalize_with_folded_statistics():
    p = problem((4, 3, 9, 7), "float64", training=False)
    scale = p.weight / np.sqrt(p.running_var + p.options["eps"])
    shift = p.bias - p.running_mean * scale
    expected, _ = reference.batch_norm_forward(*p.arrays, training=False)
    assert_close(numbabn.normalize(p.x, scale, shift), expected, channel_axis=1)
    assert same_bits(p.x, problem((4, 3, 9, 7), "float64", training=False).x)


@pytest.mark.parametrize("scale", [1.0, 1e30, 6e37])
@pytest.mark.parametrize("C", [16, 33])
def test_values_that_are_alike_and_large(C, scale):
    # Sixteen of the largest are beyond float32's range, and so is the square of any but the first.
    noise = np.random.default_rng(0).standard_normal((2, C, 7, 7))
    x = (scale * (1 + 1e-6 * noise)).astype(np.float32)
    found = numbabn.batch_norm_stats(x)
    exact = x.astype(np.float64).var(axis=(0, 2, 3)) * 98
    np.testing.assert_allclose(found.m2, exact, rtol=1e-6)
