"""The factors of the test grids: modes, shapes and channel axes."""

import pytest

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

# (shape, channel_axis). Odd sizes, one value a plane, and sizes past any tile.
SHAPES = [
    ((7, 3), 1),
    ((2, 1), 1),
    ((5000, 3), 1),
    ((129, 257), 1),
    ((5, 3, 7), 1),
    ((7, 1, 49), 1),
    ((3, 5, 1), 1),
    ((2, 3, 17, 33), 1),
    ((2, 2048, 7, 7), 1),
    ((1, 2, 70_001), 1),
    ((1, 1, 70_001), 1),
    ((70_001, 1), 1),
    ((2, 3, 2, 3, 5), 1),
    ((2, 17, 33, 3), -1),
    ((3, 7, 7, 65), -1),
    ((2, 3, 4, 5, 6), -1),
]

# Every axis of every rank, named from the front and from the back.
AXES = [
    (shape, axis)
    for shape in [(6, 5), (3, 5, 4), (3, 4, 2, 5), (2, 3, 4, 3, 2)]
    for axis in range(-len(shape), len(shape))
]

# The half types: one of each kind of shape.
HALF_SHAPES = [
    ((7, 3), 1),
    ((2, 3, 17, 33), 1),
    ((2, 65, 7, 7), 1),
    ((2, 17, 33, 3), -1),
    ((900, 70), 1),
]
