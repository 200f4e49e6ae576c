"""The pool where processes fork, and where they end."""

import os

import pytest
from support import run_script

pytestmark = pytest.mark.slow

PREPARE = """
import os, sys, threading
import numpy as np
import numbabn
from numbabn import pool
x = np.ones((8, 64, 32, 32), np.float32)
def take(value):
    y = numbabn.batch_norm(x * value, np.zeros(64, np.float32), np.ones(64, np.float32), eps=0.0)
    return y
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_fork_each_process_writes_to_its_own_memory():
    # One array is in use at the fork and one block idle; the pipes make the two take turns.
    script = """
used, idle = take(1.0), take(2.0)
where = idle.__array_interface__["data"][0]
del idle
to_child, to_parent = os.pipe(), os.pipe()
pid = os.fork()
os.close(to_child[0] if pid else to_child[1])
os.close(to_parent[1] if pid else to_parent[0])
name = 2.0 if pid else 3.0
mine = take(name)
assert mine.__array_interface__["data"][0] == where, "both take the block that was idle"
used[...] = name * 10
def turn():
    if pid:
        os.write(to_child[1], b"x"); assert os.read(to_parent[0], 1), "the child is gone"
    else:
        assert os.read(to_child[0], 1); os.write(to_parent[1], b"x")
for _ in range(3):
    turn()
    assert (mine == name).all() and (used == name * 10).all()
    mine = None
    mine = take(name)
    used[...] = name * 10
turn()
del mine, used
numbabn.clear_pool()
if pid == 0:
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run_script(PREPARE + script, timeout=100).strip() == "0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_while_another_thread_holds_the_lock():
    script = """
y = take(1.0)
pool._pool.lock.acquire()
pid = os.fork()
if pid == 0:
    import signal
    signal.alarm(20)  # ends the child if it waits for a lock whose holder is not there
    del y
    z = take(2.0)
    numbabn.set_pool_limit(0)
    numbabn.clear_pool()
    os._exit(0)
pool._pool.lock.release()
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run_script(PREPARE + script, timeout=100).strip() == "0"


ENDS = {
    "module": "kept = take(1.0)",
    "cycle": "class A: pass\na = A(); a.me = a; a.y = take(1.0)",
    "another module": "sys.kept = take(1.0)",
    "daemon thread": """
def work():
    y = take(1.0)
    while True:
        y = take(2.0)
threading.Thread(target=work, daemon=True).start()
import time; time.sleep(0.2)""",
    "taken at exit": "import atexit; atexit.register(lambda: take(1.0))",
    "taken in a finalizer": """
class A:
    def __del__(self):
        self.y = take(1.0)
take(1.0)
a = A(); a.me = a""",
}


@pytest.mark.parametrize("kind", ENDS)
def test_the_end_of_the_process_is_silent(kind):
    script = f"""
import subprocess
done = subprocess.run([sys.executable, "-c", {PREPARE + ENDS[kind]!r}],
                      capture_output=True, text=True)
print([done.returncode, done.stdout, done.stderr])
"""
    assert run_script(PREPARE + script, timeout=100).strip() == "[0, '', '']"
