"""Values from elsewhere: tensors and arrays as NumPy arrays, and state dictionaries.

`load_state` copies a state dictionary in PyTorch's form into a layer's arrays, all of it or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numbabn import checks
from numbabn.backends import device

__all__ = ["IncompatibleKeys", "host_array", "load_state"]


class IncompatibleKeys(NamedTuple):
    """What `load_state` did not find, and what it found and had no place for."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def host_array(value: Any) -> NDArray[Any]:
    """``value`` as a NumPy array, also where it is a PyTorch tensor that NumPy refuses.

    NumPy refuses a tensor that requires a gradient, is on a GPU, or is of dtype bfloat16.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        try:
            return np.asarray(value)
        except TypeError:
            value = value.float()  # exact for every floating dtype that NumPy lacks
    return np.asarray(value)


def load_state(
    own: Mapping[str, Any],
    state: Mapping[str, Any],
    prefix: str,
    strict: bool,
    optional: tuple[str, ...] = (),
) -> IncompatibleKeys:
    """Copy the values of ``state`` into the arrays ``own``: all of them, or after an error none.

    Parameters
    ----------
    own : mapping of str to array
        The arrays to write to, NumPy or CUDA ones, by name without prefix.
    state : mapping of str to array_like
        New values, by name with prefix; other keys are not looked at.
    prefix : str
        For example ``"bn1."``.
    strict : bool
        Whether missing and unexpected keys are errors.
    optional : tuple of str
        Names that may be missing.

    Returns
    -------
    IncompatibleKeys
        With prefix; both lists are empty when ``strict``.

    Raises
    ------
    TypeError
        If ``state`` is not a mapping, or a value does not hold real numbers.
    ValueError
        If a shape does not fit, a value for an integer array is not a whole number, or an array of
        ``own`` is read-only; with ``strict``, if keys are missing or unexpected.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a mapping, got {type(state).__name__}")
    keys = [key for key in state if isinstance(key, str) and key.startswith(prefix)]
    names = {key[len(prefix) :] for key in keys}
    missing = [prefix + name for name in own if name not in names and name not in optional]
    unexpected = [key for key in keys if key[len(prefix) :] not in own]
    if strict and (missing or unexpected):
        raise ValueError(
            f"state: expected the keys {', '.join(prefix + name for name in own)}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unexpected: {', '.join(unexpected)}" if unexpected else "")
        )
    # Everything that can fail comes before the first write.
    values = {
        name: _fitted(prefix + name, state[prefix + name], array)
        for name, array in own.items()
        if name in names
    }
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            own[name][...] = value
        else:
            value.write()
    return IncompatibleKeys(missing, unexpected)


def _fitted(key: str, value: Any, own: Any) -> Any:
    """``value`` in the shape and dtype of the array it is for, or an error that names the key.

    For an array on a CUDA device it is what will write to it.
    """
    if checks.is_cuda(own):
        return device().Assignment(key, value, own)
    if checks.is_cuda(value) and not hasattr(value, "detach"):
        raise TypeError(
            f"{key}: expected values on the host like the layer's array, got a CUDA array; copy "
            "it to the host first, or give the layer CUDA arrays"
        )
    array = host_array(value)
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise TypeError(f"{key}: expected real numbers, got dtype {array.dtype}")
    if own.ndim == 0 and array.shape == (1,):
        array = array.reshape(())  # how PyTorch before 0.4 saved a scalar
    if array.shape != own.shape:
        raise ValueError(f"{key}: expected shape {own.shape}, got {array.shape}")
    with np.errstate(over="ignore", invalid="ignore"):  # too large for a half type: infinity
        result = array.astype(own.dtype)
    if own.dtype.kind == "i" and (result != array).any():
        raise ValueError(f"{key}: expected a whole number, got {array}")
    if not own.flags.writeable:
        raise ValueError(f"{key}: expected an array to write to, the layer's is read-only")
    return result
