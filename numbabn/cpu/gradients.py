"""The backward pass: the two sums per channel, and the input gradient of either mode.

g is the gradient before the ReLU: `grad_output`, and zero where the forward pass cut off, which
is read from `bits` where there was a residual and recomputed from x otherwise. The sums are
``sum(g)``, which is dbias, and ``sum(g * (x - mean) * unit)``, from which dweight follows: `unit`
is the inverse standard deviation, rounded, and what rounding did is made good at the end. A few
vectors at a time are summed as they are, then in float64. Then

* eval: mean and variance are constants, so ``dx = g * scale``, in the same pass as the sums;
* training: they depend on x, so ``dx = scale * (g - mean(g) - xhat * mean(g * xhat))``, in a
  second pass over x and g (see `channels` for the coefficients).
"""

from typing import Any, NamedTuple

from numbabn.cpu.boundaries import step_between
from numbabn.cpu.memory import load, load_first, pointer, put
from numbabn.cpu.normalization import ask_ahead, ask_target, head_of
from numbabn.cpu.options import function, inline
from numbabn.cpu.vector import LANES, fma, keep, positive_bits, splat_like


class Backward(NamedTuple):
    """Pointers to what the backward pass reads and writes; all but the first two may be None.

    Each vector of x and grad_output is read together with a hint that those `ahead` elements on
    will be, and each of the gradients written together with one for those `target_ahead` on, unless
    these are None (or 0, of what is read). A row's whole vectors are gone through by `step`, which
    may be negative; but not where they are summed.
    """

    grad_output: Any
    x: Any
    bits: Any
    grad_input: Any
    grad_residual: Any
    ahead: Any
    target_ahead: Any
    step: Any


class Slopes(NamedTuple):
    """Vectors: ``(g - grad_mean) + ((x - mean) * slope + offset)``."""

    grad_mean: Any
    slope: Any
    offset: Any


@inline
def backward_io(grad_output, x, bits, grad_input, grad_residual, ahead):
    """Of these arrays."""
    grad_output, x, bits = pointer(grad_output), pointer(x), pointer(bits)
    grad_input, grad_residual = pointer(grad_input), pointer(grad_residual)
    step = min(
        step_between(grad_input, grad_output, x), step_between(grad_residual, grad_output, x)
    )
    return Backward(grad_output, x, bits, grad_input, grad_residual, ahead, None, step)


@inline
def with_hints(io, ahead, target_ahead):
    return Backward(
        io.grad_output, io.x, io.bits, io.grad_input, io.grad_residual, ahead, target_ahead, io.step
    )


@inline
def only_read(io, ahead):
    return Backward(io.grad_output, io.x, io.bits, None, None, ahead, None, io.step)


@inline
def read_pair(io, i, bit, affine, relu):
    """16 lanes of g and of x - mean."""
    ask_ahead(io.x, i, io.ahead)
    ask_ahead(io.grad_output, i, io.ahead)
    xmu = load(io.x, i) - affine.mean
    return cut_off(io.bits, load(io.grad_output, i), bit, xmu, affine, relu), xmu


@inline
def read_part(io, i, bit, count, affine, relu):
    """`count` lanes of g and of x - mean, zero in the rest."""
    xmu = load_first(io.x, i, count, affine.mean) - affine.mean
    g = load_first(io.grad_output, i, count, splat_like(io.grad_output, 0.0))
    return cut_off(io.bits, g, bit, xmu, affine, relu), xmu


@inline
def cut_off(bits, g, bit, xmu, affine, relu):
    if bits is not None:
        return keep(g, bits[bit])
    if relu:
        return keep(g, positive_bits(fma(xmu, affine.scale, affine.shift)))
    return g


@inline
def gradient(g, xmu, affine, slopes):
    """16 lanes of the input gradient: eval mode's if `slopes` is None, else training's."""
    if slopes is None:
        return g * affine.scale
    return ((g - slopes.grad_mean) + fma(xmu, slopes.slope, slopes.offset)) * affine.scale


@inline
def put_pair(io, i, count, g, xmu, affine, slopes, streaming):
    """Store `count` lanes of the gradients."""
    ask_target(io.grad_residual, i, io.target_ahead, streaming)
    ask_target(io.grad_input, i, io.target_ahead, streaming)
    put(io.grad_residual, i, count, g, streaming)
    put(io.grad_input, i, count, gradient(g, xmu, affine, slopes), streaming)


@inline
def put_gradient(io, i, bit, affine, slopes, relu, streaming):
    g, xmu = read_pair(io, i, bit, affine, relu)
    put_pair(io, i, LANES, g, xmu, affine, slopes, streaming)


@function
def gradient_part(io, i, bit, count, affine, slopes, relu):
    """The same for fewer than 16 lanes: the ends of rows."""
    g, xmu = read_part(io, i, bit, count, affine, relu)
    put_pair(io, i, count, g, xmu, affine, slopes, False)


@function
def sum_part(io, i, bit, count, affine, relu):
    """Fewer than 16 lanes, the end of a row: stored for eval mode, and the factors to sum."""
    g, xmu = read_part(io, i, bit, count, affine, relu)
    put_pair(io, i, count, g, xmu, affine, None, False)
    return g, xmu * affine.unit


@inline
def gradient_head(io, i, end, streaming):
    """`head_of`, for whichever of the gradients are stored: all lie alike."""
    return max(
        head_of(io.grad_input, io.bits, i, end, streaming),
        head_of(io.grad_residual, io.bits, i, end, streaming),
    )


@inline
def gradient_end(io, i, bit, count, numbers, relu):
    """`gradient_part`, of `Affine` and `Slopes` in one."""
    gradient_part(io, i, bit, count, numbers[0], numbers[1], relu)
