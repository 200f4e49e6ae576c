"""Each check of the interpreter: a kernel that it must stop, and one beside it that is right."""

import numpy as np
import ptx
import pytest
from ptx_support import THREAD, kernel, run

LOAD = (
    THREAD
    + """
    ld.param.u64 %rd1, [x]; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;
"""
)  # %rd3: &x[thread]
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


# --- addresses ------------------------------------------------------------------------------


def test_out_of_bounds():
    entry = kernel(LOAD + "ld.global.f32 %f1, [%rd3+4]; ret;")
    memory = np.arange(65, dtype=np.float32)
    run(entry, 1, 64, [memory])  # the last thread reads element 64
    with pytest.raises(ptx.OutOfBounds) as caught:
        run(entry, 1, 64, [memory[:64]])
    message = str(caught.value)
    assert message == (
        f"k: block (0, 0, 0) thread (63, 0, 0): address {memory.ctypes.data + 256:#x} is outside "
        "all arrays: byte 256 of x, which has 256, at line 13: ld.global.f32 %f1, [%rd3+4];"
    )


def test_null_pointer_and_gap_between_arrays():
    entry = kernel("ld.param.u64 %rd1, [x]; ld.global.u32 %r1, [%rd1]; ret;")
    with pytest.raises(ptx.OutOfBounds, match="address 0x0 is outside"):
        ptx.run(entry, 1, 1, [0], ptx.Memory())
    block, memory = np.zeros(100, np.uint8), ptx.Memory()
    start = -block.ctypes.data % 4
    memory.register(block[start : start + 6], "first")
    address = memory.register(block[start + 12 : start + 20], "second")
    ptx.run(entry, 1, 1, [address], memory)
    for wrong, where in ((-8, "byte 4 of first"), (-4, "byte 8 of first"), (8, "byte 8 of second")):
        with pytest.raises(ptx.OutOfBounds, match=where):
            ptx.run(entry, 1, 1, [address + wrong], memory)


def test_misaligned():
    entry = kernel(LOAD + "ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%rd3]; ret;")
    block = np.zeros(100, np.uint32)
    aligned = block[-block.ctypes.data % 16 // 4 :]
    run(entry, 1, 1, [aligned])
    with pytest.raises(ptx.Misaligned, match=r"thread \(1, 0, 0\).*no multiple of 16"):
        run(entry, 1, 2, [aligned])


def test_read_only():
    entry = kernel(LOAD + "st.global.f32 [%rd3], 0f3F800000; ret;")
    x = np.zeros(4, np.float32)
    run(entry, 1, 4, [x])
    with pytest.raises(ptx.ReadOnly, match="x, which may only be read"):
        run(entry, 1, 4, [x], readonly="x")
    frozen = np.zeros(4, np.float32)
    frozen.flags.writeable = False
    run(kernel(LOAD + "ld.global.f32 %f1, [%rd3]; ret;"), 1, 4, [frozen], readonly="x")
    np.testing.assert_array_equal(frozen, 0)


def test_arrays_must_be_dense_and_apart():
    memory, a = ptx.Memory(), np.zeros((6, 4))
    for bad in (a[::2], a[:, 1:], a[::-1]):
        with pytest.raises(ValueError, match="gaps"):
            memory.register(bad, "bad")
    memory.register(a.T, "a")
    with pytest.raises(ValueError, match="b overlaps a"):
        memory.register(a[1:3], "b")


SHARED = """
    .shared .align 16 .b8 one[256]; .shared .align 16 .b8 two[256];
    mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.u32 %r3, one; add.s32 %r4, %r3, %r2;
"""  # %r4: &one[thread]


def test_shared_memory_out_of_bounds():
    entry = kernel(SHARED + "st.shared.u32 [%r4], %r1; ret;", "")
    run(entry, 2, 64, [])
    with pytest.raises(ptx.OutOfBounds):
        run(kernel(SHARED + "st.shared.u32 [%r4+256], %r1; ret;", ""), 1, 1, [])
    with pytest.raises(ptx.OutOfBounds):
        run(kernel(SHARED + "st.shared.u32 [%r4-4], %r1; ret;", ""), 1, 1, [])


# --- uninitialised --------------------------------------------------------------------------


def test_uninitialised_shared_memory():
    write = SHARED + "st.shared.u32 [%r4], %r1; bar.sync 0;"
    run(kernel(write + "ld.shared.u32 %r5, [one+252]; ret;", ""), 2, 64, [])
    with pytest.raises(ptx.Uninitialised, match="in one was not written"):
        run(kernel(write + "ld.shared.u32 %r5, [one+252]; ret;", ""), 2, 63, [])
    run(kernel(write + "ld.shared.v2.u32 {%r5, %r6}, [one]; ret;", ""), 1, 2, [])
    with pytest.raises(ptx.Uninitialised):
        run(kernel(write + "ld.shared.v2.u32 {%r5, %r6}, [one];", ""), 1, 1, [])
    with pytest.raises(ptx.Uninitialised):  # of one block, the other's are its own
        run(kernel(SHARED + """mov.u32 %r5, %ctaid.x; setp.eq.u32 %p1, %r5, 0;
            @%p1 st.shared.u32 [%r4], %r1; ld.shared.u32 %r6, [%r4]; ret;""", ""), 2, 32, [],
            check_races=False)  # fmt: skip


def test_uninitialised_local_memory():
    code = """.local .align 4 .b8 depot[8]; mov.u64 %rd1, depot; mov.u32 %r1, 7;
        st.local.u32 [%rd1], %r1; ld.local.u32 %r2, [%rd1+{}]; ret;"""
    run(kernel(code.format(0), ""), 1, 40, [])
    with pytest.raises(ptx.Uninitialised, match="in depot"):
        run(kernel(code.format(4), ""), 1, 40, [])


def test_uninitialised_registers():
    code = """mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 16; @!%p1 bra JOIN; mov.u32 %r2, 1;
        JOIN: {} add.s32 %r3, %r2, 1; ret;"""
    with pytest.raises(ptx.Uninitialised, match=r"thread \(16, 0, 0\): register %r2"):
        run(kernel(code.format(""), ""), 1, 32, [])
    run(kernel(code.format(""), ""), 1, 16, [])  # those that did not write it are not there
    run(kernel(code.format("@!%p1 mov.u32 %r2, 2;"), ""), 1, 32, [])
    with pytest.raises(ptx.Uninitialised, match="register %r4"):
        run(kernel("add.s32 %r3, %r4, 1; ret;", ""), 1, 1, [])
    with pytest.raises(ptx.Uninitialised, match="register %p3"):
        run(kernel("@%p3 bra END; END: ret;", ""), 1, 1, [])


# --- races ----------------------------------------------------------------------------------

EXCHANGE = (
    SHARED
    + """
    st.shared.u32 [%r4], %r1; {barrier}
    xor.b32 %r5, %r2, {distance}; add.s32 %r5, %r3, %r5; ld.shared.u32 %r6, [%r5];
    {again} st.shared.u32 [%r4], %r6; ret;
"""
)


@SEEDS
@pytest.mark.parametrize("distance", [4, 128])  # bytes: within a warp, between warps
def test_races_in_shared_memory(distance, seed):
    def attempt(barrier, again):
        code = EXCHANGE.format(barrier=barrier, again=again, distance=distance)
        run(kernel(code, ""), 3, 64, [], seed=seed)

    attempt("bar.sync 0;", "bar.sync 0;")
    # Without a barrier a warp may also read what another has not written yet.
    with pytest.raises((ptx.RaceFault, ptx.Uninitialised)):
        attempt("", "bar.sync 0;")
    with pytest.raises(ptx.RaceFault, match=r"one was (read|written) by block"):
        attempt("bar.sync 0;", "")
    if distance == 4:  # warps may also be put in order alone
        attempt("bar.warp.sync -1;", "bar.warp.sync -1;")
    else:
        with pytest.raises((ptx.RaceFault, ptx.Uninitialised)):
            attempt("bar.warp.sync -1;", "bar.sync 0;")


def test_race_of_equal_values_and_within_one_instruction():
    same = SHARED + "mov.u32 %r5, 1; {guard} st.shared.u32 [one], %r5; ret;"
    with pytest.raises(ptx.RaceFault, match=r"written by block \(0, 0, 0\) thread"):
        run(kernel(same.format(guard=""), ""), 1, 2, [])
    run(kernel(same.format(guard="setp.eq.u32 %p1, %r1, 0; @%p1"), ""), 4, 64, [])


def test_neighbouring_bytes_do_not_race():
    code = SHARED + "cvt.u16.u32 %rs1, %r1; add.s32 %r5, %r3, %r1; st.shared.u8 [%r5], %rs1;"
    run(kernel(code + "ld.shared.u8 %rs2, [%r5]; ret;", ""), 2, 256, [])
    with pytest.raises(ptx.RaceFault):
        run(kernel(code + "ld.shared.u16 %rs2, [one]; ret;", ""), 1, 2, [])


@pytest.mark.parametrize("writer", [0, 5, 31, 32, 63])
def test_a_write_races_with_any_earlier_reader(writer):
    code = (
        SHARED
        + f"""st.shared.u32 [%r4], %r1; bar.sync 0; {{}}
        setp.eq.u32 %p1, %r1, {writer}; @%p1 st.shared.u32 [one], %r1; ret;"""
    )
    read = "setp.{}.u32 %p2, %r1, {}; @%p2 ld.shared.u32 %r5, [one];"
    other = 40 if writer < 40 else 3
    own, others = read.format("eq", writer), read.format("eq", other)
    for reads in (
        "ld.shared.u32 %r5, [one];",
        own + others,
        others + own,
        read.format("ge", other),
    ):
        with pytest.raises(ptx.RaceFault, match="one was read by"):
            run(kernel(code.format(reads), ""), 1, 64, [])
    # Who read before a barrier does not matter, whoever read since.
    for reads in ("", own, others + "bar.sync 0;", "ld.shared.u32 %r5, [one]; bar.sync 0;" + own):
        run(kernel(code.format(reads), ""), 1, 64, [])


@SEEDS
def test_races_in_global_memory(seed):
    def attempt(code, grid, block):
        x = np.zeros(256, np.uint32)
        run(kernel(LOAD + code, ".param .u64 x"), grid, block, [x], seed=seed)

    attempt("st.global.u32 [%rd3], %r1; ret;", 4, 64)
    attempt("ld.global.u32 %r4, [%rd1]; st.global.u32 [%rd3+64], %r4; ret;", 3, 16)
    with pytest.raises(ptx.RaceFault, match=r"x was (read|written) by block"):  # between blocks
        attempt("ld.global.u32 %r4, [%rd1]; st.global.u32 [%rd3], %r4; ret;", 2, 1)
    with pytest.raises(ptx.RaceFault):  # to the same place
        attempt("mov.u32 %r4, 1; st.global.u32 [%rd1], %r4; ret;", 2, 1)
    shift = "st.global.u32 [%rd3], %r1; {} ld.global.u32 %r4, [%rd3+4]; ret;"
    with pytest.raises(ptx.RaceFault):  # between threads
        attempt(shift.format(""), 1, 64)
    attempt(shift.format("bar.sync 0;"), 1, 64)
    with pytest.raises(ptx.RaceFault):  # a barrier does not put blocks in order
        attempt(shift.format("bar.sync 0;"), 2, 64)
    attempt("ld.global.u32 %r4, [%rd1]; bar.sync 0; st.global.u32 [%rd3], %r4; ret;", 1, 64)


def test_blocks_of_different_batches_race_too():
    x = np.zeros(1, np.uint32)
    code = """mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, {}; ld.param.u64 %rd1, [x];
        @%p1 bra END; mov.u32 %r3, %tid.x; setp.ne.u32 %p1, %r3, 0; @%p1 bra END;
        st.global.u32 [%rd1], %r3; END: ret;"""
    run(kernel(code.format(7)), 10, 1024, [x])
    either = code.format("0; setp.ne.and.u32 %p1, %r1, 9, %p1")
    with pytest.raises(ptx.RaceFault, match=r"written by block \(0, 0, 0\)"):
        run(kernel(either), 10, 1024, [x])


@SEEDS
def test_atomics_are_in_order_with_each_other_only(seed):
    count = "ld.param.u64 %rd1, [x]; atom.global.add.u32 %r2, [%rd1], 1; "
    x = np.zeros(1, np.uint32)
    run(kernel(count + "ret;"), 5, 96, [x], seed=seed)
    assert x[0] == 5 * 96
    with pytest.raises(ptx.RaceFault):
        run(kernel(count + "ld.global.u32 %r3, [%rd1]; ret;"), 1, 2, [x], seed=seed)
    run(kernel(count + "bar.sync 0; ld.global.u32 %r3, [%rd1]; ret;"), 1, 64, [x], seed=seed)


def test_races_may_be_left_unchecked():
    x = np.zeros(1, np.uint32)
    entry = kernel("ld.param.u64 %rd1, [x]; mov.u32 %r1, 5; st.global.u32 [%rd1], %r1; ret;")
    run(entry, 2, 32, [x], check_races=False)
    assert x[0] == 5


# --- barriers and warps ---------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize("bound", [16, 32])  # splits a warp; splits a block between warps
def test_divergent_barrier(bound, seed):
    code = f"""mov.u32 %r1, %tid.x; setp.ge.u32 %p1, %r1, {bound}; {{}} ret;"""
    run(kernel(code.format("@%p1 bra END; END: bar.sync 0;"), ""), 2, 64, [], seed=seed)
    with pytest.raises(ptx.DivergentBarrier, match=r"bar\.sync 0;"):
        run(kernel(code.format("@%p1 bra B; bar.sync 0; bra END; B: bar.sync 0; END:"), ""),
            2, 64, [], seed=seed)  # fmt: skip


@SEEDS
def test_a_warp_comes_to_a_barrier_as_a_whole(seed):
    """Half of each warp waits in the loop's first turn, the other half in its second."""
    code = """mov.u32 %r1, %tid.x; and.b32 %r2, %r1, {};
        setp.ne.u32 %p1, %r2, 0; selp.u32 %r2, 1, 0, %p1;
        mov.u32 %r3, 0; L: setp.ne.u32 %p2, %r2, %r3; @%p2 bra NEXT; bar.sync 0;
        NEXT: add.u32 %r3, %r3, 1; setp.lt.u32 %p3, %r3, 2; @%p3 bra L; ret;"""
    with pytest.raises(ptx.DivergentBarrier, match="is elsewhere while other threads of its warp"):
        run(kernel(code.format(16), ""), 1, 64, [], seed=seed)
    run(kernel(code.format(64), ""), 1, 64, [], seed=seed)


def test_threads_that_have_ended_are_not_waited_for():
    code = "mov.u32 %r1, %tid.x; setp.ge.u32 %p1, %r1, 40; @%p1 ret; bar.sync 0; ret;"
    assert run(kernel(code, ""), 3, 64, []).barriers == 3


@SEEDS
def test_barriers_with_thread_counts(seed):
    """Each half of a block has a barrier of its own."""
    code = (
        SHARED
        + """shr.u32 %r5, %r1, 6; st.shared.u32 [%r4], %r1; bar.sync %r5, {count};
        xor.b32 %r6, %r2, {distance}; add.s32 %r6, %r3, %r6; ld.shared.u32 %r7, [%r6]; ret;"""
    )
    code = code.replace("[256]", "[512]")
    run(kernel(code.format(count=64, distance=128), ""), 2, 128, [], seed=seed)
    with pytest.raises(ptx.DivergentBarrier):
        run(kernel(code.format(count=96, distance=128), ""), 2, 128, [], seed=seed)


SHUFFLE = """mov.u32 %r1, %tid.x; mov.u32 %r2, 0; setp.ge.u32 %p1, %r1, {bound}; @%p1 bra END;
    shfl.sync.down.b32 %r2|%p2, %r1, {by}, 31, {members}; END: ret;"""


@pytest.mark.parametrize(("bound", "by", "members", "why"), [
    (32, 1, "0xffffffff", None), (16, 1, "0xffff", "reads a lane"),
    (16, 0, "0xffff", None), (16, 1, "0xffffffff", "names lanes 0xffffffff .* 0x0000ffff are here"),
    (16, 0, "0xff", "names lanes"),
])  # fmt: skip
def test_shuffles_with_missing_lanes(bound, by, members, why):
    entry = kernel(SHUFFLE.format(bound=bound, by=by, members=members), "")
    if why is None:
        run(entry, 2, 64 if bound == 32 else 32, [])
    else:
        with pytest.raises(ptx.InactiveLane, match=why):
            run(entry, 2, 32, [])


def test_shuffles_from_threads_that_have_ended():
    code = """mov.u32 %r1, %tid.x; setp.ge.u32 %p1, %r1, 16; @%p1 ret;
        shfl.sync.bfly.b32 %r2, %r1, {}, 31, -1; ret;"""
    run(kernel(code.format(8), ""), 1, 32, [])
    with pytest.raises(ptx.InactiveLane, match="reads a lane"):
        run(kernel(code.format(16), ""), 1, 32, [])


def test_shuffles_from_lanes_that_a_short_warp_lacks():
    entry = kernel("mov.u32 %r1, %tid.x; shfl.sync.bfly.b32 %r2, %r1, 8, 31, -1; ret;", "")
    run(entry, 1, 48, [])
    with pytest.raises(ptx.InactiveLane):
        run(entry, 1, 40, [])


@pytest.mark.parametrize("code", ["vote.sync.ballot.b32 %r2, %p1, -1;", "bar.warp.sync -1;",
                                  "match.any.sync.b32 %r2, %r1, -1;"])  # fmt: skip
def test_other_warp_instructions_with_missing_lanes(code):
    body = "mov.u32 %r1, %tid.x; setp.ge.u32 %p1, %r1, 5; {} " + code + " END: ret;"
    run(kernel(body.format(""), ""), 1, 64, [])
    with pytest.raises(ptx.InactiveLane):
        run(kernel(body.format("@%p1 bra END;"), ""), 1, 64, [])


def test_trap():
    with pytest.raises(ptx.Fault, match="trap"):
        run(kernel("trap;", ""), 1, 1, [])


# --- what is not known ----------------------------------------------------------------------


@pytest.mark.parametrize("code", [
    "frobnicate.u32 %r1, %r2;", "add.cc.u32 %r1, 1, 2;", "add.rz.f32 %f1, %f2, %f3;",
    "fma.f32 %f1, %f2, %f3, %f4;", "cvt.f32.f64 %f1, %fd1;", "ld.global.frob.u32 %r1, [%rd1];",
    "bar.arrive 0, 64;", "shfl.sync.sideways.b32 %r1, %r2, 1, 31, -1;", "mov.u32 %r1, %clock;",
    "call nowhere, ();", "add.s32 %r1, %rd1, 2;", "bra NOWHERE;", "mul.s32 %r1, 2, 3;",
    "div.f32 %f1, %f2, %f3;", "mov.f32 %f1, 1;", "add.s32 %r1, 2;",
    "atom.global.frob.u32 %r1, [%rd1], 1;",
    "@%p1 bar.sync 0;", "red.async.u32 [%rd1], 1;",
])  # fmt: skip
def test_unknown_instructions_are_errors_even_where_none_runs_them(code):
    entry = kernel("setp.eq.u32 %p1, 1, 1; @%p1 bra END; " + code + " END: ret;", "")
    with pytest.raises(ptx.Unsupported, match="line 8"):
        run(entry, 1, 1, [])


@pytest.mark.parametrize("text", [".frob 1", ".entry k() { .reg .u128 %x; add", ".target sm_90 }"])
def test_text_that_is_not_ptx(text):
    with pytest.raises(ptx.Unsupported, match="line"):
        ptx.parse(text)


def test_launches_that_cannot_be():
    entry = kernel("ret;", ".param .u32 n")
    for grid, block in ((0, 1), (1, 0), (1, 1025), (1, (64, 32))):
        with pytest.raises(ValueError):
            run(entry, grid, block, [], 1)
    with pytest.raises(ValueError, match="2 arguments for 1"):
        run(entry, 1, 1, [], 1, 2)
