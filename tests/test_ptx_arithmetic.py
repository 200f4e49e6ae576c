"""What the interpreter's instructions compute, compared with exact arithmetic in Python.

Integers are compared with Python's, floating point with rational numbers rounded once.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from ptx_support import dtype, lanes, numbers, rounded, same

N = 1024
FLOATS = ("f16", "f32", "f64")


def exactly(function, kind, *arrays, mode="rn"):
    """The function of rational numbers, rounded to `kind`; None stands for what is not a number."""
    out = []
    for values in zip(*(a.tolist() for a in arrays), strict=True):
        value = function(*map(Fraction, values)) if all(map(math.isfinite, values)) else None
        out.append(math.nan if value is None else rounded(value, kind, mode))
    return np.array(out, np.float64)


# --- floating point -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("how", ["random", "ties", "cancel", "tiny"])
def test_fma_rounds_once(kind, how):
    bits = {"f16": 11, "f32": 24, "f64": 53}[kind]
    a, b, c = (numbers(kind, N, seed) for seed in (1, 2, 3))
    rng = np.random.default_rng(4)
    if how == "ties":  # a product of few bits, and a sum that ends near the middle of two numbers
        a, b = (1 + rng.integers(0, 1 << n, N) / 2.0**n for n in (bits // 2, bits - bits // 2))
        least = -20 if kind == "f16" else -2 * bits - 20
        c = rng.choice([1, -1], N) * 2.0 ** rng.integers(least, 4, N)
        c = c * (1 + rng.integers(0, 2, N) * 2.0 ** (1 - bits))
    elif how == "cancel":
        a, b = (rng.standard_normal(N).astype(dtype(kind)) for _ in "ab")
        c = -(a * b)
    elif how == "tiny":
        smallest = {"f16": -24, "f32": -149, "f64": -1074}[kind]
        a, b = (rng.standard_normal(N) * 2.0 ** (smallest // 2 + 3) for _ in "ab")
        c = rng.integers(-5, 5, N) * np.ldexp(1.0, smallest)
        if kind == "f32":  # next to the middle of two denormals, by less than float64 can tell
            a[:64], b[:64] = 2.0**-75 * (1 + 2.0**-23), 2.0**-75 * (1 - 2.0**-23)
            c[:64] = 2.0**-127 + 2.0**-149
    a, b, c = (np.asarray(x, dtype(kind)) for x in (a, b, c))
    got = lanes(f"fma.rn.{kind} %d, %a, %b, %c;", kind, (kind, a), (kind, b), (kind, c))
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    expected = exactly(lambda x, y, z: x * y + z, kind, a, b, c)
    with np.errstate(all="ignore"):
        plain = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
        # Where a and b are finite and c is not, the product must not overflow.
        plain = np.where(np.isfinite(a) & np.isfinite(b), np.where(finite, plain, c), plain)
        zero = finite & (expected == 0)
        expected = np.where(finite, expected, plain)
        # The sign of an exact zero is that of the sum of signed zeros, of an underflow its own.
        signed = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)
        expected = np.where(zero, np.copysign(0.0, signed), expected)
        same(got, expected.astype(got.dtype))


def test_fma_of_float32_differs_from_rounding_twice():
    """The case that float64 in between gets wrong: to it, a tie."""
    a, b = np.float32(1 + 2**-12), np.float32(1 + 2**-12)
    c = np.float32(2**-60)
    twice = np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    got = lanes("fma.rn.f32 %d, %a, %b, %c;", "f32",
                *(("f32", np.full(64, x, np.float32)) for x in (a, b, c)))  # fmt: skip
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    assert got[0] == rounded(exact, "f32") != twice


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "div.rn", "add.rn", "mul.rn"])
def test_basic_operations(op, kind):
    a, b = numbers(kind, N, 1), numbers(kind, N, 2)
    got = lanes(f"{op}.{kind} %d, %a, %b;", kind, (kind, a), (kind, b))
    name = op[:3]
    exact = {
        "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
        "div": lambda x, y: x / y if y else None,
    }[name]  # fmt: skip
    expected = exactly(exact, kind, a, b)
    with np.errstate(all="ignore"):
        host = {"add": a + b, "sub": a - b, "mul": a * b, "div": a / b}[name]
    unusual = ~np.isfinite(a) | ~np.isfinite(b) | (expected == 0) | np.isnan(expected)
    same(got, np.where(unusual, host, expected.astype(host.dtype)))
    assert np.count_nonzero(~unusual) > N // 2


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_roots_and_reciprocals(kind):
    a = numbers(kind, N)
    with np.errstate(all="ignore"):
        same(lanes(f"sqrt.rn.{kind} %d, %a;", kind, (kind, a)), np.sqrt(a))
        same(lanes(f"rcp.rn.{kind} %d, %a;", kind, (kind, a)), 1 / a)
    squares = np.square(np.arange(64, dtype=a.dtype))
    same(lanes(f"sqrt.rn.{kind} %d, %a;", kind, (kind, squares)), np.arange(64))


@pytest.mark.parametrize(("op", "function"), [
    ("rcp.approx.ftz", lambda a: 1 / a), ("sqrt.approx", np.sqrt), ("ex2.approx", np.exp2),
    ("rsqrt.approx", lambda a: 1 / np.sqrt(a)), ("lg2.approx", np.log2),
])  # fmt: skip
def test_approximations_are_rounded_values(op, function):
    a = np.linspace(0.25, 9, 128).astype(np.float32)
    same(lanes(f"{op}.f32 %d, %a;", "f32", ("f32", a)),
         function(a.astype(np.float64)).astype(np.float32))  # fmt: skip


@pytest.mark.parametrize("kind", FLOATS)
def test_minimum_and_maximum(kind):
    a, b = numbers(kind, N, 1), numbers(kind, N, 2)
    b[:200] = -a[:200]
    for op in ("min", "max"):
        pick = min if op == "min" else max
        expected = []
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            if math.isnan(x) or math.isnan(y):
                expected.append(y if math.isnan(x) else x)
            else:  # -0 is the smaller of two zeros
                expected.append(pick(x, y, key=lambda v: (v, math.copysign(1, v))))
        inputs = (kind, a), (kind, b)
        same(lanes(f"{op}.{kind} %d, %a, %b;", kind, *inputs), expected)
        nan = np.isnan(a) | np.isnan(b)
        got = lanes(f"{op}.NaN.{kind} %d, %a, %b;", kind, *inputs)
        same(got, np.where(nan, np.nan, expected))


@pytest.mark.parametrize("kind", FLOATS)
def test_signs(kind):
    a, b = numbers(kind, N, 1), numbers(kind, N, 2)
    same(lanes(f"abs.{kind} %d, %a;", kind, (kind, a)), np.abs(a))
    same(lanes(f"neg.{kind} %d, %a;", kind, (kind, a)), -a)
    if kind != "f16":
        got = lanes(f"copysign.{kind} %d, %a, %b;", kind, (kind, a), (kind, b))
        same(got, np.copysign(b, a))


def test_packed_halves():
    a, b = (numbers("f16", 2 * N, seed) for seed in (1, 2))
    with np.errstate(all="ignore"):
        for op, expected in (("add", a + b), ("mul", a * b)):
            pairs = ("b32", a.view("u4")), ("b32", b.view("u4"))
            got = lanes(f"{op}.f16x2 %d, %a, %b;", "b32", *pairs)
            same(got.view("f2"), expected)


def test_flushing_and_saturation():
    a = np.array([1e-40, -1e-40, 0.5, 2, -2, np.nan, 1, 0] * 8, np.float32)
    got = lanes("add.ftz.f32 %d, %a, %b;", "f32", ("f32", a), ("f32", np.zeros(64)))
    same(got, [0, 0, 0.5, 2, -2, np.nan, 1, 0] * 8)  # -0 + 0 is 0
    got = lanes("add.sat.f32 %d, %a, %b;", "f32", ("f32", a), ("f32", np.zeros(64)))
    same(got, np.array([1e-40, 0, 0.5, 1, 0, 0, 1, 0] * 8, np.float32))


COMPARISONS = {
    "eq": lambda x, y: x == y, "ne": lambda x, y: x < y or x > y, "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
    "num": lambda x, y: x == x and y == y, "nan": lambda x, y: x != x or y != y,
}  # fmt: skip
COMPARISONS |= {
    name + "u": lambda x, y, f=COMPARISONS[name]: x != x or y != y or f(x, y)
    for name in ("eq", "ne", "lt", "le", "gt", "ge")
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_of_floats(name):
    a, b = numbers("f32", N, 1), numbers("f32", N, 2)
    b[:300] = a[:300]
    code = f"setp.{name}.f32 %p|%q, %a, %b; selp.u32 %r8, 10, 0, %q; selp.u32 %d, 1, %r8, %p;"
    got = lanes(code, "u32", ("f32", a), ("f32", b))
    expected = [1 if COMPARISONS[name](x, y) else 10
                for x, y in zip(a.tolist(), b.tolist(), strict=True)]  # fmt: skip
    np.testing.assert_array_equal(got, expected)


def test_comparison_joined_with_a_predicate():
    a, b = numbers("s32", N, 1), numbers("s32", N, 2)
    code = "setp.lt.s32 %p, %a, 0; setp.gt.and.s32 %q, %a, %b, !%p; selp.b32 %d, 1, 0, %q;"
    got = lanes(code, "u32", ("s32", a), ("s32", b))
    np.testing.assert_array_equal(got, (a > b) & (a >= 0))


# --- conversions ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(("source", "target"), [("f64", "f32"), ("f32", "f16"), ("f64", "f16")])
def test_narrowing(source, target, mode):
    a = numbers(source, N)
    rng = np.random.default_rng(0)
    a[: N // 2] = rng.standard_normal(N // 2) * 2.0 ** rng.integers(-30, 17, N // 2)
    got = lanes(f"cvt.{mode}.{target}.{source} %d, %a;", target, (source, a))
    expected = exactly(lambda x: x, target, a, mode=mode)
    expected = np.where(np.isfinite(a), np.copysign(expected, a), a)
    same(got, expected)


def test_bfloat16():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    a = numbers("f32", N)
    a = np.where(np.isnan(a), np.float32(1), a)
    got = lanes("cvt.rn.bf16.f32 %d, %a;", "bf16", ("f32", a))
    np.testing.assert_array_equal(got, a.astype(bfloat16).view("u2"))
    got = lanes("cvt.f32.bf16 %d, %a;", "f32", ("bf16", got))
    same(got, a.astype(bfloat16).astype(np.float32))
    got = lanes("cvt.rn.bf16x2.f32 %d, %a, %b;", "b32", ("f32", a), ("f32", a[::-1]))
    np.testing.assert_array_equal(got.view("u2")[1::2], a.astype(bfloat16).view("u2"))
    np.testing.assert_array_equal(got.view("u2")[::2], a[::-1].astype(bfloat16).view("u2"))


def test_halves_from_bits_and_back():
    every = np.arange(1 << 16, dtype=np.uint16)
    got = lanes("cvt.f32.f16 %d, %a;", "f32", ("f16", every.view("f2")))
    same(got, every.view("f2").astype(np.float32))
    got = lanes("cvt.rn.f16.f32 %d, %a;", "f16", ("f32", got))
    same(got, every.view("f2"))
    got = lanes("cvt.rn.f16x2.f32 %d, %a, %b;", "b32", ("f32", np.ones(64)), ("f32", np.zeros(64)))
    assert got[0] == 0x3C000000


@pytest.mark.parametrize(("mode", "rounding"), [
    ("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil),
])  # fmt: skip
def test_floats_to_integers(mode, rounding):
    rng = np.random.default_rng(0)
    for source in ("f32", "f64"):
        a = numbers(source, N)
        a[: N // 2] = rng.integers(-1000, 1000, N // 2) / 4
        integral = lanes(f"cvt.{mode}.{source}.{source} %d, %a;", source, (source, a))
        finite = np.isfinite(a)
        same(integral[finite], [np.copysign(rounding(x), x) for x in a[finite].tolist()])
        for target in ("s32", "u32", "s64", "u64", "s16"):
            got = lanes(f"cvt.{mode}.{target}.{source} %d, %a;", target, (source, a))
            info = np.iinfo(got.dtype)
            wide = source == "f64" or "64" in target
            nan = (1 << (info.bits - 1) if info.min == 0 else info.min) if wide else 0
            expected = [
                nan if math.isnan(x) else (info.max if x > 0 else info.min) if math.isinf(x)
                else min(max(rounding(x), info.min), info.max) for x in a.tolist()
            ]  # fmt: skip
            np.testing.assert_array_equal(got, np.array(expected, got.dtype))


@pytest.mark.parametrize("source", ["u16", "s32", "u32", "s64", "u64"])
def test_integers_to_floats(source):
    a = numbers(source, N)
    for target in ("f32", "f64"):
        for mode in ("rn", "rz", "rm", "rp") if "64" not in source else ("rn",):
            got = lanes(f"cvt.{mode}.{target}.{source} %d, %a;", target, (source, a))
            same(got, exactly(lambda x: x, target, a, mode=mode))


@pytest.mark.parametrize("source", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("target", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers_to_integers(source, target):
    a = numbers(source, N)
    # An 8-bit number lies in a 16-bit register.
    got = lanes(f"cvt.{target}.{source} %d, %a;", target, (source, a))
    np.testing.assert_array_equal(got, a.astype(got.dtype))
    got = lanes(f"cvt.sat.{target}.{source} %d, %a;", target, (source, a))
    info = np.iinfo(got.dtype)
    expected = [min(max(x, info.min), info.max) for x in a.tolist()]
    np.testing.assert_array_equal(got, np.array(expected, got.dtype))


# --- integers -------------------------------------------------------------------------------


def truncated(x, y):
    q = abs(x) // abs(y)
    return q if (x < 0) == (y < 0) else -q


BINARY = {
    "add": lambda x, y, n: x + y, "sub": lambda x, y, n: x - y, "mul.lo": lambda x, y, n: x * y,
    "mul.hi": lambda x, y, n: (x * y) >> n,
    "div": lambda x, y, n: truncated(x, y) if y else -1,
    "rem": lambda x, y, n: x - truncated(x, y) * y if y else x,
    "min": lambda x, y, n: min(x, y), "max": lambda x, y, n: max(x, y),
}  # fmt: skip


def wrap(values, kind):
    """Python's integers as NumPy's, modulo their size."""
    bits = int(kind[1:])
    return np.array([v % (1 << bits) for v in values], f"u{bits // 8}").view(dtype(kind))


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("op", BINARY)
def test_integer_arithmetic(op, kind):
    a, b = numbers(kind, N, 1), numbers(kind, N, 2)
    b[:100] = np.arange(100)
    got = lanes(f"{op}.{kind} %d, %a, %b;", kind, (kind, a), (kind, b))
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    expected = [BINARY[op](x, y, int(kind[1:])) for x, y in pairs]
    np.testing.assert_array_equal(got, wrap(expected, kind))


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products(kind):
    a, b = numbers(kind, N, 1), numbers(kind, N, 2)
    wide = kind[0] + str(2 * int(kind[1:]))
    c = numbers(wide, N, 3)
    triples = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    got = lanes(f"mul.wide.{kind} %d, %a, %b;", wide, (kind, a), (kind, b))
    np.testing.assert_array_equal(got, wrap([x * y for x, y, _ in triples], wide))
    inputs = (kind, a), (kind, b), (wide, c)
    got = lanes(f"mad.wide.{kind} %d, %a, %b, %c;", wide, *inputs)
    np.testing.assert_array_equal(got, wrap([x * y + z for x, y, z in triples], wide))
    got = lanes(f"mad.lo.{kind} %d, %a, %b, %c;", kind, *inputs[:2], (kind, c.astype(a.dtype)))
    np.testing.assert_array_equal(got, wrap([x * y + z for x, y, z in triples], kind))


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "s32", "s64", "u32", "u64", "s16"])
def test_shifts(kind):
    a, by = numbers(kind, N, 1), numbers("u32", N, 2)
    by[: N // 2] %= 70
    bits = int(kind[1:])
    pairs = list(zip(a.tolist(), by.tolist(), strict=True))
    if kind[0] == "b":
        got = lanes(f"shl.{kind} %d, %a, %b;", kind, (kind, a), ("u32", by))
        expected = [x << y if y < bits else 0 for x, y in pairs]
        np.testing.assert_array_equal(got, wrap(expected, kind))
    got = lanes(f"shr.{kind} %d, %a, %b;", kind, (kind, a), ("u32", by))
    np.testing.assert_array_equal(got, wrap([x >> min(y, bits) for x, y in pairs], kind))
    for amount in (0, 5, bits - 1, bits, 100):
        got = lanes(f"shr.{kind} %d, %a, {amount};", kind, (kind, a))
        np.testing.assert_array_equal(got, wrap([x >> min(amount, bits) for x, _ in pairs], kind))


@pytest.mark.parametrize("side", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(side, mode):
    a, b, by = (numbers("b32", N, seed) for seed in (1, 2, 3))
    by[: N // 2] %= 40
    inputs = ("b32", a), ("b32", b), ("b32", by)
    got = lanes(f"shf.{side}.{mode}.b32 %d, %a, %b, %c;", "b32", *inputs)
    expected = []
    for low, high, n in zip(a.tolist(), b.tolist(), by.tolist(), strict=True):
        n = n & 31 if mode == "wrap" else min(n, 32)
        both = high << 32 | low
        expected.append((both << n >> 32 if side == "l" else both >> n) & 0xFFFFFFFF)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind):
    bits = int(kind[1:])
    a, b = numbers(kind, N, 1), numbers(kind, N, 2)
    rng = np.random.default_rng(3)
    at, length = rng.integers(0, 80, N), rng.integers(0, 80, N)
    at[:20], length[:20] = 255, 255
    fields = ("u32", at), ("u32", length)
    got = lanes(f"bfe.{kind} %d, %a, %b, %c;", kind, (kind, a), *fields)
    expected = []
    for x, p, n in zip(a.tolist(), at.tolist(), length.tolist(), strict=True):
        fill = x >> min(p + n - 1, bits - 1) & 1 if kind[0] == "s" and n else 0
        bit = [x >> (p + i) & 1 if i < n and p + i < bits else fill for i in range(bits)]
        expected.append(sum(one << i for i, one in enumerate(bit)))
    np.testing.assert_array_equal(got, wrap(expected, kind))
    plain = f"b{bits}"
    code = f"bfi.{plain} %d, %a, %b, %c, 7;"
    got = lanes(code, plain, (plain, a), (plain, b), ("u32", at))
    expected = [
        (y & ~(127 << p)) | ((x << p) & (127 << p))
        for x, y, p in zip(a.tolist(), b.tolist(), at.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(got, wrap(expected, plain))


def test_bytes_and_bits():
    a, b, c = (numbers("b32", N, seed) for seed in (1, 2, 3))
    inputs = ("b32", a), ("b32", b), ("b32", c)
    triples = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    expected = []
    for x, y, selector in triples:
        data = (y << 32 | x).to_bytes(8, "little")
        out = []
        for n in range(4):
            pick = selector >> 4 * n & 15
            byte = data[pick & 7]
            out.append((255 if byte >= 128 else 0) if pick & 8 else byte)
        expected.append(int.from_bytes(bytes(out), "little"))
    np.testing.assert_array_equal(lanes("prmt.b32 %d, %a, %b, %c;", "b32", *inputs), expected)
    for table, function in (
        (0x80, lambda x, y, z: x & y & z), (0x96, lambda x, y, z: x ^ y ^ z),
        (0xEA, lambda x, y, z: (x & y) | z), (0xCA, lambda x, y, z: (x & y) | (~x & z)),
    ):  # fmt: skip
        got = lanes(f"lop3.b32 %d, %a, %b, %c, {table};", "b32", *inputs)
        np.testing.assert_array_equal(got, wrap([function(*t) for t in triples], "b32"))
    for kind in ("b32", "b64"):
        a = numbers(kind, N)
        bits, values = int(kind[1:]), a.tolist()
        for op, result, function in (
            ("popc", "u32", lambda x: x.bit_count()),
            ("clz", "u32", lambda x, bits=bits: bits - x.bit_length()),
            ("brev", kind, lambda x, bits=bits: int(f"{x:0{bits}b}"[::-1], 2)),
            ("not", kind, lambda x: ~x), ("cnot", kind, lambda x: x == 0),
        ):  # fmt: skip
            got = lanes(f"{op}.{kind} %d, %a;", result, (kind, a))
            np.testing.assert_array_equal(got, wrap(map(function, values), result))
        for op in ("and", "or", "xor"):
            got = lanes(f"{op}.{kind} %d, %a, %b;", kind, (kind, a), (kind, a[::-1]))
            np.testing.assert_array_equal(got, getattr(np, f"bitwise_{op}")(a, a[::-1]))


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
@pytest.mark.parametrize("kind", ["s16", "u32", "s32", "u64", "s64"])
def test_comparisons_of_integers(name, kind):
    a, b = numbers(kind, N, 1), numbers(kind, N, 2)
    b[:200] = a[:200]
    code = f"setp.{name}.{kind} %p, %a, %b; selp.b32 %d, 1, 0, %p;"
    got = lanes(code, "u32", (kind, a), (kind, b))
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    np.testing.assert_array_equal(got, [int(COMPARISONS[name](x, y)) for x, y in pairs])


def test_moves_take_numbers_apart_and_together():
    a = numbers("b64", N)
    code = "{ .reg .b32 %l; .reg .b32 %h; mov.b64 {%l, %h}, %a; mov.b64 %d, {%h, %l}; }"
    got = lanes(code, "b64", ("b64", a))
    np.testing.assert_array_equal(got, a << np.uint64(32) | a >> np.uint64(32))
    code = "{ .reg .b16 %l; .reg .b16 %h; mov.b32 {%l, %h}, %a; mov.b32 %d, {%h, %l}; }"
    got = lanes(code, "b32", ("b32", a.view("u4")[:N]))
    np.testing.assert_array_equal(got, a.view("u2").reshape(-1, 2)[:N, ::-1].ravel().view("u4"))
    got = lanes("mov.b32 %d, %a;", "f32", ("b32", a.view("u4")[:N]))
    np.testing.assert_array_equal(got.view("u4"), a.view("u4")[:N])
