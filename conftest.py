"""What pytest leaves out where numba-cuda is not installed: what cannot be imported then."""

import importlib.util

_CUDA = ["numbabn/cuda/*", "numbabn/device.py", "tests/cuda_*"]
collect_ignore_glob = [] if importlib.util.find_spec("numba_cuda") else _CUDA
