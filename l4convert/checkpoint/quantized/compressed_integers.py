"""compressed-tensors' formats of integer codes: packed into words, or one a byte.

``pack-quantized`` is compressed_tensors/compressors/pack_quantized; ``int-quantized`` and ``naive-quantized``, which
schemes with rounded activations have, are compressed_tensors/compressors/naive_quantized.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.fields import Fields
from l4convert.checkpoint.lazy import Derived, LazyTensor
from l4convert.checkpoint.prequantized import Prequantized
from l4convert.checkpoint.quantized.compressed_scales import read_scales, strategy_of
from l4convert.checkpoint.quantized.packed import PACKED_TYPES, Unpacked, UnpackedRows
from l4convert.checkpoint.quantized.source import Source, checked, matrix, where
from l4convert.checkpoint.text import quote
from l4convert.errors import InputError

SUPPORTED = "supported: 4-bit and 8-bit integers, FP8, MXFP8, NVFP4 and MXFP4"


def read_packed(source: Source, weights: Fields, weight: str) -> LazyTensor:
    """A weight [N, K] of format ``pack-quantized``: ``weight_packed``, ``weight_scale``, ``weight_shape``, perhaps
    ``weight_zero_point`` and ``weight_g_idx``."""
    rows, depth = matrix(source, weight)
    bits = _bits(weights)
    scales, block_size = read_scales(source, weights, weight)
    words = source.require(f"{weight}_packed", (ir.DataType.INT32,), (rows, -(-depth * bits // 32)))
    shape = source.require(f"{weight}_shape", (ir.DataType.INT64, ir.DataType.INT32), (2,))
    # A read for each of thousands of modules, but safetensors puts all tensors of 8-byte elements side by side.
    if (given := tuple(shape.numpy().tolist())) != (rows, depth):
        raise InputError(f"{where(shape)} is {list(given)}, config.json makes the weight {[rows, depth]}")
    zero_points = _zero_points(source, weights, weight, bits, scales)
    groups = source.take(f"{weight}_g_idx")
    if groups is not None:
        checked(groups, (ir.DataType.INT32,), (depth,))
    return Prequantized(Unpacked(words, bits, depth), scales, block_size, zero_points, groups)


def read_bytes(source: Source, weights: Fields, weight: str) -> LazyTensor:
    """A weight [N, K] of format ``int-quantized``: ``weight``, ``weight_scale``, perhaps ``weight_zero_point``."""
    bits = _bits(weights)
    codes = source.require(weight, (ir.DataType.INT8,), matrix(source, weight))
    scales, block_size = read_scales(source, weights, weight)
    zero_points = _zero_points(source, weights, weight, bits, scales)
    return Prequantized(Narrowed(codes) if bits == 4 else codes, scales, block_size, zero_points)


class Narrowed(Derived):
    """INT8 codes of a 4-bit scheme as INT4; one that is beyond 4 bits raises InputError."""

    def __init__(self, codes: LazyTensor) -> None:
        super().__init__([codes], ir.DataType.INT4, codes.dims, codes.matrix)

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        codes = self.parts[0].tile(batch, rows, cols)
        if codes.size and not -8 <= codes.min() <= codes.max() <= 7:
            raise InputError(f"{self.origin} has codes beyond the 4 bits of its scheme")
        return codes.astype(ml_dtypes.int4)


def _bits(weights: Fields) -> int:
    bits = weights.integer("num_bits", 8)
    if bits not in PACKED_TYPES or weights.get("type", "int") != "int":
        weights.fail("num_bits", f"is {bits} of type {quote(weights.get('type', 'int'))}: not supported", SUPPORTED)
    return bits


def _zero_points(source: Source, weights: Fields, weight: str, bits: int, scales: LazyTensor) -> LazyTensor | None:
    """Those of an asymmetric scheme: packed along the rows, or one a byte; [N, ceil(K / block size)]."""
    if weights.boolean("symmetric", True):
        return None
    if strategy_of(weights) not in ("channel", "group"):
        weights.fail("symmetric", "is false, which is supported for groups and channels only")
    name, (rows, blocks) = f"{weight}_zero_point", scales.dims
    stored = source.stored.get(name)
    if stored is not None and stored.dtype == ir.DataType.INT8:
        return source.require(name, (ir.DataType.INT8,), (rows, blocks))
    words = source.require(name, (ir.DataType.INT32,), (-(-rows * bits // 32), blocks))
    return UnpackedRows(words, bits, rows)
