"""Branches, loops, calls, warps and memory: what threads do together, and how it is counted."""

import numpy as np
import ptx
import pytest
from ptx.flow import make_flow
from ptx_support import HEADER, THREAD, kernel, run

N = 192
STORE = """
    ld.param.u64 %rd1, [x]; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r9; ret;
"""  # x[thread] = %r9


def result(body, size=N, block=96, before="", **options):
    """x after `body` has set %r9 in each thread."""
    x = np.zeros(size, np.uint32)
    run(kernel(THREAD + body + STORE, before=before), size // block, block, [x], **options)
    return x


SEEDS = pytest.mark.parametrize("seed", [0, 5])


# --- divergence -----------------------------------------------------------------------------


@SEEDS
def test_nested_branches_and_loops(seed):
    """Steps of Collatz's sequence: each thread leaves the loop when it likes."""
    x = result("""
        add.u32 %r4, %r1, 1; mov.u32 %r9, 0; bra TEST;
    ODD: mad.lo.u32 %r4, %r4, 3, 1; bra NEXT;
    BODY: and.b32 %r5, %r4, 1; setp.eq.u32 %p1, %r5, 1; @%p1 bra ODD; shr.u32 %r4, %r4, 1;
    NEXT: add.u32 %r9, %r9, 1;
    TEST: setp.ne.u32 %p2, %r4, 1; @%p2 bra BODY;""", seed=seed)  # fmt: skip
    expected = []
    for n in range(1, N + 1):
        steps = 0
        while n != 1:
            n, steps = 3 * n + 1 if n % 2 else n // 2, steps + 1
        expected.append(steps)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("inverted", [False, True])
def test_threads_meet_again_wherever_the_blocks_lie(inverted):
    """After a branch all lanes shuffle: they must be together, though JOIN lies first."""
    x = result(f"""
        bra START;
    JOIN: activemask.b32 %r9; bra DONE;
    LEFT: mov.u32 %r8, 1; bra JOIN;
    RIGHT: and.b32 %r7, %r1, 4; setp.eq.u32 %p2, %r7, 0; @%p2 bra LEFT; mov.u32 %r8, 2; bra JOIN;
    START: and.b32 %r6, %r1, 1; setp.eq.u32 %p1, %r6, {int(inverted)}; @%p1 bra RIGHT; bra LEFT;
    DONE:""")  # fmt: skip
    np.testing.assert_array_equal(x, 0xFFFFFFFF)


def test_threads_meet_again_after_a_loop_that_they_leave_at_different_times():
    x = result("""
        and.b32 %r4, %r1, 31; mov.u32 %r5, 0; bra TEST;
    OUT: activemask.b32 %r9; bra END;
    INNER: add.u32 %r6, %r6, 1; setp.lt.u32 %p1, %r6, %r4; @%p1 bra INNER; add.u32 %r5, %r5, 1;
    TEST: mov.u32 %r6, 0; setp.ge.u32 %p2, %r5, %r4; @%p2 bra OUT; bra INNER;
    END:""")  # fmt: skip
    np.testing.assert_array_equal(x, 0xFFFFFFFF)


def test_blocks_are_ordered_with_loops_together():
    entry = kernel("""
        bra A;
    D: @%p3 bra A; ret;
    C: @%p2 bra B; bra D;
    A: mov.u32 %r1, 1; bra B;
    B: mov.u32 %r2, 2; bra C;""", "")  # fmt: skip
    flow = make_flow(entry.module, entry)
    names = [(b.instructions[0].operands[1] if b.instructions else "") for b in flow.blocks]
    assert names[:3] == ["", "1", "2"]
    assert flow.blocks[-1].end.opcode == "ret"


@SEEDS
def test_barriers_in_loops_of_different_length(seed):
    """Blocks pass a barrier as often as their number says; in lock step they are apart."""
    x = result("""
        .shared .align 4 .u32 total; mov.u32 %r4, %ctaid.x; mov.u32 %r9, 0;
        setp.ne.u32 %p1, %r3, 0; @!%p1 st.shared.u32 [total], 0;
    AGAIN: bar.sync 0; ld.shared.u32 %r5, [total]; add.u32 %r9, %r9, %r5; bar.sync 0;
        @%p1 bra NEXT; add.u32 %r5, %r5, 1; st.shared.u32 [total], %r5;
    NEXT: setp.eq.u32 %p2, %r4, 0; sub.u32 %r4, %r4, 1; @!%p2 bra AGAIN;""",
    size=640, block=64, seed=seed)  # fmt: skip
    blocks = np.arange(640) // 64
    np.testing.assert_array_equal(x, blocks * (blocks + 1) // 2)


def test_early_return_and_predicated_instructions():
    x = result("""
        mov.u32 %r9, 7; and.b32 %r4, %r1, 3; setp.eq.u32 %p1, %r4, 1; @%p1 ret;
        setp.eq.u32 %p2, %r4, 2; @%p2 mov.u32 %r9, 8; @!%p2 add.u32 %r9, %r9, 2;""")  # fmt: skip
    np.testing.assert_array_equal(x, np.tile([9, 0, 8, 9], N // 4))


# --- calls ----------------------------------------------------------------------------------

SQUARES = """
.func (.param .b32 result) square(.param .b32 a)
{ .reg .b32 %r<4>; .reg .pred %p1; ld.param.u32 %r1, [a]; mul.lo.u32 %r2, %r1, %r1;
  st.param.b32 [result], %r2; setp.gt.u32 %p1, %r1, 99; @%p1 bra DONE;
  add.u32 %r2, %r2, 1; st.param.b32 [result], %r2; DONE: ret; }
.func (.param .b32 result) twice(.param .b32 a)
{ .reg .b32 %r<4>; ld.param.u32 %r1, [a];
  { .param .b32 p0; st.param.b32 [p0], %r1; .param .b32 r0;
    call.uni (r0), square, (p0); ld.param.b32 %r2, [r0]; }
  add.u32 %r3, %r2, %r2; st.param.b32 [result], %r3; ret; }
"""


def test_calls():
    call = """{{ .param .b32 p0; st.param.b32 [p0], %r{}; .param .b32 r0;
        call.uni (r0), {}, (p0); ld.param.b32 %r9, [r0]; }}"""
    n = np.arange(N)
    square = n * n + (n <= 99)
    np.testing.assert_array_equal(result(call.format(1, "twice"), before=SQUARES), 2 * square)
    both = call.format(1, "square") + call.format(9, "square")
    expected = square.astype(np.uint32) ** 2 + (square <= 99)
    np.testing.assert_array_equal(result(both, before=SQUARES), expected)


def test_recursion_is_an_error():
    before = ".func f() { call.uni f; ret; }"
    with pytest.raises(ptx.Unsupported, match="recursion"):
        result("call.uni f; mov.u32 %r9, 1;", before=before)


# --- warps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("by", [0, 1, 5, 31, "%r2"])
def test_shuffles(mode, width, by):
    """Against the description of shfl in the PTX manual, lane by lane."""
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    x = result(f"""
        mov.u32 %r2, %laneid; mul.lo.u32 %r2, %r2, 3;
        shfl.sync.{mode}.b32 %r4|%p1, %r1, {by}, {clamp}, -1; selp.u32 %r5, 1000, 0, %p1;
        add.u32 %r9, %r4, %r5;""")  # fmt: skip
    expected = []
    for thread in range(N):
        lane, b = thread % 32, (thread % 32 * 3 if by == "%r2" else by) & 31
        first = lane & ~(width - 1)
        last = first if mode == "up" else first | (width - 1)
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b,
             "idx": first | (b & (width - 1))}[mode]  # fmt: skip
        inside = j >= last if mode == "up" else j <= last
        expected.append(thread - lane + (j if inside else lane) + 1000 * inside)
    np.testing.assert_array_equal(x, expected)


def test_votes_and_matches():
    n = np.arange(N)
    bits = 1 << (n % 32)
    words = np.repeat(np.add.reduceat(np.where(n % 3 == 0, bits, 0), n[::32]), 32)
    test = "rem.u32 %r4, %r1, 3; setp.eq.u32 %p1, %r4, 0;"
    np.testing.assert_array_equal(result(test + "vote.sync.ballot.b32 %r9, %p1, -1;"), words)
    for mode, expected in (("any", 1), ("all", 0), ("uni", 0)):
        x = result(test + f"vote.sync.{mode}.pred %p2, %p1, -1; selp.b32 %r9, 1, 0, %p2;")
        np.testing.assert_array_equal(x, expected)
    x = result(test + "match.any.sync.b32 %r9, %r4, -1;")
    warp = n // 32
    same = [(bits * ((n % 3 == n[i] % 3) & (warp == warp[i]))).sum() for i in range(N)]
    np.testing.assert_array_equal(x, same)


def test_special_registers():
    names = ("tid.x", "tid.y", "tid.z", "ctaid.x", "ctaid.y", "ctaid.z", "ntid.y", "nctaid.z",
             "laneid", "warpid", "nwarpid", "lanemask_lt")  # fmt: skip
    block, grid = (5, 4, 3), (2, 3, 2)
    threads = 60
    x = np.zeros((len(names), 12 * threads), np.uint32)
    code = "mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mov.u32 %r3, %tid.z;"
    code += "mad.lo.u32 %r2, %r3, 4, %r2; mad.lo.u32 %r1, %r2, 5, %r1; mov.u32 %r2, %ctaid.x;"
    code += "mov.u32 %r3, %ctaid.y; mov.u32 %r4, %ctaid.z; mad.lo.u32 %r3, %r4, 3, %r3;"
    code += "mad.lo.u32 %r2, %r3, 2, %r2; mad.lo.u32 %r1, %r2, 60, %r1; ld.param.u64 %rd1, [x];"
    code += "mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2;"
    for n, name in enumerate(names):
        code += f"mov.u32 %r9, %{name}; st.global.u32 [%rd1+{4 * x.shape[1] * n}], %r9;"
    run(kernel(code + "ret;"), grid, block, [x], seed=3)
    n = np.arange(threads)
    b = np.repeat(np.arange(12), threads)
    tile = [np.tile(v, 12) for v in (n % 5, n // 5 % 4, n // 20)]
    lane = np.tile(n % 32, 12)
    expected = [*tile, b % 2, b // 2 % 3, b // 6, 4, 2, lane, np.tile(n // 32, 12), 2,
                (1 << lane) - 1]  # fmt: skip
    for row, values in zip(x, expected, strict=True):
        np.testing.assert_array_equal(row, values)


# --- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("vector", "kind", "hint"), [
    ("v4", "u32", ".nc.L2::128B"), ("v2", "f64", ".cs"), ("v4", "f32", ".L1::no_allocate"),
    ("v2", "u64", ".cg"), ("v2", "u16", ""), ("v4", "u8", ".volatile"), ("", "b64", ".nc"),
])  # fmt: skip
def test_vector_accesses(vector, kind, hint):
    count, size = int(vector[1:] or 1), int(kind[1:]) // 8
    letter = {"f": {4: "f", 8: "fd"}}.get(kind[0], {1: "rs", 2: "rs", 4: "r1", 8: "rd1"})[size]
    names = ", ".join(f"%{letter}{n}" for n in range(5, 5 + count))
    names = f"{{{names}}}" if vector else names
    dot = "." + vector if vector else ""
    entry = kernel(THREAD + f"""mul.wide.u32 %rd3, %r1, {count * size};
        ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [y];
        add.s64 %rd1, %rd1, %rd3; add.s64 %rd2, %rd2, %rd3;
        ld.global{hint}{dot}.{kind} {names}, [%rd1]; st.global{dot}.{kind} [%rd2], {names}; ret;""",
        ".param .u64 x, .param .u64 y")  # fmt: skip
    store = np.random.default_rng(0).integers(0, 2**63, 1028)
    x, y = store[-store.ctypes.data % 32 // 8 :][:1024].reshape(2, 512)
    report = run(entry, 2, 64, [x, y], readonly="x")
    np.testing.assert_array_equal(y.view(np.uint8)[: 128 * count * size],
                                  x.view(np.uint8)[: 128 * count * size])  # fmt: skip
    width = count * size
    assert report.requests["load", width] == report.requests["store", width] == 4
    assert report.sectors["load", width] == 128 * width // 32
    assert report.efficiency("load") == report.wide_share("load", width) == 1
    assert report.dram_bytes == report.uncached_bytes == 2 * 128 * width


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (0, 1)])
def test_sectors_of_strided_loads(stride, sectors):
    entry = kernel(THREAD + f"""ld.param.u64 %rd1, [x]; mul.lo.u32 %r4, %r1, {stride};
        xor.b32 %r4, %r4, {stride}; mul.wide.u32 %rd2, %r4, 4; add.s64 %rd2, %rd1, %rd2;
        ld.global.u32 %r5, [%rd2]; ld.global.u32 %r6, [%rd2]; ret;""")  # fmt: skip
    store = np.zeros(1100, np.uint32)
    x = store[-store.ctypes.data % 32 // 4 :][:1024]
    report = run(entry, 3, 32, [x])
    assert report.requests == {("load", 4): 6}
    assert report.sectors == {("load", 4): 6 * sectors}
    assert report.first_touch == {"load": 3 * sectors if stride else 1}
    wanted = 128 if stride else 4  # what several threads ask for counts once
    assert report.efficiency("load") == wanted / (32 * sectors)
    assert report.by_array["load", "x"] == report.first_touch["load"]


def test_sectors_and_bytes_do_not_depend_on_the_order_of_lanes():
    entry = kernel(
        THREAD
        + """ld.param.u64 %rd1, [x]; mul.lo.u32 %r4, %r1, 9; and.b32 %r4, %r4, 15;
        mul.wide.u32 %rd2, %r4, 4; add.s64 %rd2, %rd1, %rd2; ld.global.u32 %r5, [%rd2]; ret;"""
    )
    store = np.zeros(40, np.uint32)
    report = run(entry, 1, 64, [store[-store.ctypes.data % 32 // 4 :]])
    assert report.sectors["load", 4] == 2 * 2
    assert report.bytes["load", 4] == 2 * 64


def test_constant_predicates():
    x = result("""mov.pred %p1, -1; mov.pred %p2, 0; not.pred %p3, %p1; or.pred %p2, %p2, %p3;
        selp.b32 %r4, 1, 0, %p1; selp.b32 %r5, 2, 0, %p2; xor.pred %p4, %p1, %p2;
        selp.b32 %r6, 4, 0, %p4; add.u32 %r9, %r4, %r5; add.u32 %r9, %r9, %r6;""")
    np.testing.assert_array_equal(x, 5)


def test_generic_addresses_and_local_memory():
    x = result("""
        .local .align 8 .b8 depot[16]; .shared .align 4 .b8 room[384];
        mov.u64 %rd5, depot; cvta.local.u64 %rd6, %rd5; st.u32 [%rd6+8], %r1;
        ld.local.u32 %r4, [%rd5+8];
        mov.u64 %rd7, room; cvta.shared.u64 %rd7, %rd7; mul.wide.u32 %rd8, %r3, 4;
        add.s64 %rd7, %rd7, %rd8; st.u32 [%rd7], %r4;
        setp.lt.u32 %p1, %r3, 10; selp.b64 %rd9, %rd7, %rd6, %p1; @!%p1 add.s64 %rd9, %rd9, 8;
        ld.u32 %r9, [%rd9];""")  # fmt: skip
    np.testing.assert_array_equal(x, np.arange(N))


def test_dynamic_shared_memory_and_module_variables():
    before = """.extern .shared .align 16 .b8 extra[]; .const .align 4 .u32 table[3] = {5, 6, 7};
        .global .align 4 .u32 counter = 40;"""
    body = """mov.u64 %rd5, extra; mul.wide.u32 %rd6, %r3, 4; add.s64 %rd5, %rd5, %rd6;
        ld.const.u32 %r4, [table+8]; ld.global.u32 %r5, [counter]; add.u32 %r4, %r4, %r5;
        st.shared.u32 [%rd5], %r4; ld.shared.u32 %r9, [%rd5];"""
    np.testing.assert_array_equal(result(body, before=before, shared_bytes=384), 47)
    with pytest.raises(ptx.OutOfBounds):
        result(body, before=before, shared_bytes=380)


def test_module_variables_outlive_a_launch():
    entry = kernel("""ld.param.u64 %rd1, [x]; atom.global.add.u32 %r1, [count], 1;
        st.global.u32 [%rd1], %r1; ret;""", before=".global .align 4 .u32 count = 5;")  # fmt: skip
    x, memory = np.zeros(1, np.uint32), ptx.Memory()
    address = memory.register(x, "x")
    for expected in (5, 6):
        ptx.run(entry, 1, 1, [address], memory)
        assert x[0] == expected


def test_what_a_kernel_declares():
    entry = kernel(
        ".shared .align 8 .b8 a[24]; .shared .f32 b; ret;", ".param .u64 x, .param .f32 y"
    )
    assert entry.shared_bytes == 28
    assert [(p.type, p.size) for p in entry.params] == [("u64", 8), ("f32", 4)]


@SEEDS
def test_atomics(seed):
    code = (
        THREAD
        + """ld.param.u64 %rd1, [x];
        atom.global.add.u32 %r4, [%rd1], %r1; red.global.max.u32 [%rd1+4], %r1;
        atom.global.min.u32 %r5, [%rd1+8], %r1; red.global.or.b32 [%rd1+12], %r1;
        atom.global.cas.b32 %r6, [%rd1+16], 0, 9; atom.global.exch.b32 %r7, [%rd1+20], %r1;
        atom.global.inc.u32 %r8, [%rd1+24], 9; red.global.add.f32 [%rd1+28], 0f3F000000; ret;"""
    )
    x = np.zeros(8, np.uint32)
    x[2] = 77
    run(kernel(code), 3, 64, [x], seed=seed)
    assert x[:5].tolist() == [191 * 96, 191, 0, 255, 9]
    assert x[5] < 192
    assert x[6] == 192 % 10
    assert x[7:].view(np.float32)[0] == 96
    if seed == 0:
        assert x[5] == 191  # threads in order


def test_order_of_atomics_depends_on_the_seed():
    """Tickets in the order of arrival: the same for the same seed, another for another."""
    body = "atom.global.add.u32 %r9, [{}], 1;"
    runs = []
    for seed in (0, 1, 1, 2):
        x, ticket = np.zeros(N, np.uint32), np.zeros(1, np.uint32)
        entry = kernel(THREAD + "ld.param.u64 %rd4, [y];" + body.format("%rd4") + STORE,
                       ".param .u64 x, .param .u64 y")  # fmt: skip
        run(entry, 2, 96, [x, ticket], seed=seed)
        np.testing.assert_array_equal(np.sort(x), np.arange(N))
        runs.append(x.tolist())
    assert runs[0] == list(range(N))
    assert runs[1] == runs[2] != runs[3]


def test_parameters_of_all_types():
    entry = kernel("""ld.param.u64 %rd1, [x]; ld.param.f32 %f1, [a]; ld.param.f64 %fd1, [b];
        ld.param.s8 %r1, [c]; ld.param.u16 %rs1, [d]; st.global.f32 [%rd1], %f1;
        st.global.f64 [%rd1+8], %fd1; st.global.u32 [%rd1+16], %r1; st.global.u16 [%rd1+20], %rs1;
        ld.param.u32 %r2, [e+8]; st.global.u32 [%rd1+24], %r2; ret;""",
        ".param .u64 x, .param .f32 a, .param .f64 b, .param .s8 c, .param .u16 d, "
        ".param .align 4 .b8 e[12]")  # fmt: skip
    x = np.zeros(4)
    run(entry, 1, 1, [x], 1.5, np.float64(0.1), -2, 65535, b"12345678abcd")
    assert x.view(np.float32)[0] == 1.5
    assert x[1] == 0.1
    assert x.view(np.int32)[4] == -2
    assert x.view(np.uint16)[10] == 65535
    assert x[3:].tobytes()[:4] == b"abcd"


def test_positions_in_messages_are_those_of_the_text():
    text = HEADER + "/* two\nlines */ // and one\n.entry k() {\n\n  frob.u32 %r1;\n}"
    with pytest.raises(ptx.Unsupported, match="line 8"):
        ptx.run(ptx.parse(text).entries["k"], 1, 1, [], ptx.Memory())
