"""Bad input to the two passes: the error's type, its message, and that nothing is written.

Every message must name the argument, say what was expected and what came.
"""

import numba
import numpy as np
import pytest
from bad_values import ERRORS, NOT_FLOATS, CudaArray, assert_unchanged, message_names, snapshot
from grid import MODES
from numba.extending import intrinsic
from support import ARRANGEMENTS, channels_last, problem

import numbabn

SHAPE = (4, 3, 5, 6)
EACH_KIND = pytest.mark.parametrize("kind", NOT_FLOATS)
EACH_PARAMETER = pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])


def assert_forward_fails(p, argument, *pieces, functions=("batch_norm", "forward"), **changes):
    """Both forward functions raise for ``p`` with ``changes``, and write nothing."""
    out = changes.pop("out", None)
    if out is None and isinstance(p.x, np.ndarray):
        out = np.full_like(p.x, 77)
    before = snapshot(*p.arrays, out, p.options["residual"])
    for function in functions:
        with pytest.raises(ERRORS) as error:
            getattr(p, function)(out=out, **changes)
        message_names(error, argument, *pieces)
        assert_unchanged(before)


@MODES
@pytest.mark.parametrize("kind", [k for k in NOT_FLOATS if k != "gpu"])
def test_x_of_no_float_dtype(kind, training):
    p = problem(SHAPE, training=training)
    make, piece = NOT_FLOATS[kind]
    p.x = make(SHAPE)
    assert_forward_fails(p, "x", piece)


@MODES
@pytest.mark.parametrize("shape", [(), (4,)])
def test_x_of_too_low_a_rank(shape, training):
    p = problem(SHAPE, training=training)
    p.x = np.ones(shape, np.float32)
    assert_forward_fails(p, "x", str(shape))


@MODES
@pytest.mark.parametrize("axis", [4, -5, 100])
def test_channel_axis_out_of_range(axis, training):
    p = problem(SHAPE, training=training)
    assert_forward_fails(p, "channel_axis", str(axis), channel_axis=axis)


@pytest.mark.parametrize("axis", [1.0, "1", None, (1,)])
def test_channel_axis_that_is_no_integer(axis):
    assert_forward_fails(problem(SHAPE), "channel_axis", channel_axis=axis)


@MODES
@EACH_PARAMETER
@pytest.mark.parametrize("shape", [(4,), (2,), (0,), (3, 1), (1, 3), ()])
def test_parameter_of_the_wrong_shape(name, shape, training):
    p = problem(SHAPE, training=training)
    setattr(p, name, np.ones(shape, np.float32))
    assert_forward_fails(p, name, "(3,)", str(shape))


@MODES
@EACH_PARAMETER
@EACH_KIND
def test_parameter_of_no_float_dtype(name, kind, training):
    p = problem(SHAPE, training=training)
    make, piece = NOT_FLOATS[kind]
    setattr(p, name, make(3))
    assert_forward_fails(p, name, piece)


def test_channel_count_of_another_axis():
    # The parameters fit the default axis, and not the one that is named.
    assert_forward_fails(problem(SHAPE), "running_mean", "(6,)", "(3,)", channel_axis=-1)


@pytest.mark.parametrize(
    "missing", [["running_mean"], ["running_var"], ["running_mean", "running_var"]]
)
def test_eval_without_running_statistics(missing):
    p = problem(SHAPE, training=False)
    for name in missing:
        setattr(p, name, None)
    assert_forward_fails(p, missing[0], "None")


@pytest.mark.parametrize(
    ("shape", "axis"), [((1, 3), 1), ((1, 3, 1, 1), 1), ((1, 1, 3), -1), ((7, 1), 0), ((1, 1), 1)]
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_value_per_channel_in_training(shape, axis, dtype):
    p = problem(shape, dtype, training=False, channel_axis=axis)
    p.batch_norm()  # fine in eval
    p.options["training"] = True
    before = snapshot(*p.arrays)
    for function in (p.batch_norm, p.forward):
        out = np.full_like(p.x, 77)
        with pytest.raises(
            ValueError, match="Expected more than 1 value per channel when training"
        ) as e:
            function(out=out)
        assert str(shape) in str(e.value)
        assert (out == 77).all()
        assert_unchanged(before)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("function", ["batch_norm", "forward"])
def test_running_statistics_made_read_only_after_a_first_call(function, name):
    # Whatever is remembered of the first call must not stand in for looking again.
    p = problem(SHAPE, training=True)
    getattr(p, function)()
    getattr(p, name).flags.writeable = False
    assert_forward_fails(p, name, "read-only", functions=(function,))


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_read_only_running_statistics_in_training(name):
    p = problem(SHAPE)
    getattr(p, name).flags.writeable = False
    assert_forward_fails(p, name, "read-only")


@MODES
@pytest.mark.parametrize("momentum", [np.nan, np.inf, -np.inf, None, "0.1", 1j, [0.1]])
def test_momentum(momentum, training):
    assert_forward_fails(problem(SHAPE, training=training), "momentum", momentum=momentum)


@MODES
@pytest.mark.parametrize("eps", [-1e-9, -1, np.nan, np.inf, None, "1e-5", 1j])
def test_eps(eps, training):
    assert_forward_fails(problem(SHAPE, training=training), "eps", eps=eps)


@MODES
@pytest.mark.parametrize("activation", ["gelu", "", 1, np.maximum])
def test_activation(activation, training):
    p = problem(SHAPE, training=training)
    assert_forward_fails(p, "activation", "relu", repr(activation), activation=activation)


@MODES
@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 6, 5), (1, 3, 5, 6), (3,)])
def test_residual_of_the_wrong_shape(shape, training):
    p = problem(SHAPE, training=training)
    residual = np.ones(shape, np.float32)
    assert_forward_fails(p, "residual", str(SHAPE), str(shape), residual=residual)


@MODES
@EACH_KIND
def test_residual_of_no_float_dtype(kind, training):
    make, piece = NOT_FLOATS[kind]
    p = problem(SHAPE, training=training)
    assert_forward_fails(p, "residual", piece, residual=make(SHAPE))


@MODES
def test_residual_of_another_dtype(training):
    p = problem(SHAPE, training=training)
    residual = np.ones(SHAPE, np.float64)
    assert_forward_fails(p, "residual", "float32", "float64", residual=residual)


@MODES
@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 6, 5), (5, 3, 5, 6), (4, 3, 30)])
def test_out_of_the_wrong_shape(shape, training):
    p = problem(SHAPE, training=training)
    out = np.full(shape, 77, np.float32)
    assert_forward_fails(p, "out", str(SHAPE), str(shape), out=out)


@MODES
@pytest.mark.parametrize("dtype", ["float64", "float16", "int32"])
def test_out_of_the_wrong_dtype(dtype, training):
    p = problem(SHAPE, training=training)
    assert_forward_fails(p, "out", dtype, out=np.full(SHAPE, 77, dtype))


@MODES
@pytest.mark.parametrize(
    ("layout", "out_layout"),
    [
        ("contiguous", "channels_last"),
        ("channels_last", "contiguous"),
        ("contiguous", "fortran"),
        ("contiguous", "every_second"),
        ("contiguous", "reversed"),
        ("channels_last", "cropped_channels"),
    ],
)
def test_out_of_another_layout(layout, out_layout, training):
    p = problem(SHAPE, training=training, arrange=ARRANGEMENTS[layout])
    out = ARRANGEMENTS[out_layout](np.full(SHAPE, 77, np.float32))
    assert_forward_fails(p, "out", out=out)


@MODES
@pytest.mark.parametrize("kind", ["list", "number", "gpu"])
def test_out_that_is_no_array(kind, training):
    make, piece = NOT_FLOATS[kind]
    assert_forward_fails(problem(SHAPE, training=training), "out", piece, out=make(SHAPE))


@MODES
def test_out_read_only(training):
    out = ARRANGEMENTS["read_only"](np.full(SHAPE, 77, np.float32))
    assert_forward_fails(problem(SHAPE, training=training), "out", "read-only", out=out)


@MODES
@pytest.mark.parametrize("offset", [1, 6, 90])
@pytest.mark.parametrize("of", ["x", "residual"])
def test_out_that_overlaps_an_input(of, offset, training):
    # Shifted against it: a value would be overwritten before it is read.
    p = problem(SHAPE, training=training, residual=True)
    memory = np.zeros(p.x.size + offset, np.float32)
    shared = memory[: p.x.size].reshape(SHAPE)
    if of == "x":
        shared[...] = p.x
        p.x = shared
    else:
        shared[...] = p.options["residual"]
        p.options["residual"] = shared
    assert_forward_fails(p, "out", of, out=memory[offset:].reshape(SHAPE))


@intrinsic
def _pointer(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return numba.types.voidptr(numba.types.intp), codegen


@numba.njit
def foreign(address, size):
    """Bytes in memory that the array neither owns nor knows an owner of, as `carray` makes it."""
    return numba.carray(_pointer(address), (size,), np.uint8)


@MODES
@pytest.mark.parametrize("shape", [SHAPE, (40, 32, 7, 11)], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_out_over_the_memory_of_an_input_that_nobody_is_known_to_own(dtype, shape, training):
    p = problem(shape, dtype, training=training)
    size = p.x.size
    memory = np.zeros(2 * size + 100, dtype)

    def at(offset):
        array = foreign(memory.ctypes.data + offset * memory.itemsize, memory.itemsize * size)
        assert array.base is None
        array.dtype, array.shape = dtype, shape  # in place: a view would have a base
        return array

    expected, given = p.forward()[0], p.x
    p.x = at(0)
    p.x[...] = given
    np.testing.assert_array_equal(p.forward(out=at(size + 100))[0], expected)
    assert_forward_fails(p, "out", "x", out=at(100), functions=["forward"])
    saved = p.forward()[1]
    assert_backward_fails(p, "out", "x", out=at(size - 1), saved=saved)


@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_forward_in_place(layout, training):
    # The backward pass needs x as it was.
    p = problem(SHAPE, training=training, arrange=ARRANGEMENTS[layout])
    assert_forward_fails(p, "out", "x", out=p.x, functions=["forward"])
    assert_forward_fails(p, "out", "x", out=p.x[...], functions=["forward"])


def assert_backward_fails(p, argument, *pieces, grad_output=None, saved=None, **changes):
    _, real = p.forward()
    grad_output = p.grad_output if grad_output is None else grad_output
    saved = real if saved is None else saved
    before = snapshot(p.x, grad_output, changes.get("out"))
    with pytest.raises(ERRORS) as error:
        numbabn.batch_norm_backward(grad_output, saved, **changes)
    message_names(error, argument, *pieces)
    assert_unchanged(before)


@MODES
@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 6, 5), (1, 3, 5, 6), (3,), ()])
def test_grad_output_of_the_wrong_shape(shape, training):
    p = problem(SHAPE, training=training)
    grad = np.ones(shape, np.float32)
    assert_backward_fails(p, "grad_output", str(SHAPE), str(shape), grad_output=grad)


@MODES
@EACH_KIND
def test_grad_output_of_no_float_dtype(kind, training):
    make, piece = NOT_FLOATS[kind]
    p = problem(SHAPE, training=training)
    assert_backward_fails(p, "grad_output", piece, grad_output=make(SHAPE))


@MODES
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_grad_output_of_another_dtype(dtype, training):
    p = problem(SHAPE, training=training)
    grad = np.ones(SHAPE, dtype)
    assert_backward_fails(p, "grad_output", "float32", dtype, grad_output=grad)


@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_grad_output_of_another_layout(layout, training):
    p = problem(SHAPE, training=training, arrange=ARRANGEMENTS[layout])
    other = np.ascontiguousarray if layout == "channels_last" else channels_last
    assert_backward_fails(p, "grad_output", "layout", grad_output=other(p.grad_output))


@MODES
@pytest.mark.parametrize("saved", ["saved", 1, (1, 2), np.ones(3)])
def test_saved_that_is_none_of_ours(saved, training):
    p = problem(SHAPE, training=training)
    assert_backward_fails(p, "saved", type(saved).__name__, saved=saved)


@MODES
@pytest.mark.parametrize("needs", [True, None, (True, True), (True,) * 4, ()])
def test_needs(needs, training):
    assert_backward_fails(problem(SHAPE, training=training), "needs", needs=needs)


@MODES
@pytest.mark.parametrize(
    ("make", "pieces"),
    [
        (lambda: np.full((4, 3, 6, 5), 77, np.float32), [str(SHAPE), "(4, 3, 6, 5)"]),
        (lambda: np.full(SHAPE, 77, np.float64), ["float32", "float64"]),
        (lambda: channels_last(np.full(SHAPE, 77, np.float32)), []),
        (lambda: ARRANGEMENTS["every_second"](np.full(SHAPE, 77, np.float32)), []),
        (lambda: ARRANGEMENTS["read_only"](np.full(SHAPE, 77, np.float32)), ["read-only"]),
        (lambda: np.full(SHAPE, 77, np.float32).tolist(), ["list"]),
        (CudaArray, ["cuda"]),
    ],
    ids=["shape", "dtype", "layout", "strides", "read-only", "list", "gpu"],
)
def test_backward_out(make, pieces, training):
    assert_backward_fails(problem(SHAPE, training=training), "out", *pieces, out=make())


@MODES
@pytest.mark.parametrize("of", ["x", "grad_output"])
def test_backward_out_that_overlaps_an_input(of, training):
    p = problem(SHAPE, training=training)
    memory = np.zeros(p.x.size + 6, np.float32)
    shared = memory[: p.x.size].reshape(SHAPE)
    shared[...] = getattr(p, of)
    setattr(p, of, shared)
    assert_backward_fails(p, "out", of, out=memory[6:].reshape(SHAPE))
