"""A process that times benchmarks with the numbabn of one folder, and the handle to it.

The process is `python guard_worker.py FOLDER`. It takes a request a line on its standard input and
answers with a line of JSON: ``prepare NAME`` makes the arrays and runs the pass once, ``calibrate``
says how often to repeat it, ``time REPS`` gives seconds per call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # The folder's numbabn comes before an installed one, and this folder's benchmarks before any.
    sys.path[:1] = [sys.argv[1], str(Path(__file__).resolve().parents[1])]

from benchmarks.shapes import LAYOUTS, PASSES, SHAPE_BY_NAME, SHAPES

__all__ = ["Worker", "benchmark_names"]

DTYPES = ("float32", "float64", "float16", "bfloat16")
# Time that one timing takes, and its part that wakes threads and fills caches beforehand.
SECONDS = 4e-3


def benchmark_names() -> list[str]:
    """All benchmarks: ``<pass> <shape> <layout> <dtype>``."""
    return [
        f"{pass_name} {shape.name} {layout} {dtype}"
        for shape in SHAPES
        for layout in shape.layouts
        for pass_name in PASSES
        for dtype in DTYPES
    ]


class Worker:
    """The handle: starts the process, and speaks with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.request = ""
        # A fixed number of OpenMP threads that sleep at once when idle: the other process of the
        # pair is timed next.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        # Kernels are cached in the folder itself.
        environment.pop("NUMBA_CACHE_DIR", None)
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def send(self, request: str) -> None:
        """Ask without waiting for the answer, which `receive` returns."""
        assert self.process.stdin is not None
        self.request = request
        with suppress(BrokenPipeError):  # the process has ended, as `receive` will tell
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()

    def receive(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            raise RuntimeError(f"{self.request}: {answer['error']} ({self.folder})")
        return answer["value"]

    def ask(self, request: str) -> Any:
        self.send(request)
        return self.receive()

    def close(self) -> None:
        if self.process.stdin:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


def serve(folder: Path) -> None:
    """Answer requests until the input ends."""
    run: Any = None

    def seconds(reps: int) -> float:
        # What the other process left in the caches should not count.
        run(max(3, reps // 4))
        start = time.perf_counter()
        run(reps)
        return (time.perf_counter() - start) / reps

    def prepare(name: str) -> None:
        nonlocal run
        from benchmarks.suite import cell

        pass_name, shape, layout, dtype = name.split()
        if shape not in SHAPE_BY_NAME or layout not in LAYOUTS:
            raise ValueError(f"no such benchmark: {name}")
        run = cell(pass_name, shape, layout, dtype).run
        import numbabn

        if Path(numbabn.__file__).resolve().parents[1] != folder.resolve():
            raise RuntimeError(f"numbabn was imported from {numbabn.__file__}")

    def calibrate() -> int:
        return max(1, round(SECONDS / min(seconds(1) for _ in range(3))))

    for line in sys.stdin:
        request, _, argument = line.strip().partition(" ")
        try:
            if request == "prepare":
                value: float | None = prepare(argument)  # type: ignore[func-returns-value]
            elif request == "calibrate":
                value = calibrate()
            else:
                value = seconds(int(argument))
            answer: dict[str, object] = {"value": value}
        except Exception as error:  # whatever it is, the other side should say so
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
