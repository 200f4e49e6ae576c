"""Batch norm's two modes side by side, on a trained network and real images.

`compare` runs one batch through the network in training mode, copies each norm's batch
statistics into its running statistics, and runs the same batch again in eval mode. Now both
modes normalize with the same numbers, so whatever differs is the modes' own doing.
`batch_dependence` puts one image into many batches. `draw` makes one picture of both.

Float64 throughout, so that "the same" means a dozen digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # by itself, without pyplot: no window, no global state
from numpy.typing import NDArray
from smallcnn import Array, SmallCNN, cross_entropy

import numbabn

SAME, SAME_TOO, DIFFERENT = "#1b7837", "#5e4fa2", "#b2182b"  # colours of quantities,
TRAINING, EVAL = "#2166ac", "#e08214"  # of modes,
CHANNELS = ("#b2182b", "#7570b3", "#1f9e89")  # and of channels


@dataclass(frozen=True)
class Pair:
    """One quantity as both modes computed it."""

    name: str
    training: Array
    eval: Array

    @property
    def difference(self) -> float:
        """The length of the difference, relative to the training mode's value."""
        return float(np.linalg.norm(self.training - self.eval) / np.linalg.norm(self.training))

    @property
    def same(self) -> bool:
        """Whether both agree to rounding."""
        return self.difference < 1e-9


def compare(
    network: SmallCNN, images: Array, labels: NDArray[np.integer]
) -> tuple[SmallCNN, list[Pair]]:
    """Both modes on one batch, with running statistics equal to the batch's.

    Returns the float64 network after its eval pass and the pairs, from the loss backwards.
    """
    network = network.astype(np.float64)
    images = images.astype(np.float64)

    training = _forward_and_backward(network, images, labels, training=True)
    for block in network.blocks:
        stats = numbabn.batch_norm_stats(block.conv_output, channel_axis=-1)
        block.running_mean[...] = stats.mean
        block.running_var[...] = stats.var  # the biased one, which training normalizes with
    evaluation = _forward_and_backward(network, images, labels, training=False)

    pairs = [Pair(name, training[name], evaluation[name]) for name in training]
    return network, pairs


def _forward_and_backward(
    network: SmallCNN, images: Array, labels: NDArray[np.integer], training: bool
) -> dict[str, Array]:
    """Everything a pass in one mode computes, in the order in which the backward pass meets it."""
    scores = network.forward(images, training)
    network.backward(cross_entropy(scores, labels)[1])
    values = {"scores": scores, "linear: dW": network.head.gradients["weight"]}
    for block in reversed(network.blocks):
        values[f"{block.name}: dγ"] = block.gradients["gamma"]
        values[f"{block.name}: dβ"] = block.gradients["beta"]
        values[f"{block.name}: dx of the norm"] = block.grad_conv_output
        values[f"{block.name}: dW of the conv"] = block.gradients["weight"]
    return values


def batch_dependence(
    network: SmallCNN, image: Array, others: Array, rng: np.random.Generator, batches: int = 40
) -> tuple[Array, Array]:
    """The scores of one image among 63 random others: (batches, 10) in training, and in eval."""
    scores: dict[bool, list[Array]] = {True: [], False: []}
    for _ in range(batches):
        neighbours = others[rng.choice(len(others), 63, replace=False)]
        batch = np.concatenate([image[np.newaxis], neighbours]).astype(np.float64)
        for training in scores:
            # A fresh copy, because a pass in training mode moves the running statistics.
            scores[training].append(network.astype(np.float64).forward(batch, training)[0])
    return np.array(scores[True]), np.array(scores[False])


def cosine_with_gradient(weight: Array, gradient: Array) -> Array:
    """For each output channel, the cosine of the angle between its weights and their gradient."""
    lengths = np.linalg.norm(weight, axis=0) * np.linalg.norm(gradient, axis=0)
    cosines: Array = np.zeros_like(lengths)
    np.divide((weight * gradient).sum(axis=0), lengths, out=cosines, where=lengths > 0)
    return cosines


def report(pairs: list[Pair], in_training: Array, in_eval: Array) -> str:
    """The comparison as text."""
    by_name = {pair.name: pair for pair in pairs}
    width = max(len(pair.name) for pair in pairs)
    rows = [
        f"  {pair.name:{width}}  {np.linalg.norm(pair.training):10.3e}  "
        f"{np.linalg.norm(pair.eval):10.3e}  {pair.difference:12.1e}  "
        f"{'same' if pair.same else 'DIFFERENT'}"
        for pair in pairs
    ]
    lines = [
        "One batch, batch statistics copied into the running statistics, float64.",
        "From the loss backwards:",
        "",
        f"  {'':{width}}  {'|training|':>10}  {'|eval|':>10}  {'|difference|':>12}",
        *rows,
        "",
        "  (lengths of the vectors; the difference is relative to the training mode's)",
        "",
        "The scores agree, and so does everything down to the last norm's dγ and dβ: both modes",
        "normalized with the same numbers. γ and β do get gradients in eval: the last norm's dγ",
        f"has length {np.linalg.norm(by_name['block 3: dγ'].eval):.3e} there.",
        "The modes part at the last norm's dx. In training mode the mean and the variance are",
        "functions of the batch, and the gradient flows through them too; in eval they are",
        "constants. Whatever lies upstream, first the convolution's W, gets another gradient.",
        "",
        f"One image among {len(in_training)} different batches of 64, largest change of a score:",
        f"  training mode  {np.ptp(in_training, axis=0).max():.1e}"
        "   its neighbours shape the statistics it is normalized with",
        f"  eval           {np.ptp(in_eval, axis=0).max():.1e}"
        "   its neighbours do not matter (up to the matrix product's rounding)",
    ]
    return "\n".join(lines)


def draw(
    path: Path, network: SmallCNN, pairs: list[Pair], in_training: Array, in_eval: Array
) -> None:
    """Six panels: what agrees, what differs, and why, as a PNG."""
    by_name = {pair.name: pair for pair in pairs}
    figure = Figure(figsize=(14, 8.4), layout="constrained")
    axes = figure.subplots(2, 3)
    figure.suptitle(
        "Batch norm's two modes on one batch of digits, "
        "with running statistics set to the batch's statistics",
        fontsize=14,
    )

    block = network.blocks[-1]
    dx, dw = by_name["block 3: dx of the norm"], by_name["block 3: dW of the conv"]

    def scatter(ax: Axes, pair: Pair, colour: str, label: str) -> None:
        x, y = pair.training.ravel(), pair.eval.ravel()
        ax.plot(x, y, ".", markersize=4, alpha=0.6, color=colour, label=label)
        ax.axline((0, 0), slope=1, color="0.5", lw=1, zorder=0)

    def both(ax: Axes, training: Array, evaluation: Array) -> None:
        ax.plot(training, "o", markersize=4, color=TRAINING, label="training")
        ax.plot(evaluation, "o", markersize=4, color=EVAL, label="eval")

    ax = axes[0, 0]
    scatter(ax, by_name["scores"], SAME, "ten scores of 64 images")
    ax.set(title="The outputs are the same", xlabel="training mode", ylabel="eval")

    ax = axes[0, 1]
    scatter(ax, by_name["block 3: dγ"], SAME, "dγ")
    scatter(ax, by_name["block 3: dβ"], SAME_TOO, "dβ")
    ax.set(title="So are the last norm's dγ and dβ", xlabel="training mode", ylabel="eval")

    # What flows through the batch's mean and variance is a straight line in x̂ for every channel.
    ax = axes[0, 2]
    normalized = (block.conv_output - block.saved.mean) * block.saved.invstd
    scale = block.parameters["gamma"] * block.saved.invstd / (dx.eval.size / len(block.saved.mean))
    slopes, offsets = scale * block.gradients["gamma"], scale * block.gradients["beta"]
    for channel, colour in zip(np.argsort(-np.abs(slopes))[:3], CHANNELS, strict=True):
        difference = dx.eval[..., channel] - dx.training[..., channel]
        ax.plot(
            normalized[..., channel].ravel(),
            difference.ravel(),
            ".",
            color=colour,
            label=f"channel {channel}",
        )
        line = ax.axline((0, offsets[channel]), slope=slopes[channel], color="0.5", lw=1, zorder=0)
    line.set_label("γ·r·(mean(dy) + x̂·mean(dy·x̂))")
    ax.set(
        title="Its dx differs, by a straight line in x̂",
        xlabel="x̂",
        ylabel="dx in eval - dx in training mode",
    )

    ax = axes[1, 0]
    scatter(ax, dw, DIFFERENT, "dW of the last convolution")
    ax.set(title="And so every gradient upstream does", xlabel="training mode", ylabel="eval")

    ax = axes[1, 1]
    weight = block.parameters["weight"]
    both(ax, cosine_with_gradient(weight, dw.training), cosine_with_gradient(weight, dw.eval))
    ax.set(
        title="In training mode W's length does not matter",
        xlabel="output channel of the last convolution",
        ylabel="cosine between W and dW",
    )

    ax = axes[1, 2]
    winner = int(in_eval[0].argmax())
    both(ax, in_training[:, winner], in_eval[:, winner])
    ax.set(
        title="In eval an image has its score to itself",
        xlabel="the same image in different batches",
        ylabel=f"its score for class {winner}",
    )

    for ax in axes.flat:
        ax.locator_params(nbins=6)
        ax.legend(fontsize="small")
    figure.savefig(path, dpi=110)
