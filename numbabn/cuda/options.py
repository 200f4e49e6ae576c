"""How functions are compiled, and of what kinds a kernel's arguments are.

Kernels take scalars only. A kernel is made by a function of `storage`, `aligned` and `wide`, which
become constants in it; its arguments are annotated with what they are:

======= ====================================================================
Address of an array, or 0 where there is none: uint64
Size    a number of rows, columns, slots and the like: uint32
Number  of the type that is computed with: float32, or float64 for float64
Double  float64
Flag    int32
======= ====================================================================
"""

from __future__ import annotations

from typing import TypeAlias

from numba import cuda

Address: TypeAlias = int
Size: TypeAlias = int
Number: TypeAlias = float
Double: TypeAlias = float
Flag: TypeAlias = int

# Functions are merged into kernels as Numba's own IR: linking device functions needs a driver.
inline = cuda.jit(device=True, inline="always")

THREADS = 256  # in a block of every kernel that streams
PAIR = 2  # slots of each array that a thread has in flight at once
PLANE_CHUNK = 8 * THREADS  # slots that a block of an elementwise kernel for planes takes at most
PLANE_ROWS = PLANE_CHUNK // 16 + 2  # rows that these are in at most: a row has 16 slots or more
TILE_WIDTH = 64  # slots of a tile of columns, unless the fewest whole channels need more
WIDEST_TILE = 128  # then
FUSED_THREADS = 1024  # in a block, at most, of a kernel that does a channel in one go
FUSED_WIDTH = 8  # slots of a tile of columns, at most, in such a block
FORWARD_SLOTS = 4  # that its threads can hold of x,
BACKWARD_SLOTS = 2  # and of x and grad_output each
FORWARD_ROWS = {2: 2, 4: 4, 8: 4}  # the same of columns, by the numbers in a slot
BACKWARD_ROWS = {2: 2, 4: 2, 8: 1}
