"""``python -m ptx``, in tests/: how fast the interpreter computes, and reaches memory."""

from time import perf_counter

import numpy as np

from ptx import Memory, parse, run

TURNS = 64
KERNEL = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 x, .param .u64 y)
{{
    .reg .pred %p<2>; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<9>;
    ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [y]; mov.u32 %r4, 0;
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x;
    mad.lo.s32 %r1, %r1, %r2, %r3; mul.wide.u32 %rd3, %r1, 16;
    add.s64 %rd1, %rd1, %rd3; add.s64 %rd2, %rd2, %rd3;
    ld.global.v4.f32 {{%f1, %f2, %f3, %f4}}, [%rd1];
AGAIN: {body}
    add.s32 %r4, %r4, 1; setp.lt.u32 %p1, %r4, {turns}; @%p1 bra AGAIN;
    st.global.v4.f32 [%rd2], {{%f1, %f2, %f3, %f4}};
    ret;
}}
"""
BODIES = {
    "float32 and integer arithmetic": """fma.rn.f32 %f1, %f2, %f3, %f4; add.f32 %f2, %f1, %f3;
        mul.f32 %f3, %f1, 0f3F000000; shl.b32 %r5, %r1, 3; xor.b32 %r6, %r5, %r4;""",
    "a load and a store of 16 bytes in 5": """st.global.v4.f32 [%rd2], {%f1, %f2, %f3, %f4};
        ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];""",
}


def main() -> None:
    x, y = np.zeros((2, 4 * 65536), np.float32)
    memory = Memory()
    addresses = [memory.register(x, "x"), memory.register(y, "y")]
    for name, body in BODIES.items():
        entry = parse(KERNEL.format(body=body, turns=TURNS)).entries["k"]
        for check_races in (True, False):
            seconds = []
            for _ in range(3):
                start = perf_counter()
                report = run(entry, 256, 256, addresses, memory, check_races=check_races)
                seconds.append(perf_counter() - start)
            speed = report.instructions / min(seconds) / 1e6
            checked = "checked" if check_races else "unchecked"
            print(f"{name}, races {checked}: {speed:.0f} million/s")


if __name__ == "__main__":
    main()
