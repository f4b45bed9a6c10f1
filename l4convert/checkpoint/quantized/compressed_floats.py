"""compressed-tensors' formats of floating-point codes: FP8, NVFP4, MXFP4 and MXFP8.

FP8 has scales of any granularity (compressed_tensors/compressors/naive_quantized); NVFP4 has E4M3 scales of 16 elements
along K, which one float32 scale of the tensor divides (compressed_tensors/compressors/nvfp4); the scales of the MX
formats are powers of two (compressed_tensors/compressors/mx_utils.py).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.fields import Fields
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.prequantized import Prequantized
from l4convert.checkpoint.quantized.compressed_scales import read_scales
from l4convert.checkpoint.quantized.floats import NVFP4_BLOCK, Finite, Nested, UnpackedE2M1, nvfp4_weight
from l4convert.checkpoint.quantized.source import Source, matrix

E4M3 = ir.DataType.FLOAT8E4M3FN


def read_fp8(source: Source, weights: Fields, weight: str, per_token: bool, exponents: bool = False) -> LazyTensor:
    """A weight [N, K] of format ``float-quantized`` or ``naive-quantized``: ``weight`` and ``weight_scale``.

    Args:
        source: The tensors.
        weights: The scheme of weights.
        weight: Its name.
        per_token: The scheme rounds activations token by token, too (:func:`rounds_per_token`).
        exponents: The format is ``mxfp8-quantized``: scales are powers of two.
    """
    _require_type(weights, 8)
    codes = source.require(weight, (E4M3,), matrix(source, weight))
    scales, block_size = read_scales(source, weights, weight, exponents)
    return Prequantized(Finite(codes), scales, block_size, activations=per_token and block_size == codes.dims[1])


def read_mxfp4(source: Source, weights: Fields, weight: str) -> LazyTensor:
    """A weight [N, K] of format ``mxfp4-pack-quantized``: bytes of two codes, and a power of two for each group."""
    rows, depth = matrix(source, weight)
    _require_type(weights, 4)
    scales, block_size = read_scales(source, weights, weight, exponents=True)
    packed = source.require(f"{weight}_packed", (ir.DataType.UINT8,), (rows, -(-depth // 2)))
    if depth % 2:
        weights.fail("format", f"packs pairs, but a row has {depth} elements")
    return Prequantized(UnpackedE2M1(packed), scales, block_size)


def read_nvfp4(source: Source, weights: Fields, weight: str) -> LazyTensor:
    """A weight [N, K] of format ``nvfp4-pack-quantized``: bytes of two codes, block scales and the tensor's scale."""
    rows, depth = matrix(source, weight)
    _require_type(weights, 4)
    if weights.integer("group_size", NVFP4_BLOCK) != NVFP4_BLOCK or depth % NVFP4_BLOCK:
        weights.fail("group_size", f"is not {NVFP4_BLOCK}, or does not divide a row of {depth}")
    packed = source.require(f"{weight}_packed", (ir.DataType.UINT8,), (rows, depth // 2))
    blocks = source.require(f"{weight}_scale", (E4M3,), (rows, depth // NVFP4_BLOCK))
    whole = source.require(f"{weight}_global_scale", (ir.DataType.FLOAT,), (1,))
    return nvfp4_weight(packed, Nested(Finite(blocks), Finite(whole), np.divide))


def rounds_per_token(inputs: Fields | None) -> bool:
    """Whether a scheme's ``input_activations`` are FP8 with a scale for every token, found as it comes.

    Static scales, and those of groups of a token's elements, are not what an artifact has: it leaves such inputs as
    they are.
    """
    wanted = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    return inputs is not None and all(inputs.get(key, None) == value for key, value in wanted.items())


def _require_type(weights: Fields, bits: int) -> None:
    if weights.integer("num_bits", 8) != bits or weights.get("type", "int") != "float":
        weights.fail("num_bits", f"and type are not {bits} and 'float', as the format has them")
    if not weights.boolean("symmetric", True):
        weights.fail("symmetric", "is false: floating-point codes with zero points are not supported")
