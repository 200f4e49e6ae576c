"""Time and correctness on a GPU, beside PyTorch (cuDNN where PyTorch chooses it): one table.

    python -m benchmarks.gpu [--quick] [--dtype float32 ...]

Needs PyTorch with CUDA and numba-cuda. Each number is the median of calls timed by CUDA events,
with L2 flushed before every call, and with the device kept busy while the host launches, so that
launch overhead is not in it; that is a line of its own. "of copy" is the least that a pass must
move (x, or x and grad_output, read once, and the result written) at the bandwidth of a device copy
of 1 GiB in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numbabn

from .peers_native import Missing, optional
from .shapes import PASSES, REPRESENTATIVE, SHAPE_BY_NAME, SHAPES, Shape

MOMENTUM, EPS = 0.1, 1e-5
REPEATS = 15
FLUSH_BYTES = 256 << 20  # several times any L2
HEAD_START = 1_000_000  # cycles that the device idles while the host launches
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


class Timer:
    """Times calls on the device."""

    def __init__(self) -> None:
        self.torch = optional("torch")
        self.flush = self.torch.zeros(FLUSH_BYTES // 4, device="cuda")

    def __call__(self, call: Callable[[], object]) -> float:
        """Median seconds."""
        cuda = self.torch.cuda
        call()
        pairs = []
        for _ in range(REPEATS):
            begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.sum()  # read, not written: L2 would write what it holds during the call
            cuda._sleep(HEAD_START)
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        cuda.synchronize()
        times = [float(begin.elapsed_time(end)) for begin, end in pairs]  # in ms
        return statistics.median(times) * 1e-3


def copy_bandwidth(timer: Timer) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB on the device."""
    a = timer.torch.zeros(1 << 28, dtype=timer.torch.float32, device="cuda")
    b = timer.torch.empty_like(a)
    return float(2 * a.nbytes / timer(lambda: b.copy_(a)))


class Case:
    """One shape, layout and dtype: the calls of both, by pass."""

    def __init__(self, shape: Shape, layout: str, dtype: str):
        torch = optional("torch")
        make = torch.Generator(device="cuda").manual_seed(0)
        sizes, axis = shape.in_layout(layout)
        C = sizes[axis]

        def normal() -> Any:
            values = torch.randn(sizes, generator=make, device="cuda", dtype=torch.float32)
            return values.to(getattr(torch, dtype)).movedim(axis, 1)

        self.x, self.dy = normal(), normal()
        self.weight = torch.rand(C, generator=make, device="cuda") + 0.5
        self.bias = torch.randn(C, generator=make, device="cuda")
        self.mean = torch.zeros(C, device="cuda")
        self.var = torch.ones(C, device="cuda")
        self.torch = torch

    def calls(self, which: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """The pass as numbabn does it and as PyTorch does; both give tuples of tensors."""
        training = which.endswith("train")
        given = (self.x, self.mean, self.var, self.weight, self.bias, training, MOMENTUM, EPS)
        functional = self.torch.nn.functional
        if which.startswith("forward"):

            def theirs() -> Any:
                with self.torch.no_grad():
                    return (functional.batch_norm(*given),)

            return (lambda: (numbabn.batch_norm(*given),)), theirs
        _, saved = numbabn.batch_norm_forward(*given)
        leaves = [a.detach().requires_grad_() for a in (self.x, self.weight, self.bias)]
        y = functional.batch_norm(
            leaves[0], self.mean, self.var, leaves[1], leaves[2], training, MOMENTUM, EPS
        )
        grad = self.torch.autograd.grad
        return (
            lambda: numbabn.batch_norm_backward(self.dy, saved),
            lambda: grad(y, leaves, self.dy, retain_graph=True),
        )


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference, as a share of the largest value of each result."""
    shares = []
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.double(), b.double()
        shares.append(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)))
    return max(shares)


def launch_overhead() -> float:
    """Seconds that the host takes for a call of 64 values, which the device hardly notices."""
    torch = optional("torch")
    x = torch.randn(8, 8, device="cuda")
    mean, var = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
    seconds = []
    for _ in range(200):
        begin = time.perf_counter()
        numbabn.batch_norm(x, mean, var)
        seconds.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    return statistics.median(seconds)


def main() -> None:
    """Print the table; the exit status is 1 if a result differs from PyTorch's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="only a few representative shapes")
    parser.add_argument("--dtype", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    options = parser.parse_args()
    try:
        torch = optional("torch")
    except Missing as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("this needs PyTorch with CUDA, and a GPU")
    shapes = [SHAPE_BY_NAME[name] for name in REPRESENTATIVE] if options.quick else SHAPES
    timer = Timer()
    bandwidth = copy_bandwidth(timer)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, ", end="")
    print(f"cuDNN {torch.backends.cudnn.version()}; device copy {bandwidth / 1e9:.0f} GB/s")
    print(f"{'shape':>16} layout dtype    pass              µs  of copy  PyTorch/ours  difference")
    wrong, lines, slower, large = 0, 0, 0, []
    for shape in shapes:
        for layout in shape.layouts:
            for dtype in options.dtype:
                case = Case(shape, layout, dtype)
                for which in PASSES:
                    ours, theirs = case.calls(which)
                    off = difference(ours(), theirs())
                    wrong += not off <= TOLERANCE[dtype]
                    own, peer = timer(ours), timer(theirs)
                    least = case.x.nbytes * (2 if which.startswith("forward") else 3)
                    lines, slower = lines + 1, slower + (own > peer)
                    if case.x.nbytes > 100e6 and which.endswith("eval"):
                        large.append(least / own / bandwidth)
                    print(
                        f"{shape.name:>16} {layout:6} {dtype:8} {which:14} {own * 1e6:7.1f}  "
                        f"{least / own / bandwidth:7.2f}  {peer / own:12.2f}  {off:10.1e}"
                        f"{'' if off <= TOLERANCE[dtype] else '  differs'}",
                        flush=True,
                    )
    print(f"slower than PyTorch in {slower} of {lines} lines")
    if large:
        print(f"at least {min(large):.2f} of copy in eval mode where x has over 100 MB")
    print(f"host time of a tiny call in eval mode: {launch_overhead() * 1e6:.0f} µs")
    raise SystemExit(int(wrong > 0))


if __name__ == "__main__":
    main()
