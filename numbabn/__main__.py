"""The command line: ``python -m numbabn info``, ``demo`` and ``warmup``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _integer_from(least: int) -> Callable[[str], int]:
    """Make an argparse type: an integer that is at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected an integer, {least} or more, got {text!r}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="numbabn", description="Batch normalization kernels for NumPy arrays.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    info = commands.add_parser("info", help="print versions, threads, caches and GPU")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="compare the two modes on one random batch")
    demo.add_argument("--batch", type=_integer_from(2), default=8, help="samples (default: 8)")
    demo.add_argument("--channels", type=_integer_from(1), default=3, help="default: 3")
    demo.add_argument("--size", type=_integer_from(1), default=5, help="height, width (default: 5)")
    demo.add_argument("--seed", type=_integer_from(0), default=0, help="default: 0")
    demo.set_defaults(run=_demo)

    warmup = commands.add_parser("warmup", help="compile the kernels into Numba's cache on disk")
    warmup.set_defaults(run=_warmup)
    return parser


def _info(arguments: argparse.Namespace) -> None:
    import numbabn

    numbabn.show_config()


def _warmup(arguments: argparse.Namespace) -> None:
    import numbabn

    start = time.perf_counter()
    numbabn.warmup()
    print(f"kernels are ready after {time.perf_counter() - start:.1f} s")


def _demo(arguments: argparse.Namespace) -> None:
    """Both modes on one batch, with running statistics equal to the batch's."""
    import numpy as np

    import numbabn

    rng = np.random.default_rng(arguments.seed)
    shape = (arguments.batch, arguments.channels, arguments.size, arguments.size)
    x, grad_output = rng.normal(3, 2, shape), rng.normal(0, 1, shape)
    weight, bias = rng.normal(1, 0.5, (2, arguments.channels))
    stats = numbabn.batch_norm_stats(x)
    # The first sample as it is, among others.
    elsewhere = np.concatenate([x[:1], rng.normal(3, 2, (arguments.batch - 1, *shape[1:]))])

    names = ("y", "dγ", "dβ", "dx", "mean of dx", "change of y[0] when x[1:] changes")
    columns = []
    for training in (True, False):
        # Copies, because training mode moves the running statistics.
        running = stats.mean.copy(), stats.var.copy()
        y, saved = numbabn.batch_norm_forward(x, *running, weight, bias, training)
        dx, dweight, dbias = numbabn.batch_norm_backward(grad_output, saved)
        running = stats.mean.copy(), stats.var.copy()
        moved = numbabn.batch_norm(elsewhere, *running, weight, bias, training)[0] - y[0]
        columns.append((y, dweight, dbias, dx, dx.mean(axis=(0, 2, 3)), moved))

    width = max(map(len, names))
    print(f"x of shape {shape}, float64; running statistics set to this batch's mean and variance.")
    print(f"Largest absolute values:\n\n{'':{width}}  training      eval  difference")
    for name, training_value, eval_value in zip(names, *columns, strict=True):
        sizes = [abs(v).max() for v in (training_value, eval_value, training_value - eval_value)]
        verdict = "same" if sizes[2] < 1e-9 else "DIFFERENT"
        print(f"{name:{width}}  {sizes[0]:8.1e}  {sizes[1]:8.1e}  {sizes[2]:10.1e}  {verdict}")
    print(
        "\nBoth modes normalize with the same numbers here, so y, dγ and dβ agree, and γ and β have"
        "\ngradients in eval too. dx differs: in training mode the mean and variance depend on x,"
        "\nand what flows through them is taken out of dx; in eval they are constants."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; errors in the arguments take one line and exit with code 2.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process if not given.
    """
    arguments = _parser().parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
