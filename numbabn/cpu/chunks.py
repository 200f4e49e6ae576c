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
def chunk_at(item, chunks, rows, L, segment):
    """Channel, number, first row and first column of a chunk of planes."""
    across = (L + segment - 1) // segment
    k = item % chunks
    return item // chunks, k, (k // across) * rows, (k % across) * segment


@inline
def next_chunk(c, k, n0, l0, chunks, rows, L, segment):
    """The chunk after that; divisions would take longer than a short chunk's sums."""
    k += 1
    if k == chunks:
        return c + 1, 0, 0, 0
    if l0 + segment < L:
        return c, k, n0, l0 + segment
    return c, k, n0 + rows, 0
