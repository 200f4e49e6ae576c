"""The CUDA backend's functions against the reference, in compiled code that an interpreter runs.

Every kernel is compiled for compute capability 9.0 and executed instruction by instruction, with
memory, races and barriers checked. Shapes are small and odd: planes whose rows do not fill slots
of 16 bytes, rows of columns that have to be put together, a channel in one block and in several.
"""

import numpy as np
import pytest
from support import as_dtype, assert_close, largest, wide

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
from cuda_device import Device

from benchmarks import cuda_resources
from numbabn import cuda, layout, reference
from numbabn.cuda import plans
from numbabn.cuda.arrays import NOTHING

# (view as columns, N, C, L)
PLANES = [(False, 3, 5, 256), (False, 2, 3, 1021), (False, 1, 2, 9000)]
COLUMNS = [(True, 70, 20, 1), (True, 9, 7, 49), (True, 33, 3, 1), (True, 5, 4, 130)]
WHOLE = (True, 70, 48, 1)  # columns that fit a block
SHAPES = PLANES + COLUMNS + [WHOLE]
DTYPES = ("float32", "float64", "float16", "bfloat16")


class Case:
    """Both passes of one call, by the backend and by the reference."""

    def __init__(
        self, shape, dtype="float32", training=True, relu=False, residual=False, offset=0,
        seed=0, eps=1e-5, parameters=None, x=None, affine=True,
    ):  # fmt: skip
        columns, N, C, L = shape
        self.view = layout.View(columns, N, C, L, None)
        self.training, self.relu, self.eps = training, relu, eps
        dtype = as_dtype(dtype)
        kept = np.dtype(parameters or (np.float64 if dtype == np.float64 else np.float32))
        rng = np.random.default_rng(len(str(shape)) + C)
        if x is None:
            x = rng.standard_normal((N, C, L)) * 2 + rng.uniform(-3, 3, (1, C, 1))
        self.x = x.astype(dtype)
        self.dy = rng.standard_normal((N, C, L)).astype(dtype)
        self.residual = rng.standard_normal((N, C, L)).astype(dtype) if residual else None
        self.channels = [rng.uniform(0.5, 2, C).astype(kept) for _ in range(4)]
        if not affine:
            self.channels[:2] = None, None
        self.device = device = Device(seed)
        weight, bias, mean, var = (device.put(a, writable=True) for a in self.channels)
        size, bits = self.x.size, None
        if relu and residual:
            bits = device.queue.empty(cuda.bits_size(self.view, dtype.itemsize), np.uint8)
        source, grad = device.put(self.x, offset=offset), device.put(self.dy, offset=offset)
        added = device.put(self.residual, offset=offset) if residual else None
        zeros = np.zeros(size, dtype)
        out = device.put(zeros, offset=offset, writable=True)
        dx = device.put(zeros, offset=offset, writable=True)
        dres = device.put(zeros, offset=offset, writable=True) if residual else None
        given = (weight, bias, mean, var)
        with device.running():
            if training:
                table = cuda.forward_train(
                    source, added, bits, out, self.view, *given, 0.1, eps, relu, device.queue
                )
            else:
                table = cuda.forward_eval(
                    source, added, bits, out, self.view, *given, eps, relu, device.queue
                )
            self.forward_launches = len(device.launches)
            backward = cuda.backward_train if training else cuda.backward_eval
            sums = backward(
                grad, source, bits, dx, dres, self.view, table, relu, np.dtype(kept),
                device.queue,
            )  # fmt: skip
        self.backward_launches = len(device.launches) - self.forward_launches
        shaped = self.x.shape
        self.y, self.dx = out.owner.reshape(shaped), dx.owner.reshape(shaped)
        self.dres = dres.owner.reshape(shaped) if residual else None
        self.dbias, self.dweight = sums.owner.reshape(2, C)
        self.running = mean.owner, var.owner

    def check(self):
        x, dy, added = wide(self.x), wide(self.dy), wide(self.residual)
        weight, bias, mean, var = (wide(a) for a in self.channels)
        old = mean.copy(), var.copy()
        options = {"training": self.training, "momentum": 0.1, "eps": self.eps}
        options |= {"activation": "relu" if self.relu else None, "residual": added}
        y, saved = reference.batch_norm_forward(x, mean, var, weight, bias, **options)
        grads = reference.batch_norm_backward(dy, saved)
        column = (1, -1, 1)
        centred = x - saved.mean.reshape(column)
        xhat = centred * saved.invstd.reshape(column)
        gain = saved.invstd * (1 if weight is None else np.abs(weight))
        scale = largest(y, 1) + (0 if added is None else largest(added, 1))
        assert_close(self.y, y, scale=scale, channel_axis=1, what="y")
        scale = gain.reshape(column) * largest(dy, 1)
        assert_close(self.dx, grads[0], scale=scale, channel_axis=1, what="dx")
        if added is not None:
            assert np.array_equal(wide(self.dres), grads[3])
        terms = np.abs(dy * xhat).sum((0, 2))
        assert_close(self.dweight, grads[1], scale=terms, what="dweight")
        assert_close(self.dbias, grads[2], scale=np.abs(dy).sum((0, 2)), what="dbias")
        for got, expected, before in zip(self.running, (mean, var), old, strict=True):
            assert_close(got, expected, scale=np.abs(before) + np.abs(expected))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(shape, training):
    Case(shape, training=training).check()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [PLANES[0], PLANES[1], COLUMNS[0], COLUMNS[1], WHOLE], ids=str)
def test_dtypes_with_relu_and_residual(shape, dtype, training):
    # Values away from the kink, which rounding may rightly push to the other side.
    _, N, C, L = shape
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 8, (N, C, L)) + 0.25
    Case(shape, dtype, training, relu=True, residual=True, x=x, seed=1).check()


@pytest.mark.parametrize(("relu", "residual"), [(True, False), (False, True)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [PLANES[0], COLUMNS[1]], ids=str)
def test_options(shape, training, relu, residual):
    Case(shape, training=training, relu=relu, residual=residual).check()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [PLANES[0], PLANES[1], COLUMNS[1], COLUMNS[2], WHOLE], ids=str)
def test_64_bit_indices_give_the_same_bits(monkeypatch, shape, dtype, training):
    narrow = Case(shape, dtype, training)
    monkeypatch.setattr(cuda, "WIDE_FROM", 0)
    far = Case(shape, dtype, training)
    assert all("64-bit" in k.name for k, *_ in far.device.launches if "finish" not in k.name)
    same_results(narrow, far)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [PLANES[0], PLANES[1], COLUMNS[0], COLUMNS[1], WHOLE], ids=str)
def test_misaligned_arrays_give_the_same_bits(shape, dtype):
    aligned, shifted = Case(shape, dtype), Case(shape, dtype, offset=1)
    assert all("unaligned" in k.name for k, *_ in shifted.device.launches if "finish" not in k.name)
    same_results(aligned, shifted)


@pytest.mark.parametrize("shape", [PLANES[0], PLANES[2], COLUMNS[1], WHOLE], ids=str)
def test_order_of_blocks_and_warps_does_not_matter(shape):
    cases = [Case(shape, seed=seed) for seed in (0, 1, 2)]
    same_results(cases[0], cases[1])
    same_results(cases[0], cases[2])


def same_results(a, b):
    for name in ("y", "dx", "dbias", "dweight"):
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes(), name
    assert [r.tobytes() for r in a.running] == [r.tobytes() for r in b.running]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_last_tile_of_columns_may_be_narrow(dtype):
    # 60 channels are no whole number of tiles; the interpreter stops where shared words are read
    # that no thread has written, such as those of columns beyond the last.
    shape = (True, 300, 60, 1)
    how = plans.plan(layout.View(*shape, None), np.dtype(dtype).itemsize)
    slots = how.K * np.dtype(dtype).itemsize // 16
    assert how.width * how.tiles > slots, how
    Case(shape, dtype).check()


def test_launches_of_each_pass():
    # A channel of (3, 5, 256) fits a block, and so do 70 rows; the others here are shared out.
    counts = {}
    for shape in (PLANES[0], PLANES[1], COLUMNS[1], WHOLE):
        for training in (True, False):
            case = Case(shape, training=training)
            counts[shape, training] = case.forward_launches, case.backward_launches
    assert counts[PLANES[0], True] == counts[WHOLE, True] == (1, 1)
    assert counts[PLANES[1], True] == counts[COLUMNS[1], True] == (3, 3)
    assert all(n == (1, 2) for (_, training), n in counts.items() if not training)


def test_the_resource_report_has_the_kernels_as_they_are_launched():
    reported = {e.make: e for e in cuda_resources.entries()}
    for shape in (PLANES[0], PLANES[1], COLUMNS[1], WHOLE):
        for training in (True, False):
            for kernel, _, block, _ in Case(shape, training=training).device.launches:
                entry = reported[kernel.make]
                assert kernel.bounds == entry.bounds
                assert np.prod(block) <= entry.block
    assert {"combine", "fold"} < {make.__name__ for make in reported}


@pytest.mark.parametrize("parameters", ["float64", "float32", "float16"])
def test_channels_of_any_dtype(parameters):
    # Only that they are read and written as what they are: half statistics are coarse.
    case = Case(COLUMNS[0], "float32", parameters=parameters)
    assert case.dweight.dtype == case.running[0].dtype == parameters
    if parameters != "float16":
        assert_close(case.y, Case(COLUMNS[0], "float32").y, channel_axis=1, ulps=16)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [PLANES[0], PLANES[1], COLUMNS[0], WHOLE], ids=str)
def test_infinity_and_nan_stay_in_their_channel(shape, dtype, value):
    _, N, C, L = shape
    x = np.random.default_rng(3).standard_normal((N, C, L))
    x[N // 2, 1, L // 2] = value
    case = Case(shape, dtype, x=x)
    with np.errstate(all="ignore"):
        mean, var = (wide(a) for a in case.channels[2:])
        weight, bias = (wide(a) for a in case.channels[:2])
        y, saved = reference.batch_norm_forward(
            wide(case.x), mean, var, weight, bias, training=True, momentum=0.1, eps=1e-5
        )
        dx, dweight, _ = reference.batch_norm_backward(wide(case.dy), saved)
    for got, expected in ((case.y, y), (case.dx, dx), (case.dweight, dweight)):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(case.running[0], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(case.running[1], var, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e18, 1e-25])
@pytest.mark.parametrize("shape", [PLANES[0], PLANES[1], COLUMNS[0], WHOLE], ids=str)
def test_squares_outside_of_the_range_of_float32(shape, scale):
    _, N, C, L = shape
    x = scale * np.random.default_rng(4).standard_normal((N, C, L))
    case = Case(shape, x=x, eps=0.0)
    case.check()


@pytest.mark.parametrize("value", [0.0, 3.0, 2.0**-60])
def test_equal_values_are_not_summed_again(value):
    # Of columns that fit a block: they are loaded once, zeros too, and whatever lies beside them.
    _, N, C, L = WHOLE
    x = np.random.default_rng(6).standard_normal((N, C, L))
    x[:, 1] = value
    case = Case(WHOLE, x=x)
    case.check()
    (_, _, _, report), *_ = case.device.launches
    assert report.bytes["load", 4] == 4 * C * 4  # weight, bias and running statistics
    assert report.bytes["load", 16] == x.size * 4


def test_the_stages():
    N, C, L = 9, 7, 49
    rng = np.random.default_rng(5)
    x, dy = (rng.standard_normal((N, C, L)).astype(np.float32) for _ in range(2))
    view = layout.View(True, N, C, L, None)
    device = Device()
    source, grad = device.put(x), device.put(dy)
    out, dx = (device.put(np.zeros_like(x), writable=True) for _ in range(2))
    weight = device.put(rng.uniform(1, 2, C))
    with device.running():
        mean, m2 = cuda.stats(source, view, device.queue)
        np.testing.assert_allclose(mean.owner, x.mean((0, 2), np.float64), atol=1e-7)
        np.testing.assert_allclose(m2.owner, x.var((0, 2), np.float64) * N * L, rtol=1e-6)
        invstd = device.put(1 / np.sqrt(m2.owner / (N * L) + 1e-5))
        plain = cuda.known_table(source, mean, invstd, weight, NOTHING, C, device.queue)
        cuda.normalize(source, None, None, out, view, plain, False, device.queue)
        unit = cuda.known_table(source, mean, NOTHING, NOTHING, NOTHING, C, device.queue)
        sums = cuda.backward_eval(
            grad, source, None, None, None, view, unit, False, np.float64, device.queue
        )
        sum_dy = device.put(sums.owner[:C])
        sum_dy_xmu = device.put(sums.owner[C:])
        slopes = cuda.slopes_from_sums(source, N * L, sum_dy, sum_dy_xmu, plain, device.queue)
        cuda.backward_elements(
            grad, source, None, dx, None, view, plain, slopes, False, device.queue
        )
    y, saved = reference.batch_norm_forward(wide(x), None, None, weight.owner, training=True)
    expected, *_ = reference.batch_norm_backward(wide(dy), saved)
    assert_close(out.owner.reshape(x.shape), y, channel_axis=1)
    assert_close(dx.owner.reshape(x.shape), expected, channel_axis=1)
    xmu = wide(x) - mean.owner.reshape(1, C, 1)
    np.testing.assert_allclose(sums.owner[C:], (dy * xmu).sum((0, 2)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_grids_fill_the_device(itemsize):
    # As many blocks as multiprocessors for 64 channels and for 2048, wherever there is work.
    for shape in [(32, 64, 112 * 112), (32, 2048, 49), (32, 256, 14 * 14)]:
        for columns, (N, C, L) in ((False, shape), (True, (shape[0] * shape[2], shape[1], 1))):
            how = plans.plan(layout.View(columns, N, C, L, None), itemsize)
            for grid in (how.element_grid, how.chunk_grid):
                assert np.prod(grid) >= 132, (how, grid)


@pytest.mark.parametrize("shape", [(True, 1000, 64, 1), (True, 130, 16, 1), (True, 3, 512, 1)])
def test_columns_of_all_widths_that_fit_a_block(shape):
    Case(shape).check()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_whole_slots_and_whole_sectors_only(dtype):
    # 196 float32 are 49 slots, so half of the rows begin within a sector of 32 bytes.
    shape = (False, 16, 4, 196) if dtype == "float32" else (False, 16, 4, 392)
    for training in (True, False):
        case = Case(shape, dtype, training, parameters="float64")
        for kernel, *_, report in case.device.launches:
            if "finish" not in kernel.name:
                for kind in ("load", "store"):
                    size = np.dtype(dtype).itemsize
                    assert report.bytes[kind, size] == 0
                    sectors = report.sectors[kind, 16]
                    assert sectors == 0 or report.bytes[kind, 16] >= 0.97 * 32 * sectors
