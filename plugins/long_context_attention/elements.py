"""What the elements of a cache are, for Triton kernels: how they are written, read, and multiplied.

``KV`` says what an element is: 0 a number of the compute type, 1 an E4M3 byte, 2 an int8 (both as u8). The scales of a
quantized cache are taken out of the loops over keys: a key's goes into the query, a value's into the result. What is
multiplied then are the codes, in float16, which holds them exactly.
"""

import triton
import triton.language as tl

NONE = tl.constexpr(0)
FP8 = tl.constexpr(1)
INT8 = tl.constexpr(2)
# Adding and subtracting it rounds a float32 below 2^22 to the nearest integer, ties to even.
ROUND_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23
FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit
def e4m3_byte(x):
    """The byte of the E4M3 number nearest to float32 x, ties to even, saturated at 448; NaN stays NaN."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # exponent biases: 127 - 7 = 120; 3 mantissa bits
    # Below 2^-6 numbers are 2^-9 apart, which is what the sum's last mantissa bit stands for.
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    byte = tl.where(size < 0.015625, subnormal, normal)
    byte = tl.where(x != x, 0x7F, byte)  # noqa: PLR0124 - NaN
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (byte | sign).to(tl.uint8)


@triton.jit
def encode(x, scale, KV: tl.constexpr):
    """Bytes of float32 x in a quantized cache (quantized.py); the reciprocal is rounded first, as there."""
    quotient = x * tl.div_rn(1.0, scale)
    if KV == FP8:
        return e4m3_byte(quotient)
    clipped = tl.minimum(tl.maximum(quotient, -128.0), 127.0)
    return ((clipped + ROUND_TO_INTEGER) - ROUND_TO_INTEGER).to(tl.int32).to(tl.uint8)


@triton.jit
def numbers(code, KV: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """The numbers of a quantized cache's bytes, exact in float16; without HARDWARE_FP8 E4M3 numbers come out 2^-8 fold.

    E4M3 and float16 have their fields in one order, so a shift turns one into the other but for the exponent's bias
    (7 and 15). An int8 plus 128, put into the mantissa of 1024.0, is 1152 too large.
    """
    if KV == INT8:
        bits = (code ^ 0x80).to(tl.uint16) | 0x6400
        return bits.to(tl.float16, bitcast=True) - 1152.0
    if HARDWARE_FP8:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    wide = code.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def operand_of(tile, KV: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """A tile of a cache as the matrix units take it."""
    return tile if KV == NONE else numbers(tile, KV, HARDWARE_FP8)


@triton.jit
def query_operand(query, key_scale, head, dtype: tl.constexpr, KV: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr):
    """Float32 queries, already of values of the compute type ``dtype``, as the matrix units take them.

    ``UNIT``: what a code's number has to be multiplied by (:func:`numbers`).
    """
    if KV == NONE:
        return query.to(dtype)
    else:  # noqa: RET505 - without it Triton wants both results to be of one type
        scale = tl.load(key_scale + head * D + tl.arange(0, D))
        scaled = query * (scale * UNIT)[None, :]
        return tl.minimum(tl.maximum(scaled, -FLOAT16_MAX), FLOAT16_MAX).to(tl.float16)
