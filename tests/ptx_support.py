"""Small PTX kernels for the tests of the interpreter, and exact rounding to compare with."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import ptx

HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"
# Bits of the significand, and the exponent of the last bit of the smallest number.
FORMATS = {"f16": (11, -24), "f32": (24, -149), "f64": (53, -1074)}
NUMPY = {"b": "u", "u": "u", "s": "i", "f": "f"}


def dtype(kind: str) -> np.dtype:
    if kind in ("f16x2", "bf16x2"):
        return np.dtype("u4")
    if kind == "bf16":
        return np.dtype("u2")
    return np.dtype(f"{NUMPY[kind[0]]}{int(kind[1:]) // 8}")


def kernel(body: str, params: str = ".param .u64 x", before: str = "") -> ptx.Function:
    """The kernel `k` with this body; registers %r, %rd, %rs, %f, %fd and %p are declared."""
    text = f"""{HEADER}{before}
.visible .entry k({params}) {{
    .reg .pred %p<20>; .reg .b16 %rs<20>; .reg .b32 %r<40>; .reg .b64 %rd<40>;
    .reg .f32 %f<20>; .reg .f64 %fd<20>;
{body}
}}"""
    return ptx.parse(text).entries["k"]


def run(entry, grid, block, arrays, *numbers, readonly=(), **options):
    """Run a kernel whose parameters are addresses of arrays, in order, and then numbers."""
    memory = ptx.Memory()
    addresses = [
        memory.register(array, name, writable=name not in readonly)
        for name, array in zip("xyzuvw", arrays, strict=False)
    ]
    return ptx.run(entry, grid, block, [*addresses, *numbers], memory, **options)


THREAD = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x;
    mad.lo.s32 %r1, %r1, %r2, %r3;
"""  # %r1: the thread's number in the grid


def _register(kind: str) -> str:
    size = 8 * dtype(kind).itemsize
    return f".reg .{'b' if size <= 16 or kind[0] != 'f' or 'x' in kind else 'f'}{max(size, 16)}"


def lanes(code: str, result: str, *inputs: tuple[str, np.ndarray]) -> np.ndarray:
    """Run `code` for each element: it makes %d of %a, %b, %c, which have these types.

    As many elements as whole blocks of 64 threads have.
    """
    names = "abcd"[: len(inputs)]
    length = max(np.size(values) for _, values in inputs)
    arrays = [np.array(np.broadcast_to(v, length), dtype(kind)) for kind, v in inputs]
    kinds = [kind for kind, _ in inputs]
    arrays.append(np.zeros(length, dtype(result)))
    text = [HEADER, ".visible .entry k("]
    text.append(", ".join(f".param .u64 q{n}" for n in range(len(arrays))))
    text.append(") { .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p, %q;")
    for name, kind in zip([*names, "d"], [*kinds, result], strict=True):
        text.append(f"{_register(kind)} %{name};")
    text.append(THREAD)
    for n, array in enumerate(arrays):
        size = 8 * array.itemsize
        text.append(f"ld.param.u64 %rd1, [q{n}]; mul.wide.u32 %rd2, %r1, {array.itemsize};")
        text.append("add.s64 %rd1, %rd1, %rd2;")
        if n < len(names):
            text.append(f"ld.global.b{size} %{names[n]}, [%rd1];")
    text.append(f"{code}\n st.global.b{size} [%rd1], %d; ret; }}")
    run(ptx.parse("\n".join(text)).entries["k"], length // 64, 64, arrays)
    return arrays[-1]


def rounded(exact: Fraction, kind: str, mode: str = "rn") -> float:
    """A rational number in that format; exact zeros come out positive."""
    bits, smallest = FORMATS[kind]
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    last = max(exponent - bits + 1, smallest)
    scaled = size / Fraction(2) ** last
    whole, rest = divmod(scaled.numerator, scaled.denominator)
    twice = 2 * rest
    up = {
        "rn": twice > scaled.denominator or (twice == scaled.denominator and whole % 2 == 1),
        "rz": False,
        "rm": exact < 0 and rest > 0,
        "rp": exact > 0 and rest > 0,
    }[mode]
    whole += up
    largest = Fraction(2) ** {"f16": 16, "f32": 128, "f64": 1024}[kind]
    value = whole * Fraction(2) ** last
    if value >= largest:
        away = mode == "rn" or ((mode == "rp") == (exact > 0) and mode != "rz")
        value = np.inf if away else largest - largest / Fraction(2) ** bits
    return float(value) * (1 if exact > 0 else -1)


def numbers(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Numbers of a type to test with: the peculiar ones, and random bits, shuffled."""
    rng = np.random.default_rng(seed)
    kind_dtype = dtype(kind)
    size = kind_dtype.itemsize
    bits = rng.integers(0, 256, count * size, np.uint8).view(f"u{size}")
    if kind_dtype.kind == "f":
        info = np.finfo(kind_dtype)
        special = [0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, info.max, info.min, info.tiny,
                   -info.tiny, info.smallest_subnormal, 1 + info.eps, 1.5, 0.5, 3]  # fmt: skip
        special = np.array(special, kind_dtype).view(f"u{size}")
        near = (rng.standard_normal(count // 2)).astype(kind_dtype).view(f"u{size}")
        bits[: near.size] = near
    else:
        top = 1 << (8 * size - 1)
        special = np.array([0, 1, 2, 3, 7, 31, 32, 33, 63, 64, top - 1, top, top + 1, 2 * top - 1],
                           f"u{size}")  # fmt: skip
    bits[rng.integers(0, count, special.size)] = special
    rng.shuffle(bits)
    return bits.view(kind_dtype)


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the bit, zeros by their sign too; NaNs are all the same."""
    expected = np.asarray(expected).astype(got.dtype)
    if got.dtype.kind == "f":
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(got), nan)
        got, expected = got[~nan], expected[~nan]
        np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))
    np.testing.assert_array_equal(got, expected)
