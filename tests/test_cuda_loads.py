"""The bytes in flight that `benchmarks.cuda_loads` reads from machine code, where known."""

import pytest

from benchmarks import cuda_loads, cuda_resources


def sass(*lines):
    """Text as nvdisasm writes it."""
    return "\n".join(
        line if line.startswith(".L") else f"        /*{16 * n:04x}*/   {line} ;"
        for n, line in enumerate(lines)
    ).replace(".L_x_0 ;", ".L_x_0:")


LOADS = ("LDG.E.128 R4, desc[UR4][R2.64]", "@!P1 LDG.E.128 R8, desc[UR4][R2.64+0x100]")


def test_loads_before_the_first_use_count():
    assert cuda_loads.in_flight(sass(*LOADS, "FADD R0, R5, R9", "EXIT")) == 32


def test_a_use_in_between_ends_it():
    code = sass(LOADS[0], "IMAD.MOV.U32 R20, RZ, RZ, R6", LOADS[1], "FADD R0, R5, R9", "EXIT")
    assert cuda_loads.in_flight(code) == 16


def test_other_registers_and_narrow_loads_do_not():
    code = sass(LOADS[0], "FADD R0, R1, R12", "LDG.E R13, desc[UR4][R2.64]", LOADS[1], "EXIT")
    assert cuda_loads.in_flight(code) == 32


def test_loads_of_32_bytes():
    load = "LDG.E.ENL2.256.CONSTANT R4, R16, desc[UR4][R2.64]"
    assert cuda_loads.in_flight(sass(load, "FADD R0, R1, R1", "EXIT")) == 32
    code = sass(load, "FADD R0, R19, R1", LOADS[0], "EXIT")
    assert cuda_loads.in_flight(code) == 32


def test_a_loop_counts_before_what_is_outside_of_it():
    # Three loads in a row at the beginning; the loop has one, and waits for it.
    start = [f"LDG.E.128 R{r}, desc[UR4][R2.64]" for r in (4, 8, 12)]
    loop = [".L_x_0:", LOADS[0], "FADD R0, R4, R0", "@P0 BRA `(.L_x_0)", "EXIT"]
    assert cuda_loads.in_flight(sass(*start, "FADD R0, R4, R8", "EXIT")) == 48
    assert cuda_loads.in_flight(sass(*start, "FADD R0, R4, R8", *loop)) == 16


def test_a_loop_that_loads_ahead():
    # What is loaded at its end is used at its beginning.
    code = sass(LOADS[0], ".L_x_0:", "FADD R0, R4, R0", *LOADS, "@P0 BRA `(.L_x_0)", "EXIT")
    assert cuda_loads.in_flight(code) == 32


def test_a_parameter_that_is_not_given():
    ptx = "ld.param.b64 %rd1, [k_param_0];\nld.param.u64 %rd2, [k_param_1];\n[k_param_10]"
    expected = "ld.param.b64 %rd1, [k_param_0];\nmov.b64 %rd2, 0;\n[k_param_10]"
    assert cuda_loads.without(ptx, ("x", "residual"), ("residual", "bits")) == expected


LOOP = """.version 8.0
.target sm_75
.address_size 64
.visible .entry k(.param .u64 k_param_0, .param .u32 k_param_1) {
    .reg .pred %p; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<40>;
    ld.param.u64 %rd1, [k_param_0]; ld.param.u32 %r1, [k_param_1];
    mov.f32 %f0, 0f00000000;
$again:
    BODY
    sub.u32 %r1, %r1, 1;
    setp.ne.u32 %p, %r1, 0;
    @%p bra $again;
    ld.param.u64 %rd2, [k_param_0];
    st.global.f32 [%rd2], %f0;
    ret;
}
"""


@pytest.mark.skipif(
    cuda_resources.find("ptxas") is None or cuda_resources.find("nvdisasm") is None,
    reason="ptxas or nvdisasm is not installed",
)
@pytest.mark.parametrize("cc", [(7, 5), (9, 0), (10, 0)])
def test_a_compiled_loop(cc):
    # Three loads from three places are independent; from where the last one says, they are not.
    fields = "{%f1, %f2, %f3, %f4}"
    add = "add.f32 %f0, %f0, %f1; add.f32 %f0, %f0, %f4;"
    apart = [f"ld.global.v4.f32 {{%f{n}, %f{n + 1}, %f{n + 2}, %f{n + 3}}}, [%rd1+{16 * n}];"
             for n in (1, 5, 9)]  # fmt: skip
    sums = " ".join(f"add.f32 %f0, %f0, %f{n};" for n in range(1, 13))
    chain = f"ld.global.v4.f32 {fields}, [%rd1]; {add} mov.b64 %rd1, {{%f2, %f3}};"
    for body, expected in (
        (" ".join(apart) + sums + " add.u64 %rd1, %rd1, 4096;", 48),
        (chain + chain + chain, 16),
    ):
        ptx = LOOP.replace("BODY", '.pragma "nounroll"; ' + body)
        _, code = cuda_resources.assemble(ptx, cc)
        assert cuda_loads.in_flight(code) == expected
