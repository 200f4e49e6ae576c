"""Arithmetic on arrays of lanes, rounded as PTX says.

NumPy rounds sums, products, quotients, square roots and conversions to nearest even, which is all
that most instructions need. What it lacks is here: fused multiply-add in every format, conversions
in the other rounding modes, products of 128 bits, and bit fields. NaNs come out as NaNs, but their
payloads are the host's.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

_TINY = {np.dtype(np.float16): 2.0**-14, np.dtype(np.float32): 2.0**-126}
_HALFWAY = {np.dtype(np.float16): 42, np.dtype(np.float32): 29}  # bits below the last one kept


# --- fused multiply-add ---------------------------------------------------------------------


def _two_sum(a, b):
    """a + b rounded, and what the rounding left out, exactly."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _two_product(a, b):
    """a * b rounded, and what the rounding left out (Dekker), barring over- and underflow."""
    p = a * b
    t = a * 134217729.0  # 2**27 + 1
    a1 = t - (t - a)
    t = b * 134217729.0
    b1 = t - (t - b)
    a2, b2 = a - a1, b - b1
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


def _sum_to_odd(a, b):
    """a + b in float64, rounded to odd: rounding that again, to fewer bits, is rounding once."""
    s, error = _two_sum(a, b)
    bits = s.view(np.int64)
    away = np.where((error > 0) == (s > 0), 1, -1)
    inexact_even = ((error > 0) | (error < 0)) & (bits & 1 == 0)
    return (bits + np.where(inexact_even, away, 0)).view(np.float64)


def fma_narrow(a, b, c):
    """Fused multiply-add of float16 or float32: the product is exact in float64."""
    dtype = a.dtype
    product = a.astype(np.float64) * b
    total = product + c
    # Rounding twice is rounding once unless the first result lies half-way between two numbers.
    halfway = 1 << (_HALFWAY[dtype] - 1)
    near = total.view(np.int64) & (2 * halfway - 1) == halfway
    small = np.abs(total) < _TINY[dtype]
    if near.any() or (small.any() and total[small].any()):
        total = _sum_to_odd(product, c.astype(np.float64))
    return total.astype(dtype)


def _fma_exact(a, b, c):
    """For finite numbers of any size."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return a * b + c if a == 0 or b == 0 else 0.0
    try:
        return exact.numerator / exact.denominator  # correctly rounded
    except OverflowError:
        return np.inf if exact > 0 else -np.inf


def fma_double(a, b, c):
    """Fused multiply-add of float64 (Boldo and Melquiond 2008)."""
    a, b, c = np.broadcast_arrays(a, b, c)
    high, low = _two_product(a, b)
    th, tl = _two_sum(c, low)
    vh, vl = _two_sum(high, th)
    result = vh + _sum_to_odd(tl, vl)
    size = np.abs(high)
    safe = (size > 2.0**-900) & (size < 2.0**900) | (a == 0) | (b == 0)
    safe &= (np.abs(a) < 2.0**900) & (np.abs(b) < 2.0**900) & (np.abs(c) < 2.0**900)
    # An exact zero has the sign of the plain sum.
    result = np.where(result == 0, a * b + c, result)
    if not safe.all():
        finite = np.isfinite(a) & np.isfinite(b)
        result = np.where(finite, np.where(np.isfinite(c), result, c), a * b + c)
        for n in np.flatnonzero(~safe & finite & np.isfinite(c)):
            result[n] = _fma_exact(a[n], b[n], c[n])
    return result


def fma(a, b, c):
    """a * b + c, rounded once."""
    return fma_double(a, b, c) if a.dtype == np.float64 else fma_narrow(a, b, c)


# --- minimum and maximum --------------------------------------------------------------------


def _extreme(numpy_function, join):
    def function(a, b):
        result = numpy_function(a, b)
        if a.dtype.kind == "f":  # -0 is less than +0
            bits = f"u{a.dtype.itemsize}"
            result = np.where(a == b, join(a.view(bits), b.view(bits)).view(a.dtype), result)
        return result

    return function


minimum = _extreme(np.fmin, np.bitwise_or)
maximum = _extreme(np.fmax, np.bitwise_and)
minimum_nan = _extreme(np.minimum, np.bitwise_or)
maximum_nan = _extreme(np.maximum, np.bitwise_and)


# --- conversions ----------------------------------------------------------------------------

TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x):
    """float32 to nearest even, as bits."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def narrow(x, dtype, mode):
    """A float or an integer as a float of `dtype`, in rounding mode rn, rz, rm or rp."""
    result = x.astype(dtype)
    if mode == "rn":
        return result
    # float64 holds both exactly: the callers see to that.
    exact, back = x.astype(np.float64), result.astype(np.float64)
    if mode == "rz":
        wrong, toward = np.abs(back) > np.abs(exact), 0
    elif mode == "rm":
        wrong, toward = back > exact, -np.inf
    else:
        wrong, toward = back < exact, np.inf
    return np.where(wrong, np.nextafter(result, dtype.type(toward)), result)


def float_to_integer(x, dtype, mode):
    """Rounded, and clamped to the range of `dtype`."""
    info = np.iinfo(dtype)
    low, high = float(info.min), float(info.max + 1)
    narrow_types = x.dtype != np.float64 and dtype.itemsize < 8
    x = TO_INTEGRAL[mode](x.astype(np.float64))
    result = np.where((x >= low) & (x < high), x, 0).astype(dtype)
    result = np.where(x >= high, dtype.type(info.max), result)
    result = np.where(x < low, dtype.type(info.min), result)
    if narrow_types:  # NaN has become 0
        return result
    only_top_bit = np.array(1 << (8 * dtype.itemsize - 1), f"u{dtype.itemsize}").view(dtype)
    return np.where(np.isnan(x), only_top_bit, result)


def integer_to_integer(x, dtype, saturate):
    if saturate:
        low = max(np.iinfo(dtype).min, np.iinfo(x.dtype).min)
        high = min(np.iinfo(dtype).max, np.iinfo(x.dtype).max)
        x = np.clip(x, x.dtype.type(low), x.dtype.type(high))
    return x.astype(dtype)


# --- integers -------------------------------------------------------------------------------


def divide(a, b):
    """Towards zero; what is divided by zero gives all ones, as on the hardware."""
    ones = np.array(-1).astype(a.dtype)
    if a.dtype.kind == "u":
        return np.where(b == 0, ones, a // b)
    return np.where(b == 0, ones, (a - np.fmod(a, b)) // np.where(b == 0, 1, b))


def remainder(a, b):
    """Of `divide`, with the sign of a."""
    return np.where(b == 0, a, np.fmod(a, b))


def widening(a, b):
    """The product in twice the bits."""
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(wide) * b.astype(wide)


def multiply_high(a, b):
    """The upper half of the product."""
    if a.dtype.itemsize < 8:
        product = widening(a, b)
        return (product >> product.dtype.type(8 * a.dtype.itemsize)).astype(a.dtype)
    x, y, half = a.view(np.uint64), b.view(np.uint64), np.uint64(32)
    low = np.uint64(0xFFFFFFFF)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + ((x0 * y0) >> half)
    high = x1 * y1 + (middle >> half) + ((x0 * y1 + (middle & low)) >> half)
    if a.dtype.kind == "i":  # of the two's complement
        zero = np.uint64(0)
        high = high - np.where(a < 0, y, zero) - np.where(b < 0, x, zero)
    return high.view(a.dtype)


def shift_left(a, by):
    """Nothing is left of a number that is shifted by its width or more."""
    bits = 8 * a.dtype.itemsize
    if by.size == 1 and by[0] < bits:
        return a << a.dtype.type(by[0])
    return np.where(by < bits, a << by.astype(a.dtype), a.dtype.type(0))


def shift_right(a, by):
    """Arithmetic for signed numbers; all by more than the width are the same."""
    bits = 8 * a.dtype.itemsize
    if by.size == 1 and by[0] < bits:
        return a >> a.dtype.type(by[0])
    shifted = a >> np.minimum(by, np.uint32(bits - 1)).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


def funnel(a, b, by, left, wrap):
    """The upper (left) or lower 32 bits of b:a, shifted."""
    by = (by & np.uint32(31) if wrap else np.minimum(by, np.uint32(32))).astype(np.uint64)
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    if left:  # by 32 the upper half is a
        return ((both << by) >> np.uint64(32)).astype(np.uint32)
    return (both >> by).astype(np.uint32)


def _low_bits(count, dtype):
    """A mask of that many ones."""
    bits = 8 * np.dtype(dtype).itemsize
    one = np.array(1, dtype)
    return np.where(count >= bits, ~np.array(0, dtype), (one << count.astype(dtype)) - one)


def insert_bits(a, b, position, length):
    """The lowest `length` bits of a, put into b."""
    position, length = position & np.uint32(255), length & np.uint32(255)
    mask = shift_left(_low_bits(length, a.dtype), position)
    return (b & ~mask) | (shift_left(a, position) & mask)


def extract_bits(a, position, length):
    """`length` bits of a, sign-extended for signed numbers."""
    bits = 8 * a.dtype.itemsize
    position, length = position & np.uint32(255), length & np.uint32(255)
    mask = _low_bits(length, a.dtype)
    field = shift_right(a, position) & mask
    if a.dtype.kind == "u":
        return field
    last = np.minimum(position + length - np.uint32(1), np.uint32(bits - 1))
    negative = (shift_right(a, last) & 1 == 1) & (length > 0)
    return np.where(negative, field | ~mask, field)


def permute_bytes(a, b, selector):
    """prmt in its default mode."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
    for n in range(4):
        pick = (selector >> np.uint32(4 * n)) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (pick & np.uint32(7)))) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
        byte = np.where(pick & np.uint32(8), sign, byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * n)
    return result


def lookup3(a, b, c, table):
    """lop3: any function of three bits."""
    result = np.zeros_like(a)
    for n in range(8):
        if table >> n & 1:
            term = (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
            result = result | term
    return result


def count_ones(a):
    bits = np.unpackbits(np.ascontiguousarray(a).view(np.uint8)).reshape(len(a), -1)
    return bits.sum(axis=1, dtype=np.uint32)


def reverse_bits(a):
    return np.packbits(
        np.unpackbits(np.ascontiguousarray(a).view(np.uint8), bitorder="little")
        .reshape(len(a), -1)[:, ::-1],
        bitorder="little",
    ).view(a.dtype)  # fmt: skip


def count_leading_zeros(a):
    for n in (1, 2, 4, 8, 16, 32)[: a.dtype.itemsize.bit_length() + 2]:
        a = a | (a >> a.dtype.type(n))
    return count_ones(~a)


def saturate(x):
    """Clamped to 0 and 1; NaN gives 0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))
