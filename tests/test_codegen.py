"""What the kernels' inner loops look like in the machine's own instructions.

A process with an empty cache compiles the kernels, by ordinary calls, and prints their assembly
(kernels that are loaded from disk cannot be inspected). `innermost` cuts it into loops, and those
that do arithmetic on whole vectors, the hot ones, are looked at. Loops that have each of the faults
looked for are compiled beside them, to see that the search would find it.
"""

import json
import re

import llvmlite.binding
import numba
import pytest
from support import run_script

FEATURES = llvmlite.binding.get_host_cpu_features()
if FEATURES.get("avx512f"):
    WIDEST = "zmm"
elif FEATURES.get("avx2") and FEATURES.get("fma"):
    WIDEST = "ymm"
else:
    WIDEST = None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WIDEST is None, reason="knows the instructions of AVX2 and AVX-512 only"),
    pytest.mark.skipif(
        bool(numba.config.CPU_NAME or numba.config.CPU_FEATURES),
        reason="Numba is told to compile for another machine",
    ),
]

COMPILE = """
import json
import math
import numba
import numpy as np
import numbabn
from ml_dtypes import bfloat16
from numbabn.cpu import serial

numbabn.set_num_threads(1)
for dtype in (np.float32, np.float16):
    for shape in ((2, 3, 128), (4, 64)):
        x, C = np.ones(shape, dtype), shape[1]
        mean, var = np.zeros(C, np.float32), np.ones(C, np.float32)
        numbabn.batch_norm_stats(x)
        numbabn.batch_norm(x, mean, var)
        numbabn.batch_norm_backward_elemt(x, x, mean, var, None, mean, mean, 1.0)
        for training in (True, False):
            y, saved = numbabn.batch_norm_forward(x, mean, var, training=training)
            numbabn.batch_norm_backward(y, saved)
for shape in ((2, 3, 128), (4, 64)):
    numbabn.batch_norm_forward(np.ones(shape, bfloat16), mean[: shape[1]], var[: shape[1]])

@numba.njit
def recurrence(x):
    total = 0.0
    for i in range(x.size):
        total = total * 0.5 + x[i]
    return total

@numba.njit
def ordinary_stores(x, out):
    for i in range(x.size):
        out[i] = x[i] * 2 + 1

@numba.njit
def allocating(x):
    kept = np.empty(1)
    for i in range(x.size):
        fresh = np.empty(i)
        fresh[:1] = x[i]
        kept = fresh
    return kept

@numba.njit
def library(x):
    total = 0.0
    for i in range(x.size):
        total += math.gamma(x[i])
    return total

@numba.njit
def wrapped(x, index):
    total = 0.0
    for i in range(index.size):
        total += x[index[i]]
    return total

x = np.ones(4)
recurrence(x), ordinary_stores(x, x), allocating(x), library(x), wrapped(x, np.zeros(4, np.int64))

printed = {}
for name, item in vars(serial).items():
    if hasattr(item, "stats") and item.stats.cache_path is not None:
        for signature in item.signatures:
            key = f"{name} {signature[0].dtype}"
            printed[key] = printed.get(key, []) + [item.inspect_asm(signature)]
for item in (recurrence, ordinary_stores, allocating, library, wrapped):
    printed[item.py_func.__name__] = list(item.inspect_asm().values())
print(json.dumps(printed))
"""

LABEL = re.compile(r"^(\.L\w+):")
JUMP = re.compile(r"^\s+j\w+\s+(\.L\w+)")
ARITHMETIC = r"\bv(?:add|sub|mul|fn?m(?:add|sub)\d*)"
PACKED = re.compile(ARITHMETIC + rf"p[sd]\b.*%{WIDEST}")
SCALAR = re.compile(ARITHMETIC + r"s[sd]\b")
# Loops that go round once per channel, or 16 of them, not per vector of elements: they divide, or
# add up the lanes of a vector.
PER_CHANNEL = re.compile(r"\bv(?:div|sqrt)[ps]d\b|\bvextractf128\b(?s:.*)\bvadds[sd]\b")
STREAMING = re.compile(r"\bvmovnt.*%([xyz])mm")
# What slows each turn of a loop. Reference counts are calls, and atomic where those were inlined;
# the sign of an index is spread out to wrap negative ones round.
FAULTS = {
    "atomic": re.compile(r"^\s+lock\b", re.MULTILINE),
    "call": re.compile(r"\bcall"),
    "division": re.compile(r"\bidiv"),
    "index wrap": re.compile(r"\bsar\w*\s+\$63"),
}
# Vectors (not numbers to fill one with) that found no register, and the beginning of a function
# whose stack begins on a boundary. Without it they lie across cache lines, and now and then pages.
ON_STACK = re.compile(
    r"^(?!\s+vbroadcast).*(?:%[yz]mm\d+, -?\d*\(%r[bs]p\)|-?\d*\(%r[bs]p\), .*%[yz]mm\d+)",
    re.MULTILINE,
)
STACK_ALIGNED = re.compile(r"\bandq\s+\$-(?:64|128), %rsp")
FUNCTION = re.compile(r"^(?=[A-Za-z_][\w.$]*:$)", re.MULTILINE)
HALF_LIBRARY = re.compile(r"__gnu_(h2f|f2h)|__(extendhf|truncsfhf|truncdfhf)")


def innermost(asm):
    """The loops that hold no other: from a label to the last jump back to it.

    Nor the beginning of another: a jump back out of that one may be no loop at all, where LLVM has
    put what comes after a loop before it.
    """
    lines = asm.splitlines()
    labels = {m[1]: n for n, line in enumerate(lines) if (m := LABEL.match(line))}
    ends = {}
    for n, line in enumerate(lines):
        jump = JUMP.match(line)
        if jump and labels.get(jump[1], n) < n:
            ends[labels[jump[1]]] = n
    spans = list(ends.items())
    return [
        "\n".join(lines[start : end + 1])
        for start, end in spans
        if not any(start < a <= end for a, _ in spans)
    ]


def hot(asm):
    return [loop for loop in innermost(asm) if PACKED.search(loop) and not PER_CHANNEL.search(loop)]


def faults(loops):
    return {name for name, fault in FAULTS.items() for loop in loops if fault.search(loop)}


def spilling(asm):
    """Functions with hot loops that keep vectors on the stack: on boundaries, and anywhere."""
    functions = [
        function
        for function in FUNCTION.split(asm)
        if any(ON_STACK.search(loop) for loop in hot(function))
    ]
    aligned = [function for function in functions if STACK_ALIGNED.search(function)]
    return aligned, [function for function in functions if function not in aligned]


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    """``{"kernel dtype": [assembly of each version]}``; float16 is int16, bfloat16 uint16."""
    folder = str(tmp_path_factory.mktemp("cache"))
    return json.loads(run_script(COMPILE, timeout=900, NUMBA_CACHE_DIR=folder))


READING = ["stats"]
WRITING = ["normalize", "forward", "backward_elements", "backward"]
KERNELS = [
    f"{name}_{layout} {dtype}"
    for dtype in ("float32", "int16")
    for layout in ("planes", "columns")
    for name in [*READING, *WRITING, "backward_sums"]
]


@pytest.mark.parametrize("kernel", KERNELS)
def test_inner_loops_use_the_widest_vectors_and_nothing_slow(assembly, kernel):
    for asm in assembly[kernel]:
        loops = hot(asm)
        assert loops
        assert faults(loops) == set()
        assert not any(SCALAR.search(loop) for loop in loops)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if not k.startswith("stats")])
def test_streaming_stores_in_loops_of_their_own(assembly, kernel):
    # Among the loops of every kernel that writes: some stream, and some do not.
    loops = [loop for asm in assembly[kernel] for loop in hot(asm)]
    assert any(STREAMING.search(loop) for loop in loops)
    assert not all(STREAMING.search(loop) for loop in loops)


@pytest.mark.parametrize(
    ("kernel", "dtype"), [("backward_sums_planes", "int16"), ("normalize_planes", "uint16")]
)
def test_16_bit_numbers_stream_where_float32_does(assembly, kernel, dtype):
    # If LLVM has its way, they are narrowed as they are stored, and then not streamed: of float16
    # here 16 vectors of 28 were left, of bfloat16 one of three.
    nbytes = {"x": 16, "y": 32, "z": 64}
    streamed, expected = (
        sum(nbytes[size] for asm in assembly[f"{kernel} {of}"] for size in STREAMING.findall(asm))
        for of in (dtype, "float32")
    )
    assert 2 * streamed > 0.75 * expected


@pytest.mark.parametrize("layout", ["planes", "columns"])
def test_statistics_write_nothing_past_the_caches(assembly, layout):
    assert not any(map(STREAMING.search, assembly[f"stats_{layout} float32"]))


@pytest.mark.skipif(not FEATURES.get("f16c"), reason="no instructions for float16")
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.endswith("int16")])
def test_float16_is_converted_by_instructions(assembly, kernel):
    for asm in assembly[kernel]:
        assert not HALF_LIBRARY.search(asm)
        # to float32, or with AVX-512 FP16 straight to float64
        assert any("vcvtph2p" in loop for loop in hot(asm))
    for asm in assembly[kernel.replace("int16", "float32")]:
        assert "vcvtph2ps" not in asm  # the search does not find it everywhere


@pytest.mark.parametrize("kernel", KERNELS)
def test_vectors_on_the_stack_are_on_boundaries(assembly, kernel):
    for asm in assembly[kernel]:
        _, anywhere = spilling(asm)
        assert anywhere == []


# --- would a fault be found? ------------------------------------------------------------------


def test_a_loop_without_vectors_is_not_hot(assembly):
    (asm,) = assembly["recurrence"]
    assert any(SCALAR.search(loop) for loop in innermost(asm))
    assert hot(asm) == []


def test_ordinary_stores_are_not_streaming(assembly):
    (asm,) = assembly["ordinary_stores"]
    assert innermost(asm)
    assert not STREAMING.search(asm)


@pytest.mark.parametrize(
    ("name", "fault"),
    [("allocating", "call"), ("library", "call"), ("wrapped", "index wrap")],
)
def test_faults_are_found(assembly, name, fault):
    (asm,) = assembly[name]
    assert fault in faults(innermost(asm))


def test_innermost_loops_are_cut_out():
    asm = """
.Lstart:
    idivq %rcx
.Louter:
    lock incq (%rdx)
.Linner:
    vfmadd213ps (%rax), %zmm1, %zmm2
    jne .Linner
    jmp .Lend
    jne .Louter
.Lend:
    retq
"""
    (loop,) = innermost(asm)
    assert [line.split()[0] for line in loop.splitlines()] == [".Linner:", "vfmadd213ps", "jne"]
    assert faults([asm]) == {"atomic", "division"}
    assert faults([loop]) == set()


@pytest.mark.parametrize("boundary", ["andq $-64, %rsp", "subq $64, %rsp"])
def test_vectors_on_the_stack_are_found(boundary):
    register = f"%{WIDEST}1"
    asm = f"""
aligned:
    andq $-64, %rsp
    retq
spilling:
    {boundary}
.Lloop:
    vmovups {register}, 32(%rsp)
    vaddps (%rax), {register}, {register}
    vmulps 32(%rsp), {register}, {register}
    jne .Lloop
    retq
"""
    aligned, anywhere = spilling(asm)
    assert [len(aligned), len(anywhere)] == ([1, 0] if "andq" in boundary else [0, 1])
