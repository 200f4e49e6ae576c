"""Layouts in memory: views, slices, negative strides, unaligned data, and where results go.

The values of an array decide the result, however they lie in memory; and the result lies as the
input does.
"""

import numpy as np
import pytest
from grid import MODES
from support import ARRANGEMENTS, DTYPES, channels_last, check_backward, problem, same_bits

import numbabn

# Arrays that are whole blocks of memory, whose layout the output must share.
DENSE = ("contiguous", "channels_last", "read_only", "off_by_one_value")
SHAPES = [(2, 3, 17, 33), (3, 65, 7, 7), (5, 4, 6), (90, 37)]


def same_strides(a, b):
    """Equal strides wherever a stride means anything."""
    return all(s == t for s, t, n in zip(a.strides, b.strides, a.shape, strict=True) if n > 1)


@MODES
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_strides(shape, arrangement, training):
    p = problem(shape, arrange=ARRANGEMENTS[arrangement], training=training)
    (dx, *_) = check_backward(p)
    if arrangement in DENSE:
        y = p.batch_norm()
        assert same_strides(y, p.x)
        assert same_strides(dx, p.x)


@MODES
@pytest.mark.parametrize("arrangement", ["channels_last", "fortran", "reversed", "misaligned"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_any_strides_in_other_dtypes(dtype, arrangement, training):
    check_backward(
        problem((2, 5, 9, 11), dtype, arrange=ARRANGEMENTS[arrangement], training=training)
    )


@MODES
@pytest.mark.parametrize("arrangement", ["channels_last", "rotated", "every_second", "misaligned"])
def test_any_strides_with_relu_and_residual(arrangement, training):
    check_backward(
        problem(
            (2, 5, 9, 11),
            arrange=ARRANGEMENTS[arrangement],
            activation="relu",
            residual=True,
            training=training,
        )
    )


@MODES
@pytest.mark.parametrize("arrangement", ["contiguous", "fortran", "reversed", "cropped"])
@pytest.mark.parametrize("channel_axis", [0, 2, -1])
def test_any_strides_with_any_channel_axis(channel_axis, arrangement, training):
    check_backward(
        problem(
            (6, 5, 9, 11),
            channel_axis=channel_axis,
            arrange=ARRANGEMENTS[arrangement],
            training=training,
        )
    )


@MODES
def test_repeated_values_with_stride_zero(training):
    p = problem((4, 3, 5, 6), training=training)
    p.x = np.broadcast_to(p.x[:, :, :, :1], (4, 3, 5, 6))
    p.grad_output = np.broadcast_to(p.grad_output[:1], (4, 3, 5, 6))
    check_backward(p)


@MODES
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("step", [2, -1])
def test_parameters_of_any_stride(name, step, training):
    # In training the running statistics are written through the view that was given.
    p = problem((4, 3, 5, 6), training=training)
    values = getattr(p, name)
    memory = np.full(3 * abs(step), 77, np.float32)
    view = memory[::step]
    view[...] = values
    setattr(p, name, view)
    check_backward(p)
    if step == 2:
        assert np.array_equal(memory[1::2], [77, 77, 77])


@MODES
@pytest.mark.parametrize("shape", SHAPES)
def test_channels_last_view_equals_channels_last_array(shape, training):
    # The same memory named in two ways, so the same kernels on the same numbers.
    view = problem(shape, training=training, arrange=channels_last)
    y, grads = view.gradients()
    array = problem(shape, training=training)
    for name in ("x", "grad_output"):
        setattr(array, name, np.moveaxis(getattr(view, name), 1, -1))
    array.options["channel_axis"] = -1
    y_last, grads_last = array.gradients()
    assert np.array_equal(np.moveaxis(y, 1, -1), y_last)
    assert np.array_equal(np.moveaxis(grads[0], 1, -1), grads_last[0])
    assert same_bits(grads[1], grads_last[1])
    assert same_bits(grads[2], grads_last[2])
    assert same_bits(view.running_var, array.running_var)


@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out(dtype, layout, training):
    a, b, c = (
        problem((3, 4, 9, 7), dtype, training=training, arrange=ARRANGEMENTS[layout])
        for _ in range(3)
    )
    fresh = a.batch_norm()
    out = ARRANGEMENTS[layout](np.zeros_like(a.x))
    assert b.batch_norm(out=out) is out
    assert np.array_equal(out, fresh)
    out[...] = 0
    y, _ = c.forward(out=out)
    assert y is out
    assert np.array_equal(out, fresh)


@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("options", [{}, {"residual": True, "activation": "relu"}])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_place(shape, options, layout, training):
    a, b = (
        problem(shape, training=training, arrange=ARRANGEMENTS[layout], **options) for _ in range(2)
    )
    y = a.batch_norm()
    assert b.batch_norm(out=b.x) is b.x
    assert np.array_equal(b.x, y)
    assert np.array_equal(a.running_mean, b.running_mean)


@MODES
def test_in_place_through_another_view_of_x(training):
    a, b = (problem((3, 4, 9, 7), training=training) for _ in range(2))
    y = a.batch_norm()
    b.batch_norm(out=b.x[...])
    assert np.array_equal(b.x, y)


@MODES
def test_results_do_not_share_memory_with_anything(training):
    p = problem((3, 4, 9, 7), activation="relu", residual=True, training=training)
    y, saved = p.forward()
    kept = y.copy()
    grads = numbabn.batch_norm_backward(p.grad_output, saved)
    arrays = [p.x, p.options["residual"], p.grad_output, y, *grads]
    for i, a in enumerate(arrays):
        for b in arrays[:i]:
            assert not np.shares_memory(a, b)
    # Later calls must not reuse memory that is still referenced.
    p.gradients()
    assert np.array_equal(y, kept)


@MODES
def test_out_in_the_middle_of_a_larger_array(training):
    # Values just before and after `out` stay: no kernel writes past its ends.
    for shape in [(3, 4, 9, 7), (3, 4, 7, 7), (29, 13), (1, 1, 1001)]:
        a, b = (problem(shape, training=training) for _ in range(2))
        memory = np.full(a.x.size + 64, 77, np.float32)
        out = memory[31 : 31 + a.x.size].reshape(shape)
        b.batch_norm(out=out)
        assert np.array_equal(out, a.batch_norm())
        assert (memory[:31] == 77).all()
        assert (memory[31 + out.size :] == 77).all()


def test_size_one_axes_may_have_any_stride():
    p = problem((4, 3, 1, 5), training=True)
    memory = np.zeros((4, 3, 7, 5), np.float32)
    memory[:, :, :1] = p.x
    p.x = memory[:, :, :1]
    check_backward(p)
    # NumPy calls this one both C-contiguous and channels-last.
    q = problem((4, 3, 1, 1), training=True)
    assert q.batch_norm(out=np.empty((4, 3, 1, 1), np.float32)).shape == (4, 3, 1, 1)
