"""What the tests of layers share: layers with a state to them, and PyTorch's twin of a layer."""

from __future__ import annotations

import numpy as np

from numbabn import BatchNorm1d, BatchNorm2d, BatchNorm3d

# Each class with a shape that it takes.
LAYERS = {BatchNorm1d: (6, 3), BatchNorm2d: (3, 3, 2, 4), BatchNorm3d: (2, 3, 2, 1, 3)}
STATE = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def randomize(layer, seed=0):
    """Give weight and bias values that matter."""
    rng = np.random.default_rng(seed)
    for array in (layer.weight, layer.bias):
        if array is not None:
            array[...] = rng.uniform(-2, 2, array.shape)
    return layer


def trained(cls=BatchNorm1d, seed=0, **options):
    """A layer whose every state value differs from those of a new one."""
    layer = randomize(cls(3, **options), seed)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        layer(rng.standard_normal(LAYERS[cls]).astype(layer.dtype) + 1)
    return layer


def peer_of(torch, layer):
    """PyTorch's layer with the options and the state of ours."""
    peer = getattr(torch.nn, type(layer).__name__)(
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
        dtype=getattr(torch, layer.dtype.name),
    )
    if layer.affine and layer.bias is None:
        peer.register_parameter("bias", None)  # older releases have no argument for it
    state = {name: torch.from_numpy(value) for name, value in layer.state_dict().items()}
    peer.load_state_dict(state)
    return peer.train(layer.training)


def same(layer, peer, **tolerance):
    """State and gradients of a layer are those of PyTorch's."""
    theirs = peer.state_dict()
    assert list(layer.state_dict()) == list(theirs)
    for name, value in layer.state_dict().items():
        np.testing.assert_allclose(value, theirs[name].numpy(), err_msg=name, **tolerance)
    for name in ("weight", "bias"):
        parameter = getattr(peer, name)
        theirs = None if parameter is None else parameter.grad
        ours = getattr(layer, f"{name}_grad")
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            np.testing.assert_allclose(ours, theirs.numpy(), err_msg=name, **tolerance)
