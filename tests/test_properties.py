"""Random shapes, axis orders, strides and channel axes against the reference (hypothesis)."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import assert_close, check_backward, problem, same_bits, wide

import numbabn


@st.composite
def arrangements(draw, rank):
    """A function that puts values into memory with an axis order and a step for every axis."""
    order = draw(st.permutations(range(rank)))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2, -1]), min_size=rank, max_size=rank))

    def arrange(a):
        memory = np.zeros([a.shape[i] * abs(steps[i]) for i in order], a.dtype)
        view = memory.transpose(np.argsort(order))[tuple(slice(None, None, s) for s in steps)]
        view[...] = a
        return view

    return arrange


@st.composite
def problems(draw, modes=(True, False), smallest=1):
    rank = draw(st.integers(2, 5))
    # Mostly small, so that every combination of 1s occurs, with one axis that may be long.
    shape = draw(st.lists(st.integers(smallest, 6), min_size=rank, max_size=rank))
    shape[draw(st.integers(0, rank - 1))] = draw(st.integers(smallest, 200))
    return problem(
        tuple(shape),
        draw(st.sampled_from(["float32", "float32", "float64", "float16"])),
        channel_axis=draw(st.integers(-rank, rank - 1)),
        training=draw(st.sampled_from(modes)),
        affine=draw(st.sampled_from(["both", "weight", "bias", "none"])),
        residual=draw(st.booleans()),
        # ReLU has tests of its own: near its kink, rounding decides, and values may sit there.
        activation=None,
        momentum=draw(st.sampled_from([0.1, 0.0, 1.0, -0.5])),
        # A batch of two can have almost no variance, which eps keeps from growing rounding errors.
        eps=0.5,
        arrange=draw(arrangements(rank)),
        seed=draw(st.integers(0, 100)),
    )


def values_per_channel(p):
    return p.x.size // p.x.shape[p.channel_axis]


@given(problems())
def test_both_passes(p):
    if p.options["training"] and values_per_channel(p) == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            p.forward()
    else:
        check_backward(p)


@given(problems(), st.booleans())
def test_out_equals_a_fresh_output(p, in_place):
    if p.options["training"] and values_per_channel(p) == 1:
        return
    p.x = np.ascontiguousarray(p.x)
    running = [p.running_mean.copy(), p.running_var.copy()]
    y = p.batch_norm()
    p.running_mean, p.running_var = running
    out = p.x if in_place else np.full_like(p.x, 77)
    assert p.batch_norm(out=out) is out
    assert same_bits(out, y)


@given(problems(modes=[False]), st.data())
def test_eval_of_a_part_is_the_part_of_eval(p, data):
    # Any part along any axis but the channels': each value is normalized on its own.
    p.options["residual"] = None
    axis = data.draw(
        st.sampled_from([i for i in range(p.x.ndim) if i != p.channel_axis % p.x.ndim])
    )
    stop = data.draw(st.integers(1, p.x.shape[axis]))
    part = (slice(None),) * axis + (slice(stop),)
    whole = p.batch_norm()[part]
    p.x = p.x[part]
    assert np.array_equal(p.batch_norm(), whole)


@given(problems(modes=[True], smallest=2))
def test_training_ignores_order_within_a_channel(p):
    # Up to rounding: the statistics are sums, and nothing else depends on position.
    p.options["residual"] = None
    expected = p.expected().y
    p.x = np.flip(p.x, [i for i in range(p.x.ndim) if i != p.channel_axis % p.x.ndim])
    y = np.flip(p.batch_norm(), [i for i in range(p.x.ndim) if i != p.channel_axis % p.x.ndim])
    assert_close(y, expected, channel_axis=p.channel_axis, scale=1.0)


@given(problems(modes=[True], smallest=2), st.data())
def test_merged_parts_have_the_statistics_of_the_whole(p, data):
    axis = p.channel_axis
    stats = numbabn.batch_norm_stats(p.x, channel_axis=axis)
    split = 0 if axis % p.x.ndim else 1
    cuts = sorted(data.draw(st.lists(st.integers(0, p.x.shape[split]), max_size=3)))
    parts = [
        numbabn.batch_norm_stats(part, channel_axis=axis)
        for part in np.split(p.x, cuts, axis=split)
    ]
    merged = numbabn.merge_stats(parts)
    assert merged.count == stats.count == math.prod(p.x.shape) // p.x.shape[axis]
    rows = np.moveaxis(wide(p.x), axis, 0).reshape(p.x.shape[axis], -1)
    for found in (stats, merged):
        np.testing.assert_allclose(found.mean, rows.mean(1), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found.var, rows.var(1), rtol=1e-5, atol=1e-9)
