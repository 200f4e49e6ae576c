"""The layers, step by step beside PyTorch's over the grid of their options."""

from __future__ import annotations

import copy
import pickle
import weakref

import numpy as np
import pytest
from layer_support import LAYERS, STATE, peer_of, randomize, same, trained

from numbabn import BatchNorm1d, BatchNorm2d, BatchNorm3d, reference


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("track", [True, False], ids=["track", "no_track"])
@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("cls", LAYERS)
def test_steps_are_those_of_torch(torch, cls, momentum, affine, track):
    rng = np.random.default_rng(1)
    layer = cls(3, 1e-3, momentum, affine != "none", track, bias=affine == "both", dtype=np.float64)
    peer = peer_of(torch, randomize(layer))
    close = {"rtol": 1e-9, "atol": 1e-11}
    for training in (True, True, False, True, False, False):
        assert layer.train(training) is layer
        peer.train(training)
        x, grad_output = rng.standard_normal((2, *LAYERS[cls])) * 2 + 1
        y = layer(x)
        tensor = torch.from_numpy(x.copy()).requires_grad_()
        expected = peer(tensor)
        expected.backward(torch.from_numpy(grad_output))
        np.testing.assert_allclose(y, expected.detach().numpy(), **close)
        # Gradients of weight and bias are added up over all steps, in both modes.
        np.testing.assert_allclose(layer.backward(grad_output), tensor.grad.numpy(), **close)
        same(layer, peer, **close)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5)])
def test_batchnorm1d_takes_two_ranks(torch, shape):
    x = np.random.default_rng(0).standard_normal(shape)
    layer = BatchNorm1d(3, dtype=np.float64)
    peer = peer_of(torch, layer)
    expected = peer(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(layer(x), expected, rtol=1e-10, atol=1e-12)
    same(layer, peer, rtol=1e-12)


def test_training_by_gradient_descent_follows_torch(torch):
    rng = np.random.default_rng(2)
    layer = BatchNorm2d(3)
    peer = peer_of(torch, layer)
    optimizer = torch.optim.SGD(peer.parameters(), lr=0.05)
    target = rng.standard_normal((8, 3, 5, 5)).astype(np.float32)
    for _ in range(20):
        x = (target * 2 + rng.standard_normal(target.shape)).astype(np.float32)
        layer.zero_grad()
        assert layer.weight_grad is None
        layer.backward(2 * (layer(x) - target) / target.size)
        layer.weight -= 0.05 * layer.weight_grad
        layer.bias -= 0.05 * layer.bias_grad
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(peer(torch.from_numpy(x)), torch.from_numpy(target)).backward()
        optimizer.step()
        same(layer, peer, rtol=1e-4, atol=1e-6)
    assert layer.weight.dtype == layer.weight_grad.dtype == np.float32


def test_cumulative_average_is_the_mean_over_batches():
    rng = np.random.default_rng(3)
    layer = BatchNorm1d(2, momentum=None, dtype=np.float64)
    batches = rng.standard_normal((5, 7, 2)) * 3 + 10
    for batch in batches:
        layer(batch)
    assert layer.num_batches_tracked == 5
    np.testing.assert_allclose(layer.running_mean, batches.mean((0, 1)), rtol=1e-12)
    unbiased = batches.var(1, ddof=1).mean(0)
    np.testing.assert_allclose(layer.running_var, unbiased, rtol=1e-12)


def test_switching_statistics_off_later(torch):
    # track_running_stats may be changed after the fact: training then leaves the statistics alone,
    # and eval still uses them.
    rng = np.random.default_rng(4)
    layer = BatchNorm1d(3, dtype=np.float64)
    peer = peer_of(torch, layer)
    for track, training in ((True, True), (False, True), (False, False), (True, True)):
        layer.track_running_stats = peer.track_running_stats = track
        layer.train(training)
        peer.train(training)
        x = rng.standard_normal((5, 3)) + 2
        expected = peer(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(layer(x), expected, rtol=1e-10)
        same(layer, peer, rtol=1e-12)
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("training", [True, False])
def test_empty_batches_as_in_torch(torch, training):
    layer = randomize(BatchNorm2d(3, dtype=np.float64)).train(training)
    peer = peer_of(torch, layer)
    x = np.empty((0, 3, 4, 4))
    tensor = torch.from_numpy(x).requires_grad_()
    peer(tensor).sum().backward()
    assert layer(x).shape == x.shape
    assert layer.backward(x).shape == x.shape
    assert layer.weight_grad.tolist() == layer.bias_grad.tolist() == [0, 0, 0]
    for name, value in layer.state_dict().items():
        assert np.array_equal(value, peer.state_dict()[name].numpy()), name


@pytest.mark.parametrize("forward_training", [True, False])
def test_backward_uses_the_mode_of_its_forward(forward_training):
    rng = np.random.default_rng(5)
    x, grad_output = rng.standard_normal((2, 6, 3))
    layer = randomize(BatchNorm1d(3, dtype=np.float64)).train(forward_training)
    _, saved = reference.batch_norm_forward(
        x, np.zeros(3), np.ones(3), layer.weight, layer.bias, forward_training
    )
    expected = reference.batch_norm_backward(grad_output, saved)[0]
    layer(x)
    layer.train(not forward_training)
    np.testing.assert_allclose(layer.backward(grad_output), expected, rtol=1e-10, atol=1e-12)


def test_backward_needs_a_forward():
    layer = BatchNorm1d(3)
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    with pytest.raises(RuntimeError, match="expected a forward call before it"):
        layer.backward(x)
    layer(x)
    layer(x, save=False)
    with pytest.raises(RuntimeError, match="expected a forward call before it"):
        layer.backward(x)
    assert layer.weight_grad is None
    assert layer.bias_grad is None


def test_gradients_accumulate_in_place_until_zero_grad():
    rng = np.random.default_rng(6)
    layer = BatchNorm1d(3, dtype=np.float64)
    (x1, g1), (x2, g2) = rng.standard_normal((2, 2, 5, 3))
    layer(x1)
    layer.backward(g1)
    held = layer.weight_grad
    first = held.copy()
    layer(x2)
    layer.backward(g2)
    assert layer.weight_grad is held
    np.testing.assert_allclose(layer.bias_grad, (g1 + g2).sum(0), rtol=1e-12)
    layer.backward(g2)
    np.testing.assert_allclose(layer.bias_grad, (g1 + 2 * g2).sum(0), rtol=1e-12)
    layer.zero_grad()
    assert layer.weight_grad is None
    assert layer.bias_grad is None
    layer(x1)
    layer.backward(g1)
    np.testing.assert_allclose(layer.weight_grad, first, rtol=1e-12)


def test_gradients_may_become_infinite():
    layer = BatchNorm1d(1, dtype=np.float16).eval()
    x = np.ones((4, 1), np.float16)
    for sign, expected in ((1, 40000), (1, np.inf), (-1, np.inf), (-np.inf, np.nan)):
        layer(x)
        layer.backward(x * np.float16(10000 * sign))
        np.testing.assert_array_equal(layer.bias_grad.astype(np.float32), [expected])


@pytest.mark.parametrize("training", [True, False])
def test_options_are_passed_through(training):
    rng = np.random.default_rng(7)
    x, residual, grad_output = rng.standard_normal((3, 4, 3, 5))
    layer = randomize(BatchNorm1d(3, dtype=np.float64)).train(training)
    expected, saved = reference.batch_norm_forward(
        x,
        np.zeros(3),
        np.ones(3),
        layer.weight,
        layer.bias,
        training,
        activation="relu",
        residual=residual,
    )
    grads = reference.batch_norm_backward(grad_output, saved)
    out = np.empty_like(x)
    y = layer(x, activation="relu", residual=residual, out=out)
    assert y is out
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)
    grad_out = np.empty_like(x)
    grad_input, grad_residual = layer.backward(grad_output, out=grad_out)
    assert grad_input is grad_out
    np.testing.assert_allclose(grad_input, grads[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(layer.weight_grad, grads[1], rtol=1e-9)
    np.testing.assert_allclose(layer.bias_grad, grads[2], rtol=1e-9)
    assert np.array_equal(grad_residual, grads[3])


def test_inference_keeps_nothing_and_works_in_place():
    layer = randomize(BatchNorm2d(3)).eval()
    x = np.random.default_rng(8).standard_normal((2, 3, 4, 4)).astype(np.float32)
    expected = layer(x, activation="relu")
    seen = weakref.ref(x)
    y = layer(x, activation="relu", save=False)
    assert np.array_equal(y, expected)
    assert layer(x, activation="relu", save=False, out=x) is x
    assert np.array_equal(x, expected)
    del x
    assert seen() is None


@pytest.mark.parametrize("training", [True, False])
def test_channels_last(training):
    rng = np.random.default_rng(9)
    x, grad_output = rng.standard_normal((2, 2, 5, 4, 3))
    first = randomize(BatchNorm2d(3, dtype=np.float64)).train(training)
    last = randomize(BatchNorm2d(3, dtype=np.float64, channel_axis=-1)).train(training)
    moved = np.ascontiguousarray(np.moveaxis(x, -1, 1))
    np.testing.assert_allclose(last(x), np.moveaxis(first(moved), 1, -1), rtol=1e-10, atol=1e-12)
    grad = first.backward(np.ascontiguousarray(np.moveaxis(grad_output, -1, 1)))
    np.testing.assert_allclose(
        last.backward(grad_output), np.moveaxis(grad, 1, -1), rtol=1e-9, atol=1e-12
    )
    for name, value in first.state_dict().items():
        np.testing.assert_allclose(last.state_dict()[name], value, rtol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("parameters", ["float32", "own"])
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision(half, parameters, training):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if half == "bfloat16" else np.float16
    rng = np.random.default_rng(10)
    x = rng.standard_normal((8, 3, 4)).astype(dtype)
    grad_output = rng.standard_normal(x.shape).astype(dtype)
    kept = np.dtype(dtype if parameters == "own" else np.float32)
    layer = randomize(BatchNorm1d(3, dtype=kept)).train(training)
    expected, saved = reference.batch_norm_forward(
        x, np.zeros(3), np.ones(3), layer.weight, layer.bias, training
    )
    grads = reference.batch_norm_backward(grad_output, saved)
    y = layer(x)
    grad_input = layer.backward(grad_output)
    assert y.dtype == grad_input.dtype == x.dtype
    tolerance = {"rtol": 2.0**-7, "atol": 2.0**-7}
    np.testing.assert_allclose(y.astype(float), expected, **tolerance)
    np.testing.assert_allclose(grad_input.astype(float), grads[0], **tolerance)
    for array, grad in ((layer.weight_grad, grads[1]), (layer.bias_grad, grads[2])):
        assert array.dtype == kept
        np.testing.assert_allclose(array.astype(float), grad, rtol=2.0**-7, atol=1e-4)
    assert layer.running_mean.dtype == layer.running_var.dtype == kept


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_are_independent_and_light(clone):
    layer = trained(momentum=None, eps=0.5, dtype=np.float64)
    x = np.random.default_rng(0).standard_normal((5, 3))
    y = layer.eval()(x)
    layer.backward(x)
    again = clone(layer)
    assert repr(again) == repr(layer)
    assert np.array_equal(again.weight_grad, layer.weight_grad)
    assert np.array_equal(again(x), y)
    again.weight[...] = 0
    again.running_mean[...] = 0
    again.num_batches_tracked[...] = 0
    assert layer.weight.all()
    assert layer.running_mean.all()
    assert layer.num_batches_tracked == 3
    assert len(pickle.dumps(layer)) < 4000
    big = np.zeros((10000, 3))
    layer(big)
    assert len(pickle.dumps(layer)) < 4000
    with pytest.raises(RuntimeError, match="forward"):
        clone(layer).backward(big)
    assert layer.backward(big).shape == big.shape


def test_repr():
    assert repr(BatchNorm2d(64)) == (
        "BatchNorm2d(64, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)"
    )
    assert repr(BatchNorm1d(3, 0, None, False, False, dtype="float64", channel_axis=-1)) == (
        "BatchNorm1d(3, eps=0, momentum=None, affine=False, bias=False, track_running_stats=False, "
        "dtype=float64, channel_axis=-1)"
    )


def test_reset():
    layer = trained()
    layer.reset_running_stats()
    fresh = BatchNorm1d(3).state_dict()
    for name in STATE:
        assert np.array_equal(layer.state_dict()[name], fresh[name]) == (
            name not in ("weight", "bias")
        )
    layer.reset_parameters()
    assert all(np.array_equal(layer.state_dict()[name], fresh[name]) for name in STATE)
    bare = BatchNorm1d(3, affine=False, track_running_stats=False)
    bare.reset_parameters()
    assert bare.state_dict() == {}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_fold(dtype):
    layer = trained(dtype=dtype).eval()
    scale, shift = layer.fold()
    assert scale.dtype == shift.dtype == dtype
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(dtype)
    tolerance = 30 * np.finfo(dtype).eps
    np.testing.assert_allclose(x * scale + shift, layer(x), rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match=r"running_mean, running_var: .* to fold, got None"):
        BatchNorm1d(3, track_running_stats=False).fold()


def test_a_failed_forward_changes_nothing():
    layer = trained()
    before = layer.state_dict()
    one = np.ones((1, 3), np.float32)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(one)
    with pytest.raises((TypeError, ValueError), match="residual"):
        layer(np.ones((4, 3), np.float32), residual=one)
    for name, value in before.items():
        assert np.array_equal(getattr(layer, name), value), name
    assert layer.eval()(one).shape == (1, 3)


@pytest.mark.parametrize(
    ("cls", "shape", "message"),
    [
        (BatchNorm1d, (3,), r"x: expected 2D or 3D input, got 1D, shape \(3,\)"),
        (BatchNorm1d, (2, 3, 4, 4), "x: expected 2D or 3D input, got 4D"),
        (BatchNorm2d, (2, 3, 4), "x: expected 4D input, got 3D"),
        (BatchNorm3d, (2, 3, 4, 4), "x: expected 5D input, got 4D"),
        (BatchNorm2d, (2, 4, 3, 3), r"x: expected 3 channels on axis 1, got shape \(2, 4, 3, 3\)"),
    ],
)
@pytest.mark.parametrize("bare", [False, True])
def test_wrong_input_shapes(cls, shape, message, bare):
    layer = cls(3, affine=not bare, track_running_stats=not bare)
    with pytest.raises(ValueError, match=message):
        layer(np.ones(shape, np.float32))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2.5,), TypeError, "num_features: expected an integer, got float 2.5"),
        ((-1,), ValueError, "num_features: expected 0 or more, got -1"),
        ((3, "small"), TypeError, "eps: expected a finite number, got 'small'"),
        ((3, -1e-5), ValueError, "eps: expected a number of at least 0, got -1e-05"),
        ((3, np.nan), ValueError, "eps: expected a finite number"),
        ((3, 1e-5, "fast"), TypeError, "momentum: expected a finite number, got 'fast'"),
        ((3, 1e-5, np.inf), ValueError, "momentum: expected a finite number"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        BatchNorm2d(*arguments)


def test_wrong_options():
    with pytest.raises(TypeError, match=r"dtype: expected float32, .*, got int32"):
        BatchNorm2d(3, dtype=np.int32)
    with pytest.raises(TypeError, match="channel_axis: expected an integer"):
        BatchNorm2d(3, channel_axis=None)
    with pytest.raises(TypeError, match="mode: expected a bool, got str"):
        BatchNorm2d(3).train("eval")
    with pytest.raises(ValueError, match="x: expected 4D input, got 0D"):
        BatchNorm2d(3)("an image")
    with pytest.raises(TypeError, match=r"x: expected dtype float32, .*, got int64"):
        BatchNorm1d(3)([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match="channel_axis: expected -2 to 1"):
        BatchNorm1d(3, channel_axis=2)(np.ones((4, 3), np.float32))


@pytest.mark.parametrize("name", ["weight_grad", "bias_grad"])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.zeros(4, np.float32), ValueError, r"expected shape \(3,\)"),
        (np.zeros((3, 1), np.float32), ValueError, r"expected shape \(3,\)"),
        (np.zeros(3, np.int64), TypeError, "int64"),
        (np.broadcast_to(np.float32(0), 3), ValueError, "read-only"),
        ([0.0, 0.0, 0.0], TypeError, "list"),
    ],
    ids=["length", "rank", "integers", "read-only", "list"],
)
def test_bad_totals_are_found_before_anything_is_written(name, bad, error, message):
    layer, x = BatchNorm1d(3), np.random.default_rng(0).standard_normal((8, 3), np.float32)
    layer(x)
    layer.backward(x)
    setattr(layer, name, bad)
    other = layer.bias_grad if name == "weight_grad" else layer.weight_grad
    before, out = other.copy(), np.full_like(x, 7)
    with pytest.raises(error, match=f"^{name}: .*{message}"):
        layer.backward(x, out=out)
    assert (out == 7).all()
    assert np.array_equal(other, before)
