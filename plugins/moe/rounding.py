"""Rounding to E4M3 with one scale a row, as ``quantization/activations.py`` writes it in ONNX."""

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
# Keeps the scale of a row of zeros from being zero: SMALLEST_MAGNITUDE of quantization/activations.py.
SMALLEST = tl.constexpr(1e-12)


@triton.jit
def fp8_scale(largest):
    """absmax / 448."""
    return tl.div_rn(tl.maximum(largest, SMALLEST), E4M3_MAX)


@triton.jit
def fp8_codes(values, scale):
    """float8e4nv: float32 values over the scale, to the nearest code, halves to even, at most +-448.

    The rounding is done in float32, so that the cast is exact: Triton's interpreter neither rounds nor saturates there.
    """
    scaled = tl.div_rn(values, tl.zeros_like(values) + scale)
    scaled = tl.maximum(scaled, -E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)  # what is no number stays none
    scaled = tl.minimum(scaled, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    # The step between codes: 2^-3 of the power of two below, and no smaller than that of 2^-6, the least normal number.
    exponent = tl.maximum((scaled.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127 - 6)
    step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    # A sum of this size has no bits below the step: adding rounds, taking away is exact.
    large = step * 12582912.0
    return ((scaled + large) - large).to(tl.float8e4nv)
