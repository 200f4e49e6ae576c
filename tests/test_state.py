"""State dictionaries: to PyTorch and back, and all that can be wrong with one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from layer_support import LAYERS, STATE, same, trained

from numbabn import BatchNorm1d, BatchNorm2d


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_state_dict_has_the_keys_dtypes_and_shapes_of_torch(torch):
    for affine, track in itertools.product([True, False], repeat=2):
        layer = BatchNorm2d(5, affine=affine, track_running_stats=track)
        ours = layer.state_dict()
        theirs = torch.nn.BatchNorm2d(5, affine=affine, track_running_stats=track).state_dict()
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert ours[name].shape == tuple(value.shape)
            assert ours[name].dtype == value.numpy().dtype
            assert np.array_equal(ours[name], value.numpy())


@pytest.mark.parametrize("cls", LAYERS)
def test_state_goes_to_torch_and_back(torch, cls):
    layer = trained(cls)
    peer = getattr(torch.nn, cls.__name__)(3)
    peer.load_state_dict({k: torch.as_tensor(v) for k, v in layer.state_dict().items()})
    same(layer, peer, rtol=0, atol=0)
    again = cls(3)
    assert again.load_state_dict(peer.state_dict()) == ([], [])
    same(again, peer, rtol=0, atol=0)
    x = np.random.default_rng(1).standard_normal(LAYERS[cls]).astype(np.float32)
    expected = peer.eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(again.eval()(x), expected, rtol=1e-5, atol=1e-6)


def test_one_layer_takes_its_part_of_a_network(torch):
    network = torch.nn.Sequential()
    network.add_module("bn1", torch.nn.BatchNorm2d(3))
    network.add_module("bn10", torch.nn.BatchNorm2d(3))
    network(torch.randn(2, 3, 4, 4) + 2)
    layer = BatchNorm2d(3)
    assert layer.load_state_dict(network.state_dict(), prefix="bn1.") == ([], [])
    same(layer, network.bn1, rtol=0, atol=0)
    assert list(layer.state_dict(prefix="bn1.")) == [f"bn1.{name}" for name in STATE]
    with pytest.raises(ValueError, match=r"missing: bn2.weight.*bn2.running_var$"):
        layer.load_state_dict(network.state_dict(), prefix="bn2.")


def test_values_may_be_tensors_that_numpy_refuses(torch):
    peer = torch.nn.BatchNorm1d(3).to(torch.bfloat16)
    with torch.no_grad():
        peer.weight.copy_(torch.tensor([0.5, -1.25, 3.0]))
    state = {**dict(peer.named_parameters()), **dict(peer.named_buffers())}
    assert state["weight"].requires_grad
    layer = BatchNorm1d(3)
    layer.load_state_dict(state)
    assert layer.weight.tolist() == [0.5, -1.25, 3.0]


def test_values_may_be_whatever_asarray_takes(tmp_path):
    layer = BatchNorm1d(2)
    weight = layer.weight
    state = {"weight": [1, 2.5], "bias": (True, False), "running_mean": np.ones(2, np.float16)}
    state |= {"running_var": np.array([3, 4]), "num_batches_tracked": 7.0}
    layer.load_state_dict(state)
    assert layer.weight is weight
    assert [layer.state_dict()[name].tolist() for name in STATE] == [
        [1, 2.5],
        [1, 0],
        [1, 1],
        [3, 4],
        7,
    ]
    assert layer.num_batches_tracked.dtype == np.int64
    np.savez(tmp_path / "state.npz", **layer.state_dict("norm."))
    again = BatchNorm1d(2, dtype=np.float64)
    with np.load(tmp_path / "state.npz") as archive:
        again.load_state_dict(archive, prefix="norm.")
    assert again.weight.dtype == np.float64
    assert again.weight.tolist() == [1, 2.5]
    again.load_state_dict({**again.state_dict(), "num_batches_tracked": [9]})
    assert again.num_batches_tracked.shape == ()
    assert again.num_batches_tracked == 9


def test_state_dict_is_a_copy():
    layer = trained()
    state = layer.state_dict()
    for value in state.values():
        value[...] = 0
    assert layer.num_batches_tracked == 3
    assert all(layer.state_dict()[name].any() for name in STATE)


def test_batch_count_may_be_missing_as_in_torch(torch):
    layer, peer = trained(seed=1), torch.nn.BatchNorm1d(3)
    state = {k: v for k, v in trained(seed=2).state_dict().items() if k != "num_batches_tracked"}
    peer.load_state_dict({k: torch.as_tensor(v) for k, v in state.items()})
    assert layer.load_state_dict(state) == ([], [])
    assert layer.num_batches_tracked == 3


def test_missing_and_unexpected_keys():
    layer = trained(seed=1)
    before = layer.state_dict("a.")
    state = trained(seed=2).state_dict("a.")
    del state["a.bias"], state["a.running_var"]
    state |= {"a.gamma": np.ones(3), "a.b.weight": np.ones(3), "b.weight": np.ones(3)}
    message = r"missing: a\.bias, a\.running_var; unexpected: a\.gamma, a\.b\.weight$"
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(state, prefix="a.")
    for name, value in before.items():
        assert np.array_equal(layer.state_dict("a.")[name], value)
    found = layer.load_state_dict(state, prefix="a.", strict=False)
    assert found.missing_keys == ["a.bias", "a.running_var"]
    assert found.unexpected_keys == ["a.gamma", "a.b.weight"]
    assert np.array_equal(layer.weight, state["a.weight"])
    assert np.array_equal(layer.bias, before["a.bias"])
    with pytest.raises(ValueError, match=r"unexpected: weight, bias$"):
        BatchNorm1d(3, affine=False).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("running_var", np.ones(4), ValueError, r"running_var: expected shape \(3,\), got \(4,\)"),
        ("running_mean", 1.0, ValueError, r"running_mean: expected shape \(3,\), got \(\)"),
        ("num_batches_tracked", 2.5, ValueError, "num_batches_tracked: expected a whole number"),
        ("num_batches_tracked", np.nan, ValueError, "num_batches_tracked: expected a whole number"),
        ("num_batches_tracked", [1, 2], ValueError, r"num_batches_tracked: .*\(\), got \(2,\)"),
        ("bias", np.ones(3) * 1j, TypeError, "bias: expected real numbers, got dtype complex128"),
        ("bias", ["a", "b", "c"], TypeError, "bias: expected real numbers"),
        ("bias", None, TypeError, "bias: expected real numbers, got dtype object"),
    ],
)
def test_a_bad_value_loads_nothing(name, value, error, message, strict):
    layer = trained(seed=1)
    before = layer.state_dict()
    state = {**trained(seed=2).state_dict(), name: value}
    with pytest.raises(error, match=message):
        layer.load_state_dict(state, strict=strict)
    for key, old in before.items():
        assert np.array_equal(getattr(layer, key), old), key


def test_a_read_only_array_loads_nothing():
    layer = trained(seed=1)
    before = layer.state_dict()
    layer.running_var.flags.writeable = False
    with pytest.raises(ValueError, match=r"running_var: .* read-only"):
        layer.load_state_dict(trained(seed=2).state_dict())
    for key, old in before.items():
        assert np.array_equal(getattr(layer, key), old), key


def test_state_must_be_a_mapping():
    with pytest.raises(TypeError, match="state: expected a mapping, got list"):
        BatchNorm1d(3).load_state_dict([("weight", np.ones(3))])
