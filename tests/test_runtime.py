"""Compiling ahead of time: after `warmup`, a later process compiles nothing for the four passes.

Numba tells of every compilation by an event, and of none when it loads a kernel from disk.
"""

import os
import re
import subprocess
import sys

import pytest
from support import ROOT, run_script

import numbabn
from numbabn.__main__ import main

# A later process: both layouts in each of their forms, shapes for one thread and for several, few
# and many channels, and arguments of the kinds that are in ordinary use.
USE = """
import numpy as np
from numba.core import event
import numbabn

def channels_last(x):
    return np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1)

def use(x, axis=1):
    C = x.shape[axis]
    mean, var, weight, bias = np.ones((4, C), np.float32)
    for given in ({}, {"weight": weight, "bias": bias}):
        for activation in (None, "relu"):
            kind = {**given, "channel_axis": axis, "activation": activation}
            numbabn.batch_norm(x, mean, var, **kind)
            numbabn.batch_norm(x, mean, var, **kind, out=np.empty_like(x))
            for training in (True, False):
                y, saved = numbabn.batch_norm_forward(x, mean, var, training=training, **kind)
                for needs in ((1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 1, 0), (0, 0, 1)):
                    numbabn.batch_norm_backward(y, saved, needs=tuple(map(bool, needs)))
    numbabn.batch_norm_forward(x, None, None, training=True, channel_axis=axis)

shapes = {
    "small": [(2, 3, 9, 9), (2, 3, 20, 20), (1, 1, 70), (1, 130, 2)],
    "large": [(2, 1, 800, 800), (8, 64, 40, 40), (2, 700, 20, 20), (3, 7, 200, 200)],
    "short planes": [(16, 2048, 7, 7), (16, 5, 3, 3)],
    "dense": [(5, 7), (9000, 64), (70000, 3), (16, 70000), (1000, 1024)],
}
with event.install_recorder("numba:compile") as recorder:
    for group in shapes.values():
        for shape in group:
            x = np.ones(shape, np.float32)
            use(x)
            if x.ndim > 2:
                use(channels_last(x))
                use(np.moveaxis(x, 1, -1).copy(), axis=-1)
names = {str(e.data["dispatcher"]) for _, e in recorder.buffer if e.is_start}
print(len(recorder.buffer), sorted(names))
"""


def command(arguments, **options):
    """Run ``python -m numbabn warmup``; options in capitals go to its environment."""
    environment = {key: options.pop(key) for key in list(options) if key.isupper()}
    options = options or {"capture_output": True, "text": True}
    return subprocess.run(
        [sys.executable, "-m", "numbabn", "warmup", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        check=True,
        timeout=300,
        **options,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder as it is after ``python -m numbabn warmup``, and what that printed."""
    folder = str(tmp_path_factory.mktemp("cache"))
    done = command([], NUMBA_CACHE_DIR=folder)
    assert done.stderr == ""  # no progress bar where there is no terminal
    return folder, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2", "4"])
def test_nothing_is_left_to_compile(cache, threads):
    folder, _ = cache
    script = f"import numba\nnumba.set_num_threads({threads})\n" + USE
    assert run_script(script, NUMBA_CACHE_DIR=folder, NUMBA_NUM_THREADS="4").strip() == "0 []"


@pytest.mark.slow
def test_nothing_is_left_to_compile_for_another_threading_layer(cache):
    folder, _ = cache
    assert run_script(USE, NUMBA_CACHE_DIR=folder, NUMBA_THREADING_LAYER="workqueue") == "0 []\n"


@pytest.mark.slow
def test_a_new_kind_of_call_is_noticed(cache):
    # The tests above can fail: here are arguments that warmup says it leaves out.
    folder, _ = cache
    script = """
import numpy as np
from numba.core import event
import numbabn
x = np.ones((4, 4), np.float32)
with event.install_recorder("numba:compile") as recorder:
    numbabn.batch_norm(x, np.zeros(4, np.float32), np.ones(4, np.float32), residual=x)
print(len(recorder.buffer) > 0)
"""
    assert run_script(script, NUMBA_CACHE_DIR=folder).strip() == "True"


@pytest.mark.slow
def test_every_kernel_comes_along(cache):
    # Which kernels a shape needs is decided by `schedule`; none may have become out of reach.
    folder, _ = cache
    script = """
from numbabn.cpu import passes, small
import numbabn
numbabn.warmup()
for module in (passes, small):
    for name, item in vars(module).items():
        stats = getattr(item, "stats", None)
        if stats is not None and stats.cache_path and not item.signatures:
            print(module.__name__, name)
"""
    assert run_script(script, NUMBA_CACHE_DIR=folder) == ""


# --- arguments and progress -------------------------------------------------------------------


@pytest.mark.slow
def test_progress_counts_up_and_threads_come_back(set_threads):
    set_threads(1)
    calls = []
    numbabn.warmup("float32", iter(["columns", "columns"]), progress=lambda *c: calls.append(c))
    done, totals, what = zip(*calls, strict=True)
    assert done == tuple(range(len(calls)))
    assert set(totals) == {len(calls) - 1}
    assert all(text.startswith("float32, columns: ") for text in what[:-1])
    assert what[-1] == ""
    assert numbabn.get_num_threads() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtypes": ["float32", "float8"]}, "dtypes: expected some of .*bfloat16, got 'float8'"),
        ({"dtypes": "int8"}, "dtypes: .* got 'int8'"),
        ({"layouts": ["rows"]}, "layouts: expected some of planes, columns, got 'rows'"),
        ({"layouts": [1]}, "layouts: .* got 1"),
    ],
)
def test_nonsense_is_refused_before_anything_is_compiled(arguments, message):
    steps = []
    with pytest.raises(ValueError, match=message):
        numbabn.warmup(**arguments, progress=lambda *call: steps.append(call))
    assert steps == []


def test_an_exception_in_progress_ends_it_and_threads_come_back(set_threads):
    set_threads(1)

    def stop(done, total, what):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        numbabn.warmup(progress=stop)
    assert numbabn.get_num_threads() == 1


# --- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--dtypes", "float8"], "float8"),
        (["--dtypes"], "--dtypes"),
        (["--layouts", "planes", "rows"], "rows"),
        (["--nonsense"], "--nonsense"),
        (["float32"], "float32"),
    ],
)
def test_command_refuses_nonsense_in_one_line(capsys, arguments, named):
    with pytest.raises(SystemExit) as stopped:
        main(["warmup", *arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert named in printed.err


def test_command_without_ml_dtypes_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(SystemExit) as stopped:
        main(["warmup", "--dtypes", "bfloat16"])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert "ml_dtypes" in printed.err


@pytest.mark.slow
def test_command_tells_what_was_compiled(cache):
    folder, cold = cache
    warm = command([], NUMBA_CACHE_DIR=folder).stdout
    for printed, compiling in ((cold, True), (warm, False)):
        *groups, last = printed.splitlines()
        assert re.fullmatch(r"kernels are ready after \d+\.\d s", last)
        for layout, line in zip(("planes", "columns"), groups, strict=True):
            counts = rf"float32, {layout}: (\d+) kernels compiled, (\d+) loaded, \d+\.\d s"
            compiled, loaded = map(int, re.fullmatch(counts, line).groups())
            assert (compiled > 10, loaded > 10) == (compiling, not compiling)


@pytest.mark.slow
@pytest.mark.parametrize("tqdm", [True, False])
def test_command_shows_progress_on_a_terminal(cache, tmp_path, tqdm):
    termios = pytest.importorskip("termios")
    if tqdm:
        pytest.importorskip("tqdm")
    else:
        (tmp_path / "tqdm.py").write_text("raise ImportError")
    import fcntl
    import pty
    import struct

    # What a terminal of 100 columns is shown, while stdout goes elsewhere.
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    try:
        done = command(
            ["--layouts", "columns"],
            NUMBA_CACHE_DIR=cache[0],
            PYTHONPATH=str(tmp_path),
            stdout=subprocess.PIPE,
            stderr=theirs,
        )
        os.set_blocking(ours, False)
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"kernels are ready" in done.stdout
    counts = [int(n) for n in re.findall(r"(\d+)/16", shown)]
    assert counts == sorted(counts)
    assert counts[-1] == 16
    assert ("%|" in shown) == tqdm
    assert "float32, columns: training" in shown
