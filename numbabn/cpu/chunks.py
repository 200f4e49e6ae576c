"""How kernels walk through chunks, and the scratch memory that they make for it."""

from numbabn.cpu.channels import Partials
from numbabn.cpu.memory import pointer
from numbabn.cpu.options import inline
from numbabn.cpu.vector import LANES


# A buffer is made by the kernel and used through a pointer; reading it afterwards, as this does,
# is what keeps it alive until then.
@inline
def keep_alive(buffer):
    return buffer.size


@inline
def room(width):
    """Numbers to set aside for `width` columns: whole vectors, and one that begins at the last."""
    return (width + 2 * LANES - 1) // LANES * LANES


@inline
def partials_of(numbers):
    """All chunks of all channels: an array of shape (chunks, fields, C)."""
    chunks, fields, space = numbers.shape
    return Partials(pointer(numbers), fields, space, chunks)


@inline
def chunk_of(k, rows, L, segment):
    """First row and first column of the k-th chunk of planes."""
    across = (L + segment - 1) // segment
    return (k // across) * rows, (k % across) * segment
