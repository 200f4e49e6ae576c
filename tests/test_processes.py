"""Processes in which threads go wrong: after a fork, and on a threading layer that is not safe.

GNU OpenMP ends a forked child at its first parallel region, if the parent had run one; Numba's
workqueue layer ends a process in which two Python threads run parallel kernels at once. Each
script is therefore a process of its own.
"""

import os

import pytest
from support import run_script

pytestmark = pytest.mark.slow

PREPARE = """
import os
import numpy as np
import numbabn

rng = np.random.default_rng(0)
inputs = [
    (rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32))
    for shape in [(16, 32, 56, 56), (20_000, 48), (3, 5)]
]

def run():
    results = []
    for x, dy in inputs:
        C = x.shape[1]
        for training in (True, False):
            y, saved = numbabn.batch_norm_forward(
                x, np.zeros(C, np.float32), np.ones(C, np.float32), training=training
            )
            results += [y, *numbabn.batch_norm_backward(dy, saved)]
    return results

def check(results):
    assert all(np.array_equal(a, b) for a, b in zip(results, expected))

expected = run()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_parallel_work():
    script = """
import sys
children = []
for _ in range(2):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check(run())
            status = 0
        finally:
            os._exit(status)
    children.append(pid)
statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
check(run())
print("children", statuses)
"""
    assert run_script(PREPARE + script).strip() == "children [0, 0]"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_multiprocessing_pool_after_parallel_work():
    script = """
import multiprocessing

def work(_):
    check(run())
    return "same"

with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(work, range(4)))
"""
    assert run_script(PREPARE + script).strip() == str(["same"] * 4)


THREADS = """
import threading

start, wrong = threading.Barrier(3), []

def work():
    start.wait()
    try:
        for _ in range(10):
            check(run())
    except BaseException as error:
        wrong.append(error)

threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("wrong", wrong)
"""


@pytest.mark.parametrize("layer", ["workqueue", "omp", "default"])
def test_python_threads_on_any_threading_layer(layer):
    if layer == "omp":
        pytest.importorskip("numba.np.ufunc.omppool")
    assert run_script(PREPARE + THREADS, NUMBA_THREADING_LAYER=layer).strip() == "wrong []"


def test_one_thread_gives_the_bits_that_four_give():
    # Also when Numba is held to one thread from the start.
    script = PREPARE + "import hashlib\nprint([hashlib.md5(a).hexdigest() for a in expected])"
    assert run_script(script, NUMBA_NUM_THREADS="1") == run_script(script, NUMBA_NUM_THREADS="4")
