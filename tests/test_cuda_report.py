"""What the resource report says of the kernels: their traffic, and that nothing spills."""

import re

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
import ptx_cache

from benchmarks import cuda_resources, cuda_traffic
from numbabn import layout
from numbabn.cuda import launch
from numbabn.cuda.vector import FLOAT16, FLOAT32

SHAPES = {
    "planes": (False, 4, 8, 1024),
    "short planes": (False, 32, 64, 49),
    "rows of channels": (True, 2000, 64, 1),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_traffic_is_what_follows_from_the_plan(shape, dtype, training):
    view = layout.View(*SHAPES[shape], None)
    expected = cuda_traffic.expected(view, 2 if dtype == "float16" else 4)
    names = cuda_traffic.PASSES[2 * training :]
    both = cuda_traffic.counted(view, dtype, training)
    for name, one in zip(names, both, strict=False):
        factor, fused = expected[name]
        assert one.dram == pytest.approx(factor, abs=0.001), name
        assert one.launches == (1 if fused or name == "eval forward" else 3 if training else 2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("N", "L"), [(32, 49), (32, 196), (4, 784)])
def test_sectors_at_the_ends_of_planes(N, L, dtype):
    # Half of a sector for each 24.5 is the most that is lost.
    view = cuda_traffic.view_of(N, 32, L, "NCHW")
    for training in (False, True):
        for one in cuda_traffic.counted(view, dtype, training):
            assert one.efficiency >= 0.9799
            assert one.wide == 1.0


@pytest.mark.parametrize("where", ["NCHW", "NHWC"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_whole_layers_read_and_write(where, itemsize):
    for C, L, _ in cuda_traffic.SHAPES:
        view = cuda_traffic.view_of(cuda_traffic.BATCH, C, L, where)
        found = {name: n for name, (n, _) in cuda_traffic.expected(view, itemsize).items()}
        assert found["eval forward"] <= 1.02
        assert found["eval backward"] <= 1.02


# The fullest: their registers have been too few before.
FULLEST = (
    ("forward_columns", FLOAT32, False, True),
    ("forward_columns", FLOAT16, True, True),
    ("stats_columns", FLOAT16, True, True),
    ("backward_sums_columns", FLOAT32, True, True),
    ("backward_sums_columns", FLOAT16, False, True),
)


def ptx_of(variant, cc):
    name, storage, aligned, wide = variant
    (entry,) = [e for e in cuda_resources.entries() if e.make.__name__ == name]
    return ptx_cache.ptx_of(launch.kernel(entry.make, storage, aligned, wide, entry.bounds), cc)


@pytest.mark.skipif(
    cuda_resources.find("ptxas") is None or cuda_resources.find("nvdisasm") is None,
    reason="ptxas or nvdisasm is not installed",
)
@pytest.mark.parametrize("variant", FULLEST, ids=str)
def test_the_fullest_kernels_spill_nothing(variant):
    ptx = ptx_of(variant, (10, 0))
    for cc in ((10, 0), (12, 0)):
        said, _ = cuda_resources.assemble(cuda_resources.retarget(ptx, cc), cc)
        assert re.findall(r"(\d+) bytes (?:stack|spill)", said) == ["0"] * 3
        assert "__local_depot" not in ptx


@pytest.mark.parametrize("cc", [(9, 0), (12, 0)])
def test_the_ptx_of_a_generation_differs_in_its_target_only(cc):
    # The report compiles kernels once for each generation.
    variant = ("finish_sums", FLOAT32, True, False)
    first = cuda_resources.retarget(ptx_of(variant, cuda_resources.generation(cc)), cc)
    assert f".target sm_{cc[0]}{cc[1]}" in first
    names = re.compile(r"_Z\w+")  # have a running number
    assert names.sub("k", first) == names.sub("k", ptx_of(variant, cc))
