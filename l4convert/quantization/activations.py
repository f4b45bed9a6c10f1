"""Dynamic activation quantization as graph nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import ComputeType, from_float32, to_float32

E4M3_MAX = 448.0  # largest finite float8_e4m3fn (OCP 8-bit Floating Point Specification, table 1)
# Keeps the scale of an all-zero token (a token that an expert was not chosen for) from being zero.
SMALLEST_MAGNITUDE = 1e-12


def token_scales(b: Builder, value: ir.Value) -> ir.Value:
    """absmax/448 of each token: float32 [..., 1] for float32 [..., width]."""
    magnitude = b.op("ReduceMax", b.op("Abs", value), b.constant([-1]), keepdims=1)
    magnitude = b.op("Max", magnitude, b.constant(SMALLEST_MAGNITUDE, np.float32))
    return b.op("Div", magnitude, b.constant(E4M3_MAX, np.float32))


def round_per_token(b: Builder, value: ir.Value, width: int, compute: ComputeType) -> ir.Value:
    """Append ``QuantizeLinear``/``DequantizeLinear`` to E4M3 with one scale, absmax/448, for each token.

    Args:
        b: Where the nodes go.
        value: [..., width]; the last axis is one token's features.
        width: Size of the last axis: one quantization block.
        compute: The type of ``value``; the scale is computed in float32.

    Returns:
        The rounded value, same shape and dtype.
    """
    value = to_float32(b, value, compute)
    scale = token_scales(b, value)
    quantized = b.op(
        "QuantizeLinear", value, scale, axis=-1, block_size=width, output_dtype=int(ir.DataType.FLOAT8E4M3FN)
    )
    return from_float32(b, b.op("DequantizeLinear", quantized, scale, axis=-1, block_size=width), compute)
