"""Calls run on the device of their arrays, and what that device cannot do is refused."""

import numpy as np
import pytest
from support import problem

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
from cuda_arrays import Gpu, install

import numbabn
from numbabn.cuda import launch

X = problem((6, 4, 5)).x


@pytest.fixture(params=["interface", "dlpack"])
def gpu(monkeypatch, request):
    return install(monkeypatch, Gpu(request.param))


def on(gpu, device):
    """A function that puts arrays there."""
    return lambda a: gpu.to(a, device=f"gpu {device}", writable=True)


def layer_on(put):
    layer = numbabn.BatchNorm1d(4)
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(layer, name, put(getattr(layer, name)))
    return layer


@pytest.mark.parametrize("device", [0, 1])
def test_functions_run_on_the_device_of_x(gpu, device):
    put = on(gpu, device)
    x, ones = put(X), put(np.ones(4, np.float32))
    y, saved = numbabn.batch_norm_forward(x, ones, put(np.ones(4, np.float32)), training=True)
    dx = numbabn.batch_norm_backward(x, saved)[0]
    stats = numbabn.batch_norm_stats(x)
    sums = numbabn.batch_norm_backward_reduce(x, x, stats.mean, saved.invstd)
    numbabn.batch_norm_backward_elemt(x, x, stats.mean, saved.invstd, None, *sums, 30)
    numbabn.normalize(x, ones, ones)
    assert {a.device for a in (y, dx, stats.mean, saved.mean, *sums)} == {f"gpu {device}"}
    assert set(gpu.launched_on) == {device}
    assert gpu.current == 0  # as before


@pytest.mark.parametrize("device", [0, 1])
def test_layers_run_on_the_device_of_their_arrays(gpu, device):
    put = on(gpu, device)
    layer, x = layer_on(put), put(X)
    for _ in range(2):
        layer(x)
        layer.backward(x)
    layer.load_state_dict(layer.state_dict())
    made = (*layer.fold(), layer.weight_grad)
    layer.reset_parameters()
    assert {a.device for a in made} == {f"gpu {device}"}
    assert set(gpu.launched_on) == {device}
    assert gpu.current == 0


def test_the_device_is_restored_after_an_error(gpu):
    with pytest.raises(ValueError, match="shape"):
        numbabn.batch_norm(on(gpu, 1)(X), *[on(gpu, 1)(np.ones(3, np.float32))] * 2)
    assert gpu.current == 0


def test_two_devices_are_refused(gpu):
    here, there = on(gpu, 1), on(gpu, 0)
    x, other = here(X), there(X)
    channels = [here(np.ones(4, np.float32)) for _ in range(2)]
    message = "expected an array on device 1 like the others, got one on device 0"
    for name in ("weight", "bias", "residual", "out"):
        value = there(np.ones(4, np.float32)) if name in ("weight", "bias") else other
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            numbabn.batch_norm(x, *channels, **{name: value}, training=True)
    with pytest.raises(ValueError, match=f"running_var: {message}"):
        numbabn.batch_norm(x, channels[0], there(np.ones(4, np.float32)), training=True)
    with pytest.raises(ValueError, match=f"grad_output: {message}"):
        numbabn.batch_norm_backward_reduce(other, x, *channels)
    assert gpu.launches == []
    assert [a.values.tolist() for a in channels] == [[1] * 4] * 2


def test_gradient_from_another_device(gpu):
    layer = layer_on(on(gpu, 1))
    layer(on(gpu, 1)(X))
    before = len(gpu.launches)
    with pytest.raises(ValueError, match=r"x: expected an array on device 0 .* on device 1"):
        layer.backward(on(gpu, 0)(X))
    assert len(gpu.launches) == before


def test_state_from_another_device(gpu):
    layer, other = layer_on(on(gpu, 0)), layer_on(on(gpu, 1))
    with pytest.raises(ValueError, match=r"weight: expected an array on device 0 .* device 1"):
        layer.load_state_dict(other.state_dict())


def test_current_device_of_numba(monkeypatch):
    entered = []

    class Device:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *error):
            entered.append("out")

    class Cuda:
        gpus = (None, Device())

    monkeypatch.setattr(launch, "cuda", Cuda)
    monkeypatch.setattr(launch, "device_count", lambda: 2)
    with launch.on_device(1):
        assert entered == ["in"]
    assert entered == ["in", "out"]
    monkeypatch.setattr(launch, "device_count", lambda: 1)
    with launch.on_device(1):
        assert entered == ["in", "out"]  # the only one is the current one
