"""The digits example: it learns, and its comparison of the modes comes out as it says."""

import subprocess
import sys

import numpy as np
import pytest
from support import ROOT

for needed in ("sklearn", "matplotlib", "tqdm", "threadpoolctl"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def example():
    """The example's modules, importable as they are when it runs as a script."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import digits
        import smallcnn
        import two_modes
    finally:
        sys.path.remove(str(ROOT / "examples"))
    return digits, smallcnn, two_modes


@pytest.fixture(scope="module")
def trained(example):
    """A network after five epochs, with the test images and labels."""
    digits, smallcnn, _ = example
    rng = np.random.default_rng(0)
    train_images, test_images, train_labels, test_labels = digits.load(0)
    network = smallcnn.SmallCNN(rng)
    digits.train(network, train_images, train_labels, epochs=5, rng=rng)
    return network, test_images, test_labels


def test_learns(example, trained):
    assert example[0].accuracy(*trained) > 0.95


def test_gradients_of_the_network(example):
    # Central differences through the whole network in float64, one weight of each parameter array.
    _, smallcnn, _ = example
    rng = np.random.default_rng(1)
    network = smallcnn.SmallCNN(rng).astype(np.float64)
    images, labels = rng.random((6, 8, 8, 1)), rng.integers(0, 10, 6)
    network.backward(smallcnn.cross_entropy(network.forward(images, True), labels)[1])
    for part in network.parts:
        for key, parameter in part.parameters.items():
            index = np.unravel_index(np.abs(part.gradients[key]).argmax(), parameter.shape)
            expected = part.gradients[key][index]
            losses = []
            for step in (1e-6, -1e-6):
                parameter[index] += step
                losses.append(smallcnn.cross_entropy(network.forward(images, True), labels)[0])
                parameter[index] -= step
            measured = (losses[0] - losses[1]) / 2e-6
            assert measured == pytest.approx(expected, rel=1e-5), f"{part.name} {key}"


def test_modes_agree_down_to_the_last_norms_parameters_only(example, trained):
    _, _, two_modes = example
    network, images, labels = trained
    _, pairs = two_modes.compare(network, images[:64], labels[:64])
    same = {pair.name for pair in pairs if pair.same}
    assert same == {"scores", "linear: dW", "block 3: dγ", "block 3: dβ"}
    assert all(np.abs(pair.eval).max() > 0 for pair in pairs)


def test_only_training_mode_depends_on_the_batch(example, trained):
    _, _, two_modes = example
    network, images, _ = trained
    rng = np.random.default_rng(2)
    in_training, in_eval = two_modes.batch_dependence(network, images[0], images[1:], rng, 5)
    assert np.ptp(in_training, axis=0).max() > 1e-3
    assert np.ptp(in_eval, axis=0).max() < 1e-12


def test_runs_as_a_script(tmp_path):
    figure = tmp_path / "modes.png"
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "digits.py")]
    done = subprocess.run(
        [*command, "--epochs", "1", "--output", str(figure)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "1/1" in done.stderr  # the progress bar

    for bad in (["--epochs", "0"], ["--output", "figure.pdf"], ["--nonsense"]):
        done = subprocess.run([*command, *bad], capture_output=True, text=True)
        assert done.returncode == 2
        assert bad[0] in done.stderr
