"""Which memory a pass may write: kernels look at the addresses before they write anything.

They take a fraction of the time that NumPy takes for it, and say whether they did the job. If not,
the ordinary way finds what is wrong.
"""

from numbabn.cpu.memory import address
from numbabn.cpu.options import inline

# What is written shares no memory with anything else; or it is the first array that is read, in its
# place; or it may share what it does, as somebody has looked at that already.
APART, IN_PLACE, CHECKED = range(3)


@inline
def span(array):
    """First address, and the one after the last."""
    start = address(array)
    return start, start + array.size * array.itemsize


@inline
def apart(out, other):
    """Whether two dense arrays share no memory."""
    a, a_end = span(out)
    b, b_end = span(other)
    return a_end <= b or b_end <= a


@inline
def apart_or_same(out, other, sharing):
    """Whether they share none, or all of it where that is fine."""
    return apart(out, other) or (sharing == IN_PLACE and span(out) == span(other))


@inline
def may_write(out, x, sharing, weight, bias, running_mean, running_var):
    """Whether a forward pass may write `out`."""
    return sharing == CHECKED or (
        apart_or_same(out, x, sharing)
        and apart(out, weight)
        and apart(out, bias)
        and apart(out, running_mean)
        and apart(out, running_var)
    )


@inline
def may_train(out, x, sharing, weight, bias, running_mean, running_var):
    """Whether training may write `out` and the running statistics."""
    return sharing == CHECKED or (
        may_write(out, x, sharing, weight, bias, running_mean, running_var)
        and apart(running_mean, running_var)
    )


@inline
def may_write_back(grad_input, grad_output, x, sharing):
    """Whether a backward pass may write `grad_input`."""
    if grad_input is None:
        return True
    return sharing == CHECKED or (
        apart_or_same(grad_input, grad_output, sharing) and apart(grad_input, x)
    )
