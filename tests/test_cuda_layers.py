"""Layers whose arrays are on a GPU: everything they do stays there.

The host cannot read the arrays of `cuda_arrays`, so a hidden copy would be an error.
"""

from contextlib import nullcontext

import numpy as np
import pytest
from support import problem, wide

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
from cuda_arrays import Gpu, InterfaceArray, install

import numbabn
from numbabn.cuda import libraries

NAMES = ("weight", "bias", "running_mean", "running_var")


@pytest.fixture
def gpu(monkeypatch):
    return install(monkeypatch, Gpu())


def moved(gpu, host=None, **options):
    """A layer of 4 channels on the device, with the values of `host`."""
    host = host or numbabn.BatchNorm1d(4, **options)
    layer = numbabn.BatchNorm1d(4, **options)
    for name in NAMES:
        setattr(layer, name, gpu.to(getattr(host, name), writable=True))
    return layer


def arbitrary(dtype="float32", seed=0):
    layer, rng = numbabn.BatchNorm1d(4, dtype=dtype), np.random.default_rng(seed)
    for name in NAMES:
        setattr(layer, name, rng.uniform(0.5, 2, 4).astype(dtype))
    return layer


def values_of(layer):
    return {name: getattr(layer, name).values.tolist() for name in NAMES}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_gradients_add_up(gpu, dtype):
    p = problem((6, 4, 5), dtype)
    layer = moved(gpu, dtype=dtype)
    layer(gpu.to(p.x), stream=7)
    layer.backward(gpu.to(p.grad_output), stream=7)
    totals = layer.weight_grad, layer.bias_grad
    once = [total.values.copy() for total in totals]
    for times in (2, 3):
        layer.backward(gpu.to(p.grad_output), stream=7)
        assert (layer.weight_grad, layer.bias_grad) == totals  # in place
        for total, first in zip(totals, once, strict=True):
            np.testing.assert_allclose(wide(total.values), times * wide(first), rtol=2e-3)
    assert set(gpu.streams) == {7}
    layer.zero_grad()
    assert layer.weight_grad is layer.bias_grad is None


def test_gradients_on_the_other_side(gpu):
    p = problem((6, 4, 5))
    layer = moved(gpu)
    layer(gpu.to(p.x))
    layer.weight_grad = np.zeros(4, np.float32)
    with pytest.raises(TypeError, match=r"weight_grad: got a NumPy array, .*zero_grad"):
        layer.backward(gpu.to(p.grad_output))
    host = numbabn.BatchNorm1d(4)
    host(p.x)
    host.bias_grad = gpu.to(np.zeros(4, np.float32))
    with pytest.raises(TypeError, match=r"bias_grad: got a CUDA array, .*zero_grad"):
        host.backward(p.grad_output)
    assert host.weight_grad is None


def bad_totals(put):
    """Arrays that cannot take a layer's gradients of 4 channels, and what is said about them."""
    return [
        (put(np.zeros(3, np.float32)), ValueError, r"expected shape \(4,\)"),
        (put(np.zeros((4, 1), np.float32)), ValueError, r"expected shape \(4,\)"),
        (put(np.zeros(4, np.int64)), TypeError, "int64"),
        (put(np.zeros(4, np.float32), read_only=True), ValueError, "read-only"),
    ]


@pytest.mark.parametrize("name", ["weight_grad", "bias_grad"])
def test_bad_totals_are_found_before_anything_is_written(gpu, name):
    p = problem((6, 4, 5))
    layer = moved(gpu)
    layer(gpu.to(p.x))
    layer.backward(gpu.to(p.grad_output))
    good = {n: getattr(layer, n) for n in ("weight_grad", "bias_grad")}
    before = {n: total.values.copy() for n, total in good.items()}
    elsewhere = gpu.to(np.zeros(4, np.float32), device="gpu 1"), ValueError, "on device 1"
    for bad, error, message in [*bad_totals(gpu.to), elsewhere]:
        out = gpu.to(np.full_like(p.x, 7), writable=True)
        setattr(layer, name, bad)
        launches = len(gpu.launches)
        with pytest.raises(error, match=f"^{name}: .*{message}"):
            layer.backward(gpu.to(p.grad_output), out=out)
        assert len(gpu.launches) == launches
        assert (out.values == 7).all()
        setattr(layer, name, good[name])
        assert all(np.array_equal(good[n].values, before[n]) for n in good)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_reset(gpu, dtype):
    layer = moved(gpu, arbitrary(dtype), dtype=dtype)
    arrays = [getattr(layer, name) for name in NAMES]
    layer(gpu.to(problem((6, 4, 5), dtype).x))
    assert layer.num_batches_tracked == 1
    weight = layer.weight.values.tolist()
    layer.reset_running_stats()
    assert values_of(layer)["running_mean"] == [0] * 4
    assert values_of(layer)["running_var"] == [1] * 4
    assert values_of(layer)["weight"] == weight
    layer.reset_parameters()
    assert values_of(layer)["weight"] == [1] * 4
    assert values_of(layer)["bias"] == [0] * 4
    assert [getattr(layer, name) for name in NAMES] == arrays
    assert layer.num_batches_tracked == 0
    assert isinstance(layer.num_batches_tracked, np.ndarray)


def test_reset_writes_all_or_nothing(gpu):
    layer = moved(gpu, arbitrary())
    before = values_of(layer)
    layer.num_batches_tracked[...] = 5
    layer.running_var.read_only = True
    with pytest.raises(ValueError, match="running_var: expected a writable array"):
        layer.reset_running_stats()
    assert values_of(layer) == before
    assert layer.num_batches_tracked == 5


def test_state_is_copied_on_the_device(gpu):
    layer = moved(gpu, arbitrary())
    state = layer.state_dict("bn.")
    assert isinstance(state.pop("bn.num_batches_tracked"), np.ndarray)
    before = values_of(layer)
    layer.reset_parameters()
    assert {key[3:]: array.values.tolist() for key, array in state.items()} == before
    assert {type(array) for array in state.values()} == {InterfaceArray}
    layer.load_state_dict(state, "bn.")
    assert values_of(layer) == before


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_load_device_values_of_another_dtype(gpu, dtype):
    source = arbitrary(dtype)
    layer = moved(gpu)
    layer.load_state_dict(moved(gpu, source, dtype=dtype).state_dict())
    wanted = {name: getattr(source, name).astype(np.float32).tolist() for name in NAMES}
    assert values_of(layer) == wanted


def test_load_host_values(gpu, monkeypatch):
    source = arbitrary()
    source.num_batches_tracked[...] = 3
    layer = moved(gpu)
    with pytest.raises(TypeError, match=r"weight: .*values on the host.*no way to copy"):
        layer.load_state_dict(source.state_dict())
    monkeypatch.setattr(
        InterfaceArray, "from_host", lambda self, values: self.gpu.to(values), raising=False
    )
    layer.load_state_dict(source.state_dict())
    assert values_of(layer) == {name: getattr(source, name).tolist() for name in NAMES}
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda gpu: gpu.to(np.ones(3, np.float32)), ValueError, r"running_var: .*\(4,\)"),
        (lambda gpu: gpu.to(np.ones(4, np.int32)), TypeError, "running_var: .*int32"),
        (lambda gpu: np.ones(3, np.float32), ValueError, r"running_var: .*\(4,\)"),
        (lambda gpu: np.array(list("abcd")), TypeError, "running_var: .*real numbers"),
    ],
)
def test_load_all_or_nothing(gpu, bad, error, message):
    layer = moved(gpu, arbitrary())
    before = values_of(layer)
    state = {**moved(gpu, arbitrary(seed=1)).state_dict(), "running_var": bad(gpu)}
    with pytest.raises(error, match=message):
        layer.load_state_dict(state)
    assert values_of(layer) == before


def test_load_device_values_on_the_host(gpu):
    with pytest.raises(TypeError, match=r"weight: .*got a CUDA array; copy it to the host"):
        numbabn.BatchNorm1d(4).load_state_dict(moved(gpu).state_dict())


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("affine", [True, False])
def test_fold(gpu, dtype, affine):
    host = arbitrary(dtype)
    if not affine:
        host.weight = host.bias = None
    layer = moved(gpu, host, dtype=dtype)
    for got, wanted in zip(layer.fold(), host.fold(), strict=True):
        assert type(got) is InterfaceArray
        assert got.dtype == wanted.dtype
        # Of shift, whose terms may cancel, relative to the terms, which are below 8.
        np.testing.assert_allclose(
            got.values,
            wanted,
            rtol=1e-3 if dtype == "float16" else 1e-6,
            atol=8 * float(np.finfo(dtype).eps),
        )


def test_plain_average(gpu):
    p, host = problem((6, 4, 5)), numbabn.BatchNorm1d(4, momentum=None)
    layer = moved(gpu, momentum=None)
    for n in (1, 2, 3):
        host(p.x * n)
        layer(gpu.to(p.x * np.float32(n)))
    assert isinstance(layer.num_batches_tracked, np.ndarray)
    assert layer.num_batches_tracked == 3
    np.testing.assert_allclose(layer.running_mean.values, host.running_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.running_var.values, host.running_var, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_what_pytorch_does_itself(monkeypatch, dtype):
    # On the CPU, where these operations are what they are on a GPU, but for the stream.
    torch = pytest.importorskip("torch")
    total = torch.zeros(3, dtype=getattr(torch, dtype))
    library = libraries.library_of(total)
    monkeypatch.setattr(type(library), "on", lambda *args: nullcontext())
    assert library.fill(total, 1, 0)
    assert library.add(total, torch.ones(3), 0)
    assert total.tolist() == [2, 2, 2]
    given = library.from_host(total, np.array([0.5, np.inf, -3], np.float32), 0)
    assert library.set(total, given, 0)
    assert total.tolist() == [0.5, np.inf, -3]
    assert total.dtype is getattr(torch, dtype)
