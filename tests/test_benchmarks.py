"""The benchmark suite's parts that have a right answer."""

import numpy as np
import pytest

from benchmarks import bench_passes
from benchmarks.shapes import LAYOUTS, SHAPE_BY_NAME, SHAPES


def test_shapes_are_named_once():
    assert len(SHAPE_BY_NAME) == len(SHAPES) == 26
    assert {shape.sizes[0] for shape in SHAPES if len(shape.sizes) == 4} == {1, 32}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_layouts_hold_the_same_values(shape):
    for layout in LAYOUTS:
        sizes, channel_axis = shape.in_layout(layout)
        assert sizes[channel_axis] == shape.sizes[1]
        assert np.prod(sizes) == np.prod(shape.sizes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_passes_run(layout):
    suite = bench_passes.Passes()
    suite.setup("1x512x7x7", layout)
    for name in ("forward_train", "forward_eval", "backward_train", "backward_eval"):
        suite.out.fill(np.nan)
        getattr(suite, f"time_{name}")("1x512x7x7", layout)
        assert np.isfinite(suite.out).all(), name


def test_dense_shapes_are_measured_once():
    with pytest.raises(NotImplementedError):
        bench_passes.Passes().setup("4096x1024", "nhwc")
