"""PyTorch's batch norm on NumPy arrays, where PyTorch is installed."""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np

INSTALLED = importlib.util.find_spec("torch") is not None


def to_torch(a, *, copy=True):
    """The tensor of ``a``: its values, strides and dtype, bfloat16 included."""
    import torch

    if a.dtype.name == "bfloat16":
        return to_torch(a.view(np.int16), copy=copy).view(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of read-only memory; it is not written to
        tensor = torch.from_numpy(a)
    return tensor.clone(memory_format=torch.preserve_format) if copy else tensor


def to_numpy(tensor, dtype):
    """The array of ``tensor``, which is of NumPy's ``dtype``."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(dtype)
    return tensor.numpy()


def batch_norm(
    x,
    running_mean,
    running_var,
    weight,
    bias,
    grad_output,
    *,
    training,
    eps=1e-5,
    momentum=0.1,
    residual=None,
    activation=None,
):
    """Run both passes: ``(y, [dx, dweight, dbias, (dresidual)], (running_mean, running_var))``.

    The channels are axis 1. The running statistics that are given are not changed.
    """
    import torch

    arrays = [x, weight, bias, residual]
    leaves = [None if a is None else to_torch(a).requires_grad_() for a in arrays]
    running = [None if a is None else to_torch(a) for a in (running_mean, running_var)]
    y = torch.nn.functional.batch_norm(
        leaves[0], *running, leaves[1], leaves[2], training, momentum, eps
    )
    if residual is not None:
        y = y + leaves[3]
    if activation == "relu":
        y = torch.relu(y)
    y.backward(to_torch(grad_output))
    grads = [
        None if leaf is None else to_numpy(leaf.grad, a.dtype)
        for leaf, a in zip(leaves, arrays, strict=True)
    ]
    kept = [None if t is None else to_numpy(t, running_mean.dtype) for t in running]
    return to_numpy(y, x.dtype), grads if residual is not None else grads[:3], kept
