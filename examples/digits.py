"""Train a small CNN on handwritten digits with NumPy and numbabn, then compare the two modes.

    python examples/digits.py [--epochs 30] [--seed 0] [--output digits_two_modes.png]

The data are the 1,797 digits of 8×8 pixels that scikit-learn ships. The network is in
`smallcnn.py`, the comparison of batch norm's training and eval modes in `two_modes.py`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from smallcnn import SGD, Array, SmallCNN, cross_entropy
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from two_modes import batch_dependence, compare, draw, report

Labels = NDArray[np.integer]

BATCH = 64
LEARNING_RATE = 0.1


def load(seed: int) -> tuple[Array, Array, Labels, Labels]:
    """Images (N, 8, 8, 1) in [0, 1], split into four fifths for training and one for testing."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., np.newaxis]
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=0.2, random_state=seed, stratify=digits.target
    )
    return train_images, test_images, train_labels, test_labels


def shifted(images: Array, rng: np.random.Generator) -> Array:
    """Every image moved by at most one pixel each way, so that no two epochs see the same data."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    views = sliding_window_view(padded, (8, 8), axis=(1, 2))  # (N, 3, 3, 1, 8, 8)
    down, right = rng.integers(0, 3, (2, len(images)))
    return np.moveaxis(views[np.arange(len(images)), down, right], 1, -1)


def train(
    network: SmallCNN, images: Array, labels: Labels, epochs: int, rng: np.random.Generator
) -> None:
    """Stochastic gradient descent with momentum; the learning rate falls along a half cosine."""
    optimizer = SGD(network)
    batches = len(images) // BATCH
    progress = tqdm(range(epochs), desc="training", unit="epoch")
    # NumPy's matrix products have threads of their own. For matrices this small they gain nothing,
    # and on a busy machine the two pools of threads spend their time waiting for each other.
    with progress, threadpool_limits(1, user_api="blas"):
        for epoch in progress:
            order = rng.permutation(len(images))
            losses = []
            for i in range(batches):
                chosen = order[i * BATCH : (i + 1) * BATCH]
                scores = network.forward(shifted(images[chosen], rng), training=True)
                loss, grad_scores = cross_entropy(scores, labels[chosen])
                network.backward(grad_scores)
                done = (epoch + i / batches) / epochs
                optimizer.step(LEARNING_RATE * (1 + np.cos(np.pi * done)) / 2)
                losses.append(loss)
            progress.set_postfix(loss=f"{np.mean(losses):.4f}")


def accuracy(network: SmallCNN, images: Array, labels: Labels) -> float:
    """The fraction of images whose highest score is the right one, in eval mode."""
    scores = network.forward(images, training=False)
    return float((scores.argmax(axis=1) == labels).mean())


def positive(text: str) -> int:
    """Parse a positive integer for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def png(text: str) -> Path:
    """Parse the name of a PNG file in a directory that exists."""
    path = Path(text)
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a .png in an existing directory, got {text}")
    return path


def main() -> None:
    """Train, test, compare, draw."""
    parser = argparse.ArgumentParser(
        description="Train a small CNN on handwritten digits, then compare batch norm's two modes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=positive, default=30, help="passes over the data")
    parser.add_argument("--seed", type=int, default=0, help="of the split, weights and batches")
    parser.add_argument(
        "--output", type=png, default=Path("digits_two_modes.png"), help="where the figure goes"
    )
    arguments = parser.parse_args()

    rng = np.random.default_rng(arguments.seed)
    train_images, test_images, train_labels, test_labels = load(arguments.seed)
    network = SmallCNN(rng)

    start = time.perf_counter()
    train(network, train_images, train_labels, arguments.epochs, rng)
    print(f"trained on {len(train_images)} images in {time.perf_counter() - start:.1f} s")
    reached = accuracy(network, test_images, test_labels)
    print(f"test accuracy: {reached:.2%} of {len(test_images)} images, in eval mode\n")

    compared, pairs = compare(network, test_images[:BATCH], test_labels[:BATCH])
    in_training, in_eval = batch_dependence(network, test_images[0], test_images[1:], rng)
    print(report(pairs, in_training, in_eval))

    draw(arguments.output, compared, pairs, in_training, in_eval)
    print(f"\nfigure: {arguments.output}")


if __name__ == "__main__":
    main()
