"""The public API on CUDA arrays, end to end, without a GPU.

Arrays are those of `cuda_arrays`, whose launches an interpreter of PTX executes: so what runs is
the code that a GPU would run, launched as it would be launched.
"""

import numpy as np
import pytest
from support import ARRANGEMENTS, assert_close, problem, run_script, wide

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
from cuda_arrays import Gpu, InterfaceArray, install
from grid import MODES

import numbabn
from numbabn.cuda import launch, libraries

# One of each kind of kernel: a channel in a block, several blocks, columns, short planes.
SHAPES = [
    ((3, 5, 16, 16), 1),
    ((2, 3, 9, 113), 1),
    ((70, 24), 1),
    ((9, 7, 7, 7), 1),
    ((4, 5, 6), -1),
]
DTYPES = ("float32", "float64", "float16", "bfloat16")


@pytest.fixture
def gpu(monkeypatch):
    return install(monkeypatch, Gpu())


class OnGpu:
    """A `Problem`'s arrays on a `Gpu`."""

    def __init__(self, gpu, p, **options):
        self.gpu, self.problem = gpu, p
        train = p.options["training"]
        self.x, self.dy = gpu.to(p.x, **options), gpu.to(p.grad_output, **options)
        self.weight, self.bias = gpu.to(p.weight), gpu.to(p.bias)
        self.mean, self.var = (gpu.to(a, writable=train) for a in (p.running_mean, p.running_var))
        self.options = {**p.options, "residual": gpu.to(p.options["residual"], **options)}

    @property
    def arrays(self):
        return self.x, self.mean, self.var, self.weight, self.bias

    def forward(self, **changes):
        return numbabn.batch_norm_forward(*self.arrays, **{**self.options, **changes})

    def batch_norm(self, **changes):
        return numbabn.batch_norm(*self.arrays, **{**self.options, **changes})


def check(gpu, p, **options):
    """Both passes against the reference, and everything about what comes out."""
    expected, given = p.expected(), OnGpu(gpu, p, **options)
    old = [wide(a) for a in (p.running_mean, p.running_var)]
    axis = p.channel_axis
    y, saved = given.forward()
    assert type(y) is type(given.x)
    assert (y.dtype, y.shape) == (p.x.dtype, p.x.shape)
    assert y.values.strides == given.x.values.strides
    assert_close(y.values, expected.y, scale=expected.y_scale, channel_axis=axis, what="y")
    pairs = ((given.mean, expected.running_mean), (given.var, expected.running_var))
    for (now, after), before in zip(pairs, old, strict=True):
        if now is not None and p.options["training"]:
            scale = np.abs(before) + np.abs(after - before)
            assert_close(now.values, after, scale=scale, what="running statistics")
    kind = np.float64 if p.x.dtype == np.float64 else np.float32
    kind = kind if p.weight is None else p.weight.dtype
    grads = numbabn.batch_norm_backward(given.dy, saved)
    assert [type(g) for g in grads] == [type(given.x)] * len(expected.grads)
    dx, dweight, dbias = (g.values for g in grads[:3])
    assert dx.strides == given.x.values.strides
    assert dweight.dtype == dbias.dtype == kind
    assert_close(dx, expected.grads[0], scale=expected.dx_scale, channel_axis=axis, what="dx")
    assert_close(dweight, expected.grads[1], scale=expected.dweight_terms, what="dweight")
    assert_close(dbias, expected.grads[2], scale=expected.dbias_terms, what="dbias")
    if len(grads) == 4:
        assert np.array_equal(wide(grads[3].values), expected.grads[3])
    np.testing.assert_allclose(saved.mean.values, expected.mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(saved.invstd.values, expected.invstd, rtol=1e-6)
    return given, y, saved, grads


@MODES
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_shapes(gpu, shape, axis, training):
    check(gpu, problem(shape, channel_axis=axis, training=training))


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 16, 16), (9, 7, 7, 7)], ids=str)
def test_dtypes_with_relu_and_residual(gpu, shape, dtype, training):
    check(gpu, problem(shape, dtype, training=training, activation="relu", residual=True))


@MODES
@pytest.mark.parametrize("affine", ["weight", "bias", "neither"])
def test_without_weight_or_bias(gpu, affine, training):
    check(gpu, problem((6, 5, 4), affine=affine, training=training, activation="relu"))


@MODES
@pytest.mark.parametrize("layout", ["channels_last", "fortran", "channels_first", "rotated"])
def test_memory_orders(gpu, layout, training):
    p = problem((3, 4, 5, 6), training=training, residual=True, arrange=ARRANGEMENTS[layout])
    check(gpu, p)


@MODES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dlpack", "old dlpack"])
def test_dlpack(monkeypatch, kind, dtype, training):
    gpu = install(monkeypatch, Gpu(kind))
    arrange = ARRANGEMENTS["channels_last"]
    check(gpu, problem((3, 4, 5, 6), dtype, training=training, arrange=arrange))
    assert set(gpu.dlpack_streams) == {1}  # the legacy default stream


@MODES
def test_address_that_is_not_a_multiple_of_16(gpu, training):
    check(gpu, problem((3, 5, 16, 16), training=training), offset=1)
    assert any("unaligned" in kernel.name for kernel, *_ in gpu.launches)


@MODES
@pytest.mark.parametrize("seed", [1, 2])
def test_order_of_blocks_and_warps(monkeypatch, seed, training):
    results = []
    for this in (0, seed):
        gpu = install(monkeypatch, Gpu(seed=this))
        _, y, _, grads = check(gpu, problem((2, 3, 9, 113), training=training))
        results.append([a.values.tobytes() for a in (y, *grads)])
    assert results[0] == results[1]


@MODES
@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_needs(gpu, needs, activation, training):
    p = problem((6, 5, 4), training=training, activation=activation)
    expected, given = p.expected(), OnGpu(gpu, p)
    _, saved = given.forward()
    before = len(gpu.launches)
    grads = numbabn.batch_norm_backward(given.dy, saved, needs=needs)
    assert [g is not None for g in grads] == [bool(n) for n in needs]
    if not any(needs):
        assert len(gpu.launches) == before
    scales = (expected.dx_scale, expected.dweight_terms, expected.dbias_terms)
    for got, wanted, scale, axis in zip(
        grads, expected.grads, scales, (1, None, None), strict=True
    ):
        if got is not None:
            assert_close(got.values, wanted, scale=scale, channel_axis=axis)


@MODES
def test_out(gpu, training):
    p = problem((3, 4, 5, 6), training=training, residual=True, activation="relu")
    expected, given = p.expected(), OnGpu(gpu, p)
    out, dx = (gpu.to(np.zeros_like(p.x), writable=True) for _ in range(2))
    y, saved = given.forward(out=out)
    assert y is out
    assert_close(out.values, expected.y, scale=expected.y_scale, channel_axis=1)
    assert numbabn.batch_norm_backward(given.dy, saved, out=dx)[0] is dx
    assert_close(dx.values, expected.grads[0], scale=expected.dx_scale, channel_axis=1)


@MODES
@pytest.mark.parametrize("place", ["x", "residual", "grad_output"])
def test_in_place(gpu, place, training):
    p = problem((3, 4, 5, 6), training=training, residual=True)
    expected, given = p.expected(), OnGpu(gpu, p, writable=True)
    if place == "grad_output":
        _, saved = given.forward()
        numbabn.batch_norm_backward(given.dy, saved, out=given.dy)
        assert_close(given.dy.values, expected.grads[0], scale=expected.dx_scale, channel_axis=1)
        return
    target = given.x if place == "x" else given.options["residual"]
    assert given.batch_norm(out=target) is target
    assert_close(target.values, expected.y, scale=expected.y_scale, channel_axis=1)


def test_empty_batch(gpu):
    x = gpu.to(np.zeros((0, 3, 4), np.float32))
    mean, var = gpu.to(np.full(3, 2.0, np.float32)), gpu.to(np.ones(3, np.float32))
    for training in (True, False):
        assert numbabn.batch_norm(x, mean, var, training=training).shape == x.shape
        y, saved = numbabn.batch_norm_forward(x, mean, var, training=training)
        dx, dweight, dbias = numbabn.batch_norm_backward(y, saved)
        assert dx.shape == x.shape
        assert dweight.values.tolist() == dbias.values.tolist() == [0, 0, 0]
    assert numbabn.batch_norm_stats(x).count == 0
    assert mean.values.tolist() == [2, 2, 2]
    assert gpu.launches == []


# --- the stages -------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), SHAPES[1:4], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stages(gpu, shape, axis, dtype):
    p = problem(shape, dtype, channel_axis=axis)
    expected, given = p.expected(), OnGpu(gpu, p)
    stats = numbabn.batch_norm_stats(given.x)
    np.testing.assert_allclose(stats.mean.values, expected.mean, rtol=1e-6, atol=1e-6)
    invstd = 1 / np.sqrt(stats.m2.values / stats.count + 1e-5)
    np.testing.assert_allclose(invstd, expected.invstd, rtol=1e-5)
    mean, invstd = stats.mean, gpu.to(invstd)
    sums = numbabn.batch_norm_backward_reduce(given.dy, given.x, mean, invstd)
    dweight = sums[1].values * invstd.values
    assert_close(sums[0].values, expected.grads[2], scale=expected.dbias_terms, ulps=1 << 32)
    assert_close(dweight, expected.grads[1], scale=expected.dweight_terms, ulps=1 << 32)
    dx = numbabn.batch_norm_backward_elemt(
        given.dy, given.x, mean, invstd, given.weight, *sums, stats.count
    )
    assert_close(dx.values, expected.grads[0], scale=expected.dx_scale, channel_axis=axis)
    factor = p.weight * invstd.values
    scale, shift = gpu.to(factor), gpu.to(p.bias - factor * mean.values)
    y = numbabn.normalize(given.x, scale, shift, activation="relu")
    np.testing.assert_allclose(wide(y.values), expected.y.clip(0), rtol=2e-3, atol=2e-3)


def test_stages_refuse_means_that_are_not_float64(gpu):
    p = problem((6, 5, 4))
    given = OnGpu(gpu, p)
    single = gpu.to(np.zeros(5, np.float32))
    with pytest.raises(TypeError, match="mean: expected dtype float64, got float32"):
        numbabn.batch_norm_backward_reduce(given.dy, given.x, single, single)


def test_stats_on_the_device_do_not_merge_on_the_host(gpu):
    stats = numbabn.batch_norm_stats(gpu.to(problem((6, 5, 4)).x))
    with pytest.raises(TypeError, match="CUDA"):
        stats.merge(stats)


# --- layers -----------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("momentum", [0.1, None])
def test_layer(gpu, momentum, training):
    p = problem((3, 4, 5, 6), training=training, momentum=1.0 if momentum is None else momentum)
    expected, given = p.expected(), OnGpu(gpu, p)
    layer = numbabn.BatchNorm2d(4, momentum=momentum).train(training)
    layer.weight, layer.bias = given.weight, given.bias
    layer.running_mean, layer.running_var = given.mean, given.var
    y = layer(given.x)
    assert_close(y.values, expected.y, scale=expected.y_scale, channel_axis=1)
    for times in (1, 2):
        dx = layer.backward(given.dy)
        assert_close(dx.values, expected.grads[0], scale=expected.dx_scale, channel_axis=1)
        terms = times * expected.dweight_terms
        assert_close(layer.weight_grad.values, times * expected.grads[1], scale=terms)
    assert int(layer.num_batches_tracked) == int(training)


def test_layer_on_a_stream(gpu):
    layer = numbabn.BatchNorm1d(5, affine=False, track_running_stats=False)
    given = OnGpu(gpu, problem((6, 5, 4)))
    layer(given.x, stream=7)
    layer.backward(given.dy, stream=7)
    assert set(gpu.streams) == {7}


def test_layer_with_parameters_on_the_host(gpu):
    layer = numbabn.BatchNorm1d(5)
    with pytest.raises(TypeError, match=r"running_mean: expected a CUDA array .*a layer takes"):
        layer(gpu.to(problem((6, 5, 4)).x))


# --- streams ----------------------------------------------------------------------------------


class CupyStream:
    ptr = 0x1230


class TorchStream:
    cuda_stream = 0x4560


class ProtocolStream:
    def __cuda_stream__(self):
        return 0, 0x7890


STREAMS = [(7, 7), (CupyStream(), 0x1230), (TorchStream(), 0x4560), (ProtocolStream(), 0x7890)]


@MODES
@pytest.mark.parametrize(("stream", "handle"), STREAMS)
def test_a_stream_that_is_given(gpu, stream, handle, training):
    given = OnGpu(gpu, problem((6, 5, 4), training=training))
    _, saved = given.forward(stream=stream)
    numbabn.batch_norm_backward(given.dy, saved, stream=stream)
    stats = numbabn.batch_norm_stats(given.x, stream=stream)
    sums = numbabn.batch_norm_backward_reduce(
        given.dy, given.x, stats.mean, stats.m2, stream=stream
    )
    numbabn.batch_norm_backward_elemt(
        given.dy, given.x, stats.mean, stats.m2, None, *sums, 24, stream=stream
    )
    numbabn.normalize(given.x, stats.mean, stats.m2, stream=stream)
    assert set(gpu.streams) == {handle}
    assert gpu.followed == []


def test_the_stream_of_the_arrays(gpu):
    given = OnGpu(gpu, problem((6, 5, 4), training=False))
    given.x.stream = given.mean.stream = 5
    given.batch_norm()
    assert set(gpu.streams) == {5}
    assert gpu.followed == []


def test_arrays_on_other_streams_are_waited_for_on_the_device(gpu):
    given = OnGpu(gpu, problem((6, 5, 4), training=False))
    given.x.stream, given.weight.stream, given.bias.stream = 5, 9, 9
    given.batch_norm()
    assert set(gpu.streams) == {5}
    assert gpu.followed == [(5, 9)]
    gpu.streams.clear()
    given.batch_norm(stream=6)
    assert set(gpu.streams) == {6}
    assert gpu.followed[1:] == [(6, 5), (6, 9)]


def test_the_default_stream_has_two_names(gpu):
    given = OnGpu(gpu, problem((6, 5, 4), training=False))
    given.weight.stream = 1
    given.batch_norm()
    assert set(gpu.streams) == {0}
    assert gpu.followed == []


def test_dlpack_is_told_the_stream(monkeypatch):
    gpu = install(monkeypatch, Gpu("dlpack"))
    OnGpu(gpu, problem((6, 5, 4), training=False)).batch_norm(stream=6)
    assert set(gpu.dlpack_streams) == set(gpu.streams) == {6}


# --- bad input --------------------------------------------------------------------------------


def like(p, **options):
    return lambda gpu: gpu.to(p, **options)


SHAPE = (4, 3, 6, 5)
ZEROS = np.zeros(SHAPE, np.float32)


def gap(gpu):
    return InterfaceArray(gpu, np.zeros((4, 3, 6, 10), np.float32)[..., ::2])


BAD = {
    "integers": ("x", like(ZEROS.astype(np.int32)), TypeError, r"x: .*float32.* got int32"),
    "complex": ("x", like(ZEROS.astype(np.complex64)), TypeError, r"x: .* got complex64"),
    "rank": ("x", like(np.zeros(3, np.float32)), ValueError, r"x: .*2 dimensions.*\(3,\)"),
    "gaps": ("x", gap, ValueError, r"x: .*without gaps.*not copied"),
    "few channels": ("weight", like(np.ones(2, np.float32)), ValueError, r"weight: .*\(3,\)"),
    "channels": ("x", like(np.zeros((4, 5, 6), np.float32)), ValueError, r"running_mean: .*\(5,\)"),
    "integer bias": ("bias", like(np.ones(3, np.int64)), TypeError, r"bias: .*int64"),
    "gaps in bias": (
        "bias",
        lambda gpu: InterfaceArray(gpu, np.ones(6, np.float32)[::2]),
        ValueError,
        r"bias: expected no gaps, got strides \(8,\)",
    ),
    "residual's shape": ("residual", like(ZEROS[:2]), ValueError, r"residual: .*shape of x"),
    "residual's dtype": (
        "residual", like(ZEROS.astype(np.float64)), TypeError, r"residual: .*float32, got float64",
    ),
    "residual's order": (
        "residual", like(ARRANGEMENTS["channels_last"](ZEROS)), ValueError, r"residual: .*order",
    ),
    "out's shape": ("out", like(ZEROS[:2], writable=True), ValueError, r"out: .*shape of x"),
    "out's order": (
        "out", like(ARRANGEMENTS["channels_last"](ZEROS)), ValueError, r"out: .*memory order",
    ),
    "out is read-only": ("out", like(ZEROS, read_only=True), ValueError, r"out: .*read-only"),
    "device": ("residual", like(ZEROS, device="gpu 1"), ValueError, r"residual: .* 0 .* 1$"),
    "host": ("weight", lambda gpu: np.ones(3, np.float32), TypeError, r"weight: .*CUDA.*NumPy"),
    "host's out": ("out", lambda gpu: ZEROS.copy(), TypeError, r"out: .*CUDA.*ndarray"),
    "no array": ("residual", lambda gpu: "abc", TypeError, r"residual: .*CUDA.*str"),
    "eps": ("eps", lambda gpu: -1.0, ValueError, r"eps: .*at least 0"),
    "momentum": ("momentum", lambda gpu: np.nan, ValueError, r"momentum: .*finite"),
    "activation": ("activation", lambda gpu: "gelu", ValueError, r"activation: .*relu"),
    "axis": ("channel_axis", lambda gpu: 4, ValueError, r"channel_axis: .*-4 to 3"),
    "stream": ("stream", lambda gpu: "one", TypeError, r"stream: .*str"),
    "negative stream": ("stream", lambda gpu: -1, ValueError, r"stream: .*-1"),
}  # fmt: skip


@MODES
@pytest.mark.parametrize("case", BAD)
def test_bad_input(gpu, case, training):
    argument, make, error, message = BAD[case]
    given = OnGpu(gpu, problem(SHAPE, training=training))
    names = ("x", "running_mean", "running_var", "weight", "bias")
    arguments = {**dict(zip(names, given.arrays, strict=True)), **given.options}
    arguments[argument] = make(gpu)
    for function in (numbabn.batch_norm, numbabn.batch_norm_forward):
        with pytest.raises(error, match=message):
            function(**arguments)
    assert gpu.launches == []


def test_eval_without_running_statistics(gpu):
    with pytest.raises(ValueError, match="running_var: expected an array, got None"):
        numbabn.batch_norm(gpu.to(ZEROS), gpu.to(np.zeros(3)), None)


def test_one_value_per_channel(gpu):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        numbabn.batch_norm(gpu.to(np.zeros((1, 3), np.float32)), None, None, training=True)


@pytest.mark.parametrize("name", ["mean", "var"])
def test_read_only_running_statistics(gpu, name):
    given = OnGpu(gpu, problem(SHAPE))
    getattr(given, name).read_only = True
    with pytest.raises(ValueError, match=rf"running_{name}: .*read-only"):
        given.batch_norm()
    assert gpu.launches == []


def test_running_statistics_that_overlap(gpu):
    given = OnGpu(gpu, problem(SHAPE))
    given.var = given.mean
    with pytest.raises(ValueError, match=r"running_mean: .*overlaps running_var"):
        given.batch_norm()


def test_out_that_overlaps(gpu):
    given = OnGpu(gpu, problem(SHAPE))
    with pytest.raises(ValueError, match=r"out: .*overlaps x \(which the backward pass needs\)"):
        given.forward(out=given.x)
    memory = gpu.memory_for((ZEROS.size + 4,), np.float32)
    given.x = InterfaceArray(gpu, memory[:-4].reshape(SHAPE))
    with pytest.raises(ValueError, match=r"out: .*overlaps part of x"):
        given.batch_norm(out=InterfaceArray(gpu, memory[4:].reshape(SHAPE)))
    assert gpu.launches == []


def test_bad_gradients(gpu):
    p = problem(SHAPE)
    given = OnGpu(gpu, p)
    _, saved = given.forward()
    before = len(gpu.launches)
    last = ARRANGEMENTS["channels_last"]
    for bad, error, message in [
        (gpu.to(ZEROS[:2]), ValueError, "grad_output: expected the shape of the saved"),
        (gpu.to(ZEROS.astype(np.float64)), TypeError, "grad_output: .*float32, got float64"),
        (gpu.to(last(ZEROS)), ValueError, "grad_output: expected the memory layout"),
        (ZEROS, TypeError, "grad_output: expected a CUDA array"),
    ]:
        with pytest.raises(error, match=message):
            numbabn.batch_norm_backward(bad, saved)
    with pytest.raises(ValueError, match=r"out: .*overlaps x"):
        numbabn.batch_norm_backward(given.dy, saved, out=given.x)
    assert len(gpu.launches) == before


def test_host_input_with_cuda_arrays(gpu):
    p = problem(SHAPE, training=False)
    given = OnGpu(gpu, p)
    with pytest.raises(TypeError, match="running_mean: got a CUDA array, expected a NumPy array"):
        numbabn.batch_norm(p.x, given.mean, given.var, training=True)
    _, saved = p.forward()
    with pytest.raises(TypeError, match="grad_output: got a CUDA array"):
        numbabn.batch_norm_backward(given.dy, saved)


def test_tensors_that_want_gradients_are_refused(gpu):
    class Variable(InterfaceArray):
        is_cuda = True

        @property
        def __cuda_array_interface__(self):
            raise RuntimeError("use var.detach()")

    x = Variable(gpu, ZEROS)
    with pytest.raises(ValueError, match=r"x: expected an array that lends its memory.*detach"):
        numbabn.batch_norm(x, None, None, training=True)


def test_arrays_that_pytorch_makes():
    # On the CPU, where strides, dtypes and slices are what they are on a GPU.
    torch = pytest.importorskip("torch")
    like = torch.zeros(1)
    library = libraries.library_of(like)
    assert library is not libraries.library_of(np.zeros(1))
    for name in DTYPES:
        array = library.new(like, (2, 3), name, zeros=True)
        assert array.dtype is getattr(torch, name)
        assert array.sum() == 0
    made = library.permute(library.new(like, (2, 5, 6, 3), "float32"), (0, 3, 1, 2))
    assert made.shape == (2, 3, 5, 6)
    assert made.is_contiguous(memory_format=torch.channels_last)


def test_without_numba_cuda():
    # None in sys.modules makes the import fail, as it does where numba-cuda is not installed.
    script = """
import sys
sys.modules["numba.cuda"] = None
import numpy as np
import numbabn
class Array:
    __cuda_array_interface__ = {}
try:
    numbabn.batch_norm(Array(), None, None, training=True)
except ImportError as error:
    print(error)
print(numbabn.batch_norm(np.ones((2, 3)), np.ones(3), np.ones(3)).sum())
"""
    message, result = run_script(script).splitlines()
    assert message.startswith("CUDA arrays need numba-cuda: pip install 'numbabn[cuda13]'")
    assert float(result) == 0


def test_no_driver(monkeypatch):
    # Without the fixture, launches go to Numba.
    monkeypatch.setattr(launch.cuda, "is_available", lambda: False)
    launch._require_driver.cache_clear()
    given = OnGpu(Gpu(), problem(SHAPE, training=False))
    with pytest.raises(RuntimeError, match=r"driver.*install"):
        given.batch_norm()
