"""A small convolutional network in NumPy, with numbabn doing its normalizations.

Three blocks of convolution, batch norm and ReLU, then one linear layer. Everything is
channels-last, (N, H, W, C), because that is how a convolution written as one matrix product
comes out; numbabn takes it as it is with ``channel_axis=-1``.

Every block keeps what its backward pass needs, and writes its gradients beside its parameters.
There is no autograd: `SmallCNN.backward` calls the blocks in reverse, and that is all.
"""

from __future__ import annotations

import copy

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import DTypeLike, NDArray

import numbabn

Array = NDArray[np.floating]


class ConvNormRelu:
    """A 3×3 convolution (padding 1), a batch norm and a ReLU.

    The convolution has no bias: the norm would subtract it again, and has its own, β.
    """

    def __init__(
        self, name: str, channels_in: int, channels_out: int, stride: int, rng: np.random.Generator
    ) -> None:
        self.name = name
        self.stride = stride
        fan_in = 9 * channels_in
        weight = rng.standard_normal((fan_in, channels_out)) * np.sqrt(2 / fan_in)
        self.parameters: dict[str, Array] = {
            "weight": weight.astype(np.float32),  # of the convolution, (9 * channels_in, C)
            "gamma": np.ones(channels_out, np.float32),  # of the norm, (C,)
            "beta": np.zeros(channels_out, np.float32),
        }
        self.gradients: dict[str, Array] = {}
        self.running_mean: Array = np.zeros(channels_out, np.float32)
        self.running_var: Array = np.ones(channels_out, np.float32)

    def forward(self, x: Array, training: bool) -> Array:
        """(N, H, W, channels_in) → (N, H / stride, W / stride, C)."""
        windows = patches(x, self.stride)  # (N, H', W', channels_in, 3, 3)
        self.input_shape = x.shape
        self.columns = windows.reshape(-1, len(self.parameters["weight"]))
        self.conv_output = (self.columns @ self.parameters["weight"]).reshape(
            *windows.shape[:3], -1
        )
        y: Array
        y, self.saved = numbabn.batch_norm_forward(
            self.conv_output,
            self.running_mean,
            self.running_var,
            self.parameters["gamma"],
            self.parameters["beta"],
            training=training,
            channel_axis=-1,
            activation="relu",
        )
        return y

    def backward(self, grad_output: Array) -> Array:
        """Fill `gradients`; return the gradient of the block's input.

        `saved` remembers in which mode the forward pass ran, and numbabn uses that mode's formula.
        """
        grad_conv, grad_gamma, grad_beta = numbabn.batch_norm_backward(grad_output, self.saved)
        self.grad_conv_output = grad_conv
        flat = grad_conv.reshape(-1, grad_conv.shape[-1])
        self.gradients = {
            "weight": self.columns.T @ flat,
            "gamma": grad_gamma,
            "beta": grad_beta,
        }
        grad_columns = flat @ self.parameters["weight"].T
        grad_windows = grad_columns.reshape(*grad_conv.shape[:3], -1, 3, 3)
        return add_patches(grad_windows, self.input_shape, self.stride)


class Linear:
    """The classifier: ``x @ weight + bias`` on flattened images."""

    def __init__(self, name: str, inputs: int, outputs: int, rng: np.random.Generator) -> None:
        self.name = name
        weight = rng.standard_normal((inputs, outputs)) * np.sqrt(1 / inputs)
        self.parameters: dict[str, Array] = {
            "weight": weight.astype(np.float32),
            "bias": np.zeros(outputs, np.float32),
        }
        self.gradients: dict[str, Array] = {}

    def forward(self, x: Array) -> Array:
        """(N, ...) → (N, outputs)."""
        self.input_shape = x.shape
        self.flat = x.reshape(len(x), -1)
        return self.flat @ self.parameters["weight"] + self.parameters["bias"]

    def backward(self, grad_output: Array) -> Array:
        """Fill `gradients`; return the gradient of the input."""
        self.gradients = {"weight": self.flat.T @ grad_output, "bias": grad_output.sum(0)}
        grad_flat: Array = grad_output @ self.parameters["weight"].T
        return grad_flat.reshape(self.input_shape)


class SmallCNN:
    """8×8 images with one channel, (N, 8, 8, 1) → ten scores, (N, 10)."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.blocks = [
            ConvNormRelu("block 1", 1, 16, 1, rng),  # (N, 8, 8, 16)
            ConvNormRelu("block 2", 16, 32, 2, rng),  # (N, 4, 4, 32)
            ConvNormRelu("block 3", 32, 64, 2, rng),  # (N, 2, 2, 64)
        ]
        self.head = Linear("linear", 2 * 2 * 64, 10, rng)

    @property
    def parts(self) -> list[ConvNormRelu | Linear]:
        """Everything that has parameters."""
        return [*self.blocks, self.head]

    def forward(self, images: Array, training: bool) -> Array:
        """The scores of ten classes; `training` says which of batch norm's two modes to use."""
        x = images
        for block in self.blocks:
            x = block.forward(x, training)
        return self.head.forward(x)

    def backward(self, grad_scores: Array) -> None:
        """Fill every part's `gradients`, in the mode that the forward pass ran in."""
        grad = self.head.backward(grad_scores)
        for block in reversed(self.blocks):
            grad = block.backward(grad)

    def astype(self, dtype: DTypeLike) -> SmallCNN:
        """Return a copy of the network with parameters and running statistics of another type."""
        network = copy.copy(self)
        network.blocks = [copy.copy(block) for block in self.blocks]
        network.head = copy.copy(self.head)
        for part in network.parts:
            part.parameters = {key: p.astype(dtype) for key, p in part.parameters.items()}
        for block in network.blocks:
            block.running_mean = block.running_mean.astype(dtype)
            block.running_var = block.running_var.astype(dtype)
        return network


class SGD:
    """Plain stochastic gradient descent with momentum, parameters updated in place."""

    def __init__(self, network: SmallCNN, momentum: float = 0.9) -> None:
        self.parts = network.parts
        self.momentum = momentum
        self.velocities = [
            {key: np.zeros_like(p) for key, p in part.parameters.items()} for part in self.parts
        ]

    def step(self, learning_rate: float) -> None:
        """One step along the gradients that the last backward pass left."""
        for part, velocities in zip(self.parts, self.velocities, strict=True):
            for key, velocity in velocities.items():
                velocity *= self.momentum
                velocity -= learning_rate * part.gradients[key]
                part.parameters[key] += velocity


def patches(x: Array, stride: int) -> Array:
    """All 3×3 neighbourhoods: (N, H, W, C) → a view (N, H', W', C, 3, 3), edges padded with 0."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::stride, ::stride]


def add_patches(grad_windows: Array, shape: tuple[int, ...], stride: int) -> Array:
    """The transpose of `patches`: add every neighbourhood back to where it was taken from."""
    n, height, width, channels = shape
    rows, columns = grad_windows.shape[1:3]
    padded = np.zeros((n, height + 2, width + 2, channels), grad_windows.dtype)
    for i in range(3):
        for j in range(3):
            taken = padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
            taken += grad_windows[..., i, j]
    return padded[:, 1:-1, 1:-1]


def cross_entropy(scores: Array, labels: NDArray[np.integer]) -> tuple[float, Array]:
    """Mean cross-entropy of the softmax, and its gradient with respect to the scores."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    grad = np.exp(log_p)
    grad[rows, labels] -= 1
    return float(-log_p[rows, labels].mean()), grad / len(labels)
