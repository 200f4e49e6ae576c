"""``import numbabn`` is cheap: it compiles nothing and imports nothing that a call may not need."""

import pytest
from support import run_script

pytestmark = pytest.mark.slow


def test_compiles_nothing():
    script = """
import gc
from numba.core import event
from numba.core.dispatcher import Dispatcher

with event.install_recorder("numba:compile") as recorder:
    import numbabn
    import numbabn.cpu  # the kernels, which only the first call needs
dispatchers = [o for o in gc.get_objects() if isinstance(o, Dispatcher)]
ours = [d for d in dispatchers if d.py_func.__module__.startswith("numbabn")]
print(len(recorder.buffer), [d.py_func.__name__ for d in ours if d.signatures], bool(ours))
"""
    # The last word: this looks at the dispatchers of a real package, not at none.
    assert run_script(script).strip() == "0 [] True"


def test_imports_no_more_than_numba_and_numpy():
    # Modules of other packages that are there after `import numbabn` and not after Numba's own.
    script = """
import sys
import numba, numpy
before = {name.partition(".")[0] for name in sys.modules}
cuda = any(name.startswith("numba.cuda") for name in sys.modules)
import numbabn
after = {name.partition(".")[0] for name in sys.modules}
print(sorted(after - before - set(sys.stdlib_module_names) - {"numbabn"}))
print(any(name.startswith(("numba.cuda", "numba_cuda")) for name in sys.modules) and not cuda)
print(any(name.startswith(("numbabn.cuda", "numbabn.distributed")) for name in sys.modules))
"""
    assert run_script(script).splitlines() == ["[]", "False", "False"]


@pytest.mark.parametrize("missing", ["torch", "ml_dtypes", "scipy", "cupy"])
def test_works_without(missing):
    # None in sys.modules makes any later import of that name fail.
    script = f"""
import sys
sys.modules[{missing!r}] = None
import numpy as np
import numbabn
x = np.arange(6, dtype=np.float32).reshape(3, 2)
print(numbabn.batch_norm(x, None, None, training=True).mean())
"""
    assert abs(float(run_script(script))) < 1e-6


def test_public_names():
    script = """
import numbabn
missing = [name for name in numbabn.__all__ if not hasattr(numbabn, name)]
print(missing, sorted(set(numbabn.__all__) - set(dir(numbabn))))
"""
    assert run_script(script).strip() == "[] []"
