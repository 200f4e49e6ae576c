"""What the tests of bad input share: values of the wrong kind, and what an error must be like."""

import re

import numpy as np

ERRORS = (ValueError, TypeError)


class CudaArray:
    """What an array on a GPU looks like from outside."""

    shape, ndim, dtype = (3,), 1, np.dtype(np.float32)

    @property
    def __cuda_array_interface__(self):
        data = (0x7F0000000000, False)
        return {"shape": self.shape, "typestr": "<f4", "data": data, "version": 3, "strides": None}


def message_names(error, argument, *pieces):
    """The message names ``argument``, says what was expected and holds all of ``pieces``."""
    message = str(error.value)
    assert re.search(rf"\b{argument}\b", message), message
    assert "expected" in message.lower(), message
    for piece in pieces:
        assert piece.lower() in message.lower(), message


def snapshot(*arrays):
    """Copies of the arrays' whole memory, to compare with later."""
    owners = []
    for a in arrays:
        if isinstance(a, np.ndarray):
            while isinstance(a.base, np.ndarray):
                a = a.base
            owners.append((a, a.tobytes()))
    return owners


def assert_unchanged(before):
    for owner, content in before:
        assert owner.tobytes() == content


# Values that are not arrays of real floating-point numbers, and what a message must show of them.
NOT_FLOATS = {
    "int": (lambda shape: np.ones(shape, np.int32), "int32"),
    "bool": (lambda shape: np.ones(shape, bool), "bool"),
    "complex": (lambda shape: np.ones(shape, np.complex64), "complex64"),
    "object": (lambda shape: np.ones(shape, object), "object"),
    "string": (lambda shape: np.full(shape, "1"), "<U1"),
    "list": (lambda shape: np.ones(shape).tolist(), "list"),
    "number": (lambda shape: 1.0, "float"),
    "gpu": (lambda shape: CudaArray(), "cuda"),
}
