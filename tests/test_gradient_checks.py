"""The checks of ``grad_output`` say the same for NumPy and for CUDA arrays."""

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
from cuda_arrays import Gpu, install

import numbabn

X = np.zeros((4, 3, 6), np.float32)
BAD = {
    "shape": np.zeros((4, 3, 5), np.float32),
    "dtype": np.zeros((4, 3, 6)),
    "layout": np.zeros((4, 6, 3), np.float32).transpose(0, 2, 1),
}


@pytest.mark.parametrize("case", BAD)
def test_same_error_on_both(monkeypatch, case):
    gpu, errors = install(monkeypatch, Gpu()), []
    for put in (np.asarray, gpu.to):
        zeros, ones = (put(f(3, np.float32)) for f in (np.zeros, np.ones))
        _, saved = numbabn.batch_norm_forward(put(X), zeros, ones, training=False)
        with pytest.raises((TypeError, ValueError), match=f"grad_output: .* {case}") as caught:
            numbabn.batch_norm_backward(put(BAD[case]), saved)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
