"""Elements of a quantized cache as plain ONNX: how they are made, joined and read (l4convert/quantization/kv.py).

A code is ``round_half_even(x * (1 / scale))`` in float32, clipped: the reciprocal, because ONNX Runtime's kernels
multiply with it, and so every bit of a cache is the same whichever of the two wrote it (docs/adr/0017).

Caches are sliced, joined and scattered in a *joinable* type: the stored one for integers, packed as they are, and
float16 for FP8, whose numbers it holds exactly. ONNX Runtime can do little more with FP8 than cast it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.quantization.kv import KV_FORMATS, KvDtype

# What is added to an INT4 code, so that it is none below zero; and what the second code of a byte is multiplied by.
INT4_OFFSET = 8.0
INT4_SHIFT = 16.0


def join_form(b: Builder, dtype: KvDtype, stored: ir.Value) -> ir.Value:
    """A stored cache as the operators that move elements take it."""
    return b.op("Cast", stored, to=int(ir.DataType.FLOAT16)) if dtype == "fp8" else stored


def store_form(b: Builder, dtype: KvDtype, joined: ir.Value) -> ir.Value:
    """A cache as it is stored; exact."""
    return b.op("Cast", joined, to=int(KV_FORMATS[dtype].storage)) if dtype == "fp8" else joined


def codes_of(b: Builder, dtype: KvDtype, values: ir.Value, scale: ir.Value) -> ir.Value:
    """Codes of float32 values, still in float32; ``scale`` broadcasts to them."""
    quotient = b.op("Mul", values, b.op("Div", b.constant(1.0, np.float32), scale))
    elements = KV_FORMATS[dtype]
    if dtype == "fp8":
        rounded = b.op("Cast", quotient, to=int(elements.storage), saturate=1)
        return b.op("Cast", rounded, to=int(ir.DataType.FLOAT))
    lowest, highest = (b.constant(x, np.float32) for x in (elements.lowest, elements.highest))
    return b.op("Clip", b.op("Round", quotient), lowest, highest)


def quantize(b: Builder, dtype: KvDtype, values: ir.Value, scale: ir.Value, head_dim: int) -> ir.Value:
    """Keys or values [B,Hk,S,D] in joinable form.

    Args:
        b: Receives the nodes.
        dtype: Format of the elements.
        values: float32.
        scale: float32 [1,Hk,1,D].
        head_dim: D.
    """
    codes = codes_of(b, dtype, values, scale)
    if dtype == "fp8":
        return b.op("Cast", codes, to=int(ir.DataType.FLOAT16))
    return b.op("Cast", pack(b, codes, head_dim) if dtype == "int4" else codes, to=int(KV_FORMATS[dtype].storage))


def dequantize(b: Builder, dtype: KvDtype, joined: ir.Value, scale: ir.Value, head_dim: int) -> ir.Value:
    """Keys or values [B,Hk,K,D] in float32, from the joinable form."""
    codes = b.op("Cast", joined, to=int(ir.DataType.FLOAT))
    return b.op("Mul", unpack(b, codes, head_dim) if dtype == "int4" else codes, scale)


def pack(b: Builder, codes: ir.Value, head_dim: int) -> ir.Value:
    """Codes [B,Hk,S,D] of -8..7 as bytes [B,Hk,S,D/2], all of them in float32: element 2j is the low half of byte j."""
    pairs = b.reshape(b.op("Add", codes, b.constant(INT4_OFFSET, np.float32)), [0, 0, 0, head_dim // 2, 2])
    weighted = b.op("Mul", pairs, b.constant([1.0, INT4_SHIFT], np.float32))
    return b.op("ReduceSum", weighted, b.constant([-1]), keepdims=0)


def unpack(b: Builder, packed: ir.Value, head_dim: int) -> ir.Value:
    """The inverse of :func:`pack`."""
    shift = b.constant(INT4_SHIFT, np.float32)
    high = b.op("Floor", b.op("Mul", packed, b.constant(1 / INT4_SHIFT, np.float32)))
    low = b.op("Sub", packed, b.op("Mul", high, shift))
    halves = b.op("Concat", *(b.op("Unsqueeze", half, b.constant([-1])) for half in (low, high)), axis=-1)
    return b.op("Sub", b.reshape(halves, [0, 0, -1, head_dim]), b.constant(INT4_OFFSET, np.float32))
