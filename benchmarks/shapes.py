"""The passes and shapes that everything is measured on, in one list.

Every distinct input of a batch norm in ResNet-50 (224×224 images, stride in the 3×3 convolution),
at batch 1 and 32, and two dense layers: wide, and long. Shapes are written as (N, C, *); a layout
says in which order the memory holds them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LAYOUTS", "PASSES", "REPRESENTATIVE", "SHAPES", "SHAPE_BY_NAME", "Shape"]

PASSES = ("forward_train", "forward_eval", "backward_train", "backward_eval")
# nchw: channels first, (N, C, *). nhwc: channels last, (N, *, C).
LAYOUTS = ("nchw", "nhwc")

# (C, H, W), from the images inwards.
_RESNET50 = (
    (64, 112, 112),
    (64, 56, 56),
    (128, 56, 56),
    (256, 56, 56),
    (128, 28, 28),
    (256, 28, 28),
    (512, 28, 28),
    (256, 14, 14),
    (512, 14, 14),
    (1024, 14, 14),
    (512, 7, 7),
    (2048, 7, 7),
)
_DENSE = ((4096, 1024), (65536, 64))


class Shape(NamedTuple):
    """A named shape, (N, C, *)."""

    name: str
    sizes: tuple[int, ...]

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts that differ for this shape: dense layers have only one."""
        return LAYOUTS if len(self.sizes) > 2 else LAYOUTS[:1]

    def in_layout(self, layout: str) -> tuple[tuple[int, ...], int]:
        """The array's shape in a layout, and its channel axis."""
        n, c, *rest = self.sizes
        if layout == "nchw":
            return (n, c, *rest), 1
        if layout == "nhwc":
            return (n, *rest, c), len(self.sizes) - 1
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")


def _shape(*sizes: int) -> Shape:
    return Shape("x".join(map(str, sizes)), sizes)


SHAPES = tuple(
    [_shape(batch, *chw) for batch in (1, 32) for chw in _RESNET50]
    + [_shape(*sizes) for sizes in _DENSE]
)
SHAPE_BY_NAME = {shape.name: shape for shape in SHAPES}
# One of each kind: from memory, in L3, in L2, long and short planes, a dense layer.
REPRESENTATIVE = (
    "32x64x112x112",
    "32x1024x14x14",
    "32x256x14x14",
    "32x512x7x7",
    "1x2048x7x7",
    "65536x64",
)
