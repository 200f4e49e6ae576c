"""On a real GPU, where there is one: arrays of each library that is installed.

Everything else about CUDA is tested without one, in `test_cuda_api` and `test_cuda_kernels`. Here
it is what those cannot know: that the libraries' arrays and streams are what we take them for.
"""

import contextlib

import numpy as np
import pytest
from grid import MODES
from support import ARRANGEMENTS, assert_close, problem

import numbabn

cuda = pytest.importorskip("numba.cuda", reason="numba-cuda is not installed")
pytestmark = pytest.mark.gpu

LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
SHAPES = [(3, 5, 16, 16), (32, 64, 56, 56), (9, 7, 7, 7), (64, 512, 7, 7)]


@pytest.fixture(autouse=True)
def _device():
    if not cuda.is_available():
        pytest.skip("no GPU")


class Torch:
    def __init__(self):
        self.torch = pytest.importorskip("torch")
        if not self.torch.cuda.is_available():
            pytest.skip("this PyTorch has no CUDA")

    def put(self, values):
        order = sorted(range(values.ndim), key=lambda axis: -values.strides[axis])
        memory = self.torch.from_numpy(values.transpose(order).copy()).cuda()
        return memory.permute([order.index(axis) for axis in range(values.ndim)])

    def get(self, tensor):
        return tensor.cpu().numpy()

    def stream(self):
        return self.torch.cuda.stream(self.torch.cuda.Stream())


class CuPy:
    def __init__(self):
        self.cupy = pytest.importorskip("cupy")

    def put(self, values):
        order = sorted(range(values.ndim), key=lambda axis: -values.strides[axis])
        memory = self.cupy.asarray(values.transpose(order).copy())
        return memory.transpose([order.index(axis) for axis in range(values.ndim)])

    def get(self, array):
        return self.cupy.asnumpy(array)

    def stream(self):
        return self.cupy.cuda.Stream(non_blocking=True)


class Numba:
    def put(self, values):
        order = sorted(range(values.ndim), key=lambda axis: -values.strides[axis])
        memory = cuda.to_device(np.ascontiguousarray(values.transpose(order)))
        if values.flags.c_contiguous:
            return memory
        there = cuda.device_array(values.shape, values.dtype, strides=values.strides)
        there.gpu_data = memory.gpu_data
        return there

    def get(self, array):
        order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        shape = tuple(array.shape[axis] for axis in order)
        flat = cuda.cudadrv.devicearray.DeviceNDArray(
            shape, np.empty(shape, array.dtype).strides, array.dtype, gpu_data=array.gpu_data
        )
        host = flat.copy_to_host()
        return host.transpose([order.index(axis) for axis in range(array.ndim)])

    def stream(self):
        return contextlib.nullcontext()


@pytest.fixture(params=[Torch, CuPy, Numba], ids=lambda kind: kind.__name__)
def library(request):
    return request.param()


@MODES
@LAYOUTS
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_passes(library, shape, dtype, layout, training):
    options = {"training": training, "activation": "relu", "arrange": ARRANGEMENTS[layout]}
    p = problem(shape, dtype, residual=dtype != "float16", **options)
    expected = p.expected()
    with library.stream():
        arrays = [library.put(a) for a in p.arrays]
        given = {**p.options}
        if given["residual"] is not None:
            given["residual"] = library.put(given["residual"])
        y, saved = numbabn.batch_norm_forward(*arrays, **given)
        grads = numbabn.batch_norm_backward(library.put(p.grad_output), saved)
        assert {type(a) for a in (y, *grads)} == {type(arrays[0])}
        y = library.get(y)
        dx, dweight, dbias = (library.get(a) for a in grads[:3])
    assert_close(y, expected.y, scale=expected.y_scale, channel_axis=1, what="y")
    assert_close(dx, expected.grads[0], scale=expected.dx_scale, channel_axis=1, what="dx")
    assert_close(dweight, expected.grads[1], scale=expected.dweight_terms, what="dweight")
    assert_close(dbias, expected.grads[2], scale=expected.dbias_terms, what="dbias")


def test_the_host_does_not_wait():
    library = Torch()
    torch = library.torch
    p = problem((8, 16, 14, 14))
    arrays, dy = [library.put(a) for a in p.arrays], library.put(p.grad_output)

    def step():
        _, saved = numbabn.batch_norm_forward(*arrays, **p.options)
        return numbabn.batch_norm_backward(dy, saved)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    busy = torch.cuda.Event()
    busy.record()
    step()
    assert not busy.query()
    torch.cuda.synchronize()


def test_results_are_the_same_run_after_run():
    library = Torch()
    p = problem((32, 64, 28, 28))
    arrays, dy = [library.put(a) for a in p.arrays], library.put(p.grad_output)
    results = []
    for _ in range(3):
        y, saved = numbabn.batch_norm_forward(*arrays, **p.options)
        grads = numbabn.batch_norm_backward(dy, saved)
        results.append([library.get(a).tobytes() for a in (y, *grads)])
    assert results[0] == results[1] == results[2]
