"""The command line: ``python -m numbabn info``, ``demo``, ``warmup`` and ``bench``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeVar

__all__ = ["main"]

T = TypeVar("T")


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


def _list_of(item: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Make an argparse type: a list with commas, of distinct items."""

    def parse(text: str) -> list[T]:
        return list(dict.fromkeys(item(part) for part in text.split(",")))

    return parse


def _one_of(*names: str) -> Callable[[str], str]:
    """Make an argparse type: one of these names."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, got {text!r}")
        return text

    return parse


def _shape(text: str) -> tuple[int, ...]:
    """Parse a shape such as ``32,64,56,56``."""
    sizes = tuple(map(_integer_from(1), text.split(",")))
    if len(sizes) < 2:
        raise argparse.ArgumentTypeError(f"expected N,C,... with 2 sizes or more, got {text!r}")
    return sizes


def _seconds(text: str) -> float:
    """Parse a time that makes sense to measure for."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"expected seconds, up to 3600, got {text!r}")
    return value


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
    # The names are checked by `numbabn.warmup`; the command line keeps no list of its own.
    warmup.add_argument(
        "--dtypes", nargs="+", metavar="D", default=["float32"],
        help="of float32, float64, float16, bfloat16 (default: float32)",
    )  # fmt: skip
    warmup.add_argument(
        "--layouts", nargs="+", metavar="L", default=["planes", "columns"],
        help="of planes (NCHW), columns (NHWC, dense layers, small images) (default: both)",
    )  # fmt: skip
    warmup.set_defaults(run=_warmup, parser=warmup)

    bench = commands.add_parser("bench", help="time the four passes, beside memory's own speed")
    bench.add_argument(
        "--shape", type=_shape, default=(32, 64, 56, 56), metavar="N,C,...",
        help="samples, channels, and what else there is (default: 32,64,56,56)",
    )  # fmt: skip
    dtypes, layouts = ("float32", "float64", "float16", "bfloat16"), ("nchw", "nhwc")
    bench.add_argument(
        "--dtype", type=_one_of(*dtypes), default="float32", metavar="D",
        help=f"of {', '.join(dtypes)} (default: float32)",
    )  # fmt: skip
    bench.add_argument(
        "--layout", type=_one_of(*layouts), default="nchw", metavar="L",
        help="nchw, channels first, or nhwc, channels last (default: nchw)",
    )  # fmt: skip
    bench.add_argument(
        "--threads", type=_list_of(_integer_from(1)), metavar="T,...",
        help="numbers of threads (default: 1 and all)",
    )  # fmt: skip
    bench.add_argument(
        "--against", type=_list_of(_one_of("torch", "numpy")), default=[], metavar="P,...",
        help="of torch, numpy (default: nobody)",
    )  # fmt: skip
    bench.add_argument(
        "--seconds", type=_seconds, default=1.5, metavar="S",
        help="how long to measure each pass (default: 1.5)",
    )  # fmt: skip
    bench.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="write JSON to FILE, or instead of the table",
    )  # fmt: skip
    bench.add_argument("--plot", metavar="PNG", help="draw rooflines and scaling over threads")
    bench.set_defaults(run=_bench, parser=bench)
    return parser


def _info(arguments: argparse.Namespace) -> None:
    import numbabn

    numbabn.show_config()


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """Give a function (done, total, what) that shows progress on stderr if it is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total, what: None
        return
    try:
        from tqdm import tqdm
    except ImportError:

        def count(done: int, total: int, what: str) -> None:
            print(f"\r\033[K{done}/{total} {what}", end="", file=sys.stderr, flush=True)

        try:
            yield count
        finally:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        return
    with tqdm(leave=False) as bar:

        def move(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_description_str(what, refresh=False)
            bar.n = done
            bar.refresh()

        yield move


class _Tally:
    """What was compiled, and what loaded, since the last step, for each dtype and layout."""

    def __init__(self) -> None:
        self.rows: dict[str, list[float]] = {}
        self.group = ""
        self.last = self.now()

    def now(self) -> list[float]:
        from numbabn.runtime import kernel_counts

        return [*kernel_counts(), time.perf_counter()]

    def step(self, what: str) -> None:
        now = self.now()
        if self.group:
            row = self.rows.setdefault(self.group, [0, 0, 0.0])
            for i, (new, old) in enumerate(zip(now, self.last, strict=True)):
                row[i] += new - old
        self.group, self.last = what.partition(":")[0], now


def _warmup(arguments: argparse.Namespace) -> None:
    import numbabn

    start = time.perf_counter()
    tally = _Tally()
    try:
        with _bar() as show:

            def progress(done: int, total: int, what: str) -> None:
                tally.step(what)
                show(done, total, what)

            numbabn.warmup(arguments.dtypes, arguments.layouts, progress=progress)
    except (ImportError, ValueError) as error:
        arguments.parser.error(str(error))
    for group, (compiled, loaded, seconds) in tally.rows.items():
        print(f"{group}: {compiled:.0f} kernels compiled, {loaded:.0f} loaded, {seconds:.1f} s")
    print(f"kernels are ready after {time.perf_counter() - start:.1f} s")


def _bench(arguments: argparse.Namespace) -> None:
    from numbabn.bench import run

    run(arguments)


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
