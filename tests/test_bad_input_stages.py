"""Bad input to the stages and to the settings, by the same rules as for the two passes."""

import numba
import numpy as np
import pytest
from bad_values import ERRORS, NOT_FLOATS, assert_unchanged, message_names, snapshot

import numbabn

SHAPE = (4, 3, 5, 6)
VECTORS = {
    "normalize": ["scale", "shift"],
    "batch_norm_backward_reduce": ["mean", "invstd"],
    "batch_norm_backward_elemt": ["mean", "invstd", "weight", "sum_dy", "sum_dy_xmu"],
}


def arguments(function):
    """Good arguments of a stage by name."""
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    good = {"x": x}
    if function.startswith("batch_norm_backward"):
        good["grad_output"] = x[::-1].copy()
    kept = np.float32 if function == "normalize" else np.float64
    good |= {name: np.full(3, 0.5, kept) for name in VECTORS.get(function, [])}
    if "weight" in good:
        good |= {"weight": np.ones(3, np.float32), "count": 120}
    return good


STAGES = ["batch_norm_stats", *VECTORS]
EACH_VECTOR = pytest.mark.parametrize(
    ("function", "name"), [(function, name) for function in VECTORS for name in VECTORS[function]]
)


def assert_fails(function, argument, *pieces, **changes):
    given = {**arguments(function), **changes}
    before = snapshot(*given.values())
    with pytest.raises(ERRORS) as error:
        getattr(numbabn, function)(**given)
    message_names(error, argument, *pieces)
    assert_unchanged(before)


@pytest.mark.parametrize("function", STAGES)
def test_good_arguments_are_good(function):
    # Otherwise every test below could pass for the wrong reason.
    getattr(numbabn, function)(**arguments(function))


@pytest.mark.parametrize("function", STAGES)
@pytest.mark.parametrize("kind", ["int", "complex", "object", "list"])
def test_x_of_no_float_dtype(function, kind):
    make, piece = NOT_FLOATS[kind]
    assert_fails(function, "x", piece, x=make(SHAPE))


@pytest.mark.parametrize("function", STAGES)
def test_channel_axis_out_of_range(function):
    assert_fails(function, "channel_axis", "4", channel_axis=4)


@EACH_VECTOR
@pytest.mark.parametrize("shape", [(4,), (3, 1), ()])
def test_vector_of_the_wrong_shape(function, name, shape):
    assert_fails(function, name, "(3,)", str(shape), **{name: np.ones(shape)})


@EACH_VECTOR
@pytest.mark.parametrize("kind", ["complex", "gpu"])
def test_vector_of_no_float_dtype(function, name, kind):
    make, piece = NOT_FLOATS[kind]
    assert_fails(function, name, piece, **{name: make(3)})


@pytest.mark.parametrize("function", ["batch_norm_backward_reduce", "batch_norm_backward_elemt"])
@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 6, 5), (3,)])
def test_grad_output_of_the_wrong_shape(function, shape):
    grad = np.ones(shape, np.float32)
    assert_fails(function, "grad_output", str(SHAPE), str(shape), grad_output=grad)


@pytest.mark.parametrize("count", [0, -1, np.nan, None, "120"])
def test_count(count):
    assert_fails("batch_norm_backward_elemt", "count", count=count)


@pytest.mark.parametrize("function", ["normalize", "batch_norm_backward_elemt"])
def test_out(function):
    assert_fails(function, "out", "(5,)", out=np.zeros(5, np.float32))
    assert_fails(function, "out", "float64", out=np.zeros(SHAPE))
    read_only = np.zeros(SHAPE, np.float32)
    read_only.flags.writeable = False
    assert_fails(function, "out", "read-only", out=read_only)


def test_normalize_options():
    assert_fails("normalize", "activation", "relu", "'gelu'", activation="gelu")
    assert_fails("normalize", "residual", "(3,)", residual=np.ones(3, np.float32))


@pytest.mark.parametrize("n", [0, -1, numba.config.NUMBA_NUM_THREADS + 1])
def test_number_of_threads_out_of_range(n, set_threads):
    before = numbabn.get_num_threads()
    with pytest.raises(ValueError, match=rf"\bn\b.*{n}"):
        set_threads(n)
    assert numbabn.get_num_threads() == before


@pytest.mark.parametrize("n", [None, "2", 1.5])
def test_number_of_threads_that_is_no_integer(n, set_threads):
    with pytest.raises(TypeError, match=r"\bn\b"):
        set_threads(n)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_number_of_threads(n, set_threads):
    if n > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("NUMBA_NUM_THREADS is too low")
    set_threads(n)
    assert numbabn.get_num_threads() == n
