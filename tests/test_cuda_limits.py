"""Arrays at the limit of what kernels can count, which hold no memory."""

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
from cuda_arrays import Gpu, InterfaceArray, install

import numbabn
from numbabn.cuda import launch
from numbabn.cuda.call import MOST_COUNTED


class Fake:
    """An array's shape and dtype; its memory lies between others' and is never touched."""

    def __init__(self, gpu, shape, typestr="<f4", address=1 << 50):
        self.gpu, self.shape, self.dtype, self.device = gpu, shape, np.dtype(typestr), "gpu 0"
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": typestr, "data": (address, False), "version": 3,
        }  # fmt: skip

    def __array_namespace__(self):
        return InterfaceArray(self.gpu, np.empty(0, self.dtype)).__array_namespace__()


@pytest.fixture
def gpu(monkeypatch):
    """Launches are written down, with arguments of the kernel's types, and do not run."""
    gpu = install(monkeypatch, Gpu())
    monkeypatch.setattr(launch, "_runner", lambda kernel, *rest: gpu.launches.append(rest))
    return gpu


def passes(gpu, shape, axis, typestr="<f4"):
    """Both passes in training, into fake arrays."""
    x, y = (Fake(gpu, shape, typestr, 1 << n) for n in (50, 54))
    _, saved = numbabn.batch_norm_forward(x, None, None, training=True, channel_axis=axis, out=y)
    numbabn.batch_norm_backward(y, saved, out=y)


# Slots of planes, and rows of columns.
LARGEST = {
    "planes": (lambda n: (n // 2**12, 1, 2**14), 1, "<f4"),
    "planes of float16": (lambda n: (n // 2**12, 1, 2**15), 1, "<f2"),
    "planes of float64": (lambda n: (n // 2**12, 1, 2**13), 1, "<f8"),
    "rows": (lambda n: (n // 8 * 8, 4), -1, "<f4"),
    "rows of float16": (lambda n: (n // 8 * 8, 8), -1, "<f2"),
}


@pytest.mark.parametrize("case", LARGEST)
def test_the_largest_arrays(gpu, case):
    shape_of, axis, typestr = LARGEST[case]
    passes(gpu, shape_of(MOST_COUNTED - 1), axis, typestr)
    assert len(gpu.launches) == 6
    for grid, block, _, _, arguments in gpu.launches:
        assert grid[0] < 1 << 31
        assert all(n < 1 << 16 for n in grid[1:])
        assert np.prod(block) <= 1024
        sizes = [int(a) for a in arguments if isinstance(a, np.uint32)]
        assert max(sizes) <= MOST_COUNTED


@pytest.mark.parametrize("case", LARGEST)
def test_larger_arrays_are_refused(gpu, case):
    shape_of, axis, typestr = LARGEST[case]
    shape = shape_of(MOST_COUNTED + 2**13)
    with pytest.raises(ValueError, match=r"x: expected at most 4294836224 slots .*got shape"):
        passes(gpu, shape, axis, typestr)
    for function in (numbabn.batch_norm_stats, lambda x, **a: numbabn.normalize(x, x, x, **a)):
        with pytest.raises(ValueError, match="x: expected at most"):
            function(Fake(gpu, shape, typestr), channel_axis=axis)
    assert gpu.launches == []


@pytest.mark.parametrize(
    "shape", [(2, 2**30), (1, 2**26, 100), (2**18, 2**24, 1)], ids=["table", "columns", "chunks"]
)
def test_too_many_channels(gpu, shape):
    """Too much that goes with the channels, although the rows are few."""
    with pytest.raises(ValueError, match="x: expected at most"):
        numbabn.batch_norm_stats(Fake(gpu, shape))
    assert gpu.launches == []
