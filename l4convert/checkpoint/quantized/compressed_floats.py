"""compressed-tensors' formats of floating-point codes: ``float-quantized`` (FP8) and ``nvfp4-pack-quantized``.

FP8 has one scale for a tensor, for each output channel, or for each block of rows and columns
(compressed_tensors/compressors/naive_quantized); NVFP4 has E4M3 scales of 16 elements along K, which one float32 scale
of the tensor divides (compressed_tensors/compressors/nvfp4).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.fields import Fields
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.names import Shape
from l4convert.checkpoint.prequantized import Prequantized
from l4convert.checkpoint.quantized.floats import (
    NVFP4_BLOCK,
    Finite,
    Nested,
    Repeated,
    e4m3_weight,
    nvfp4_weight,
)
from l4convert.checkpoint.quantized.source import FLOAT_SCALES, Source, matrix
from l4convert.checkpoint.text import quote

E4M3 = ir.DataType.FLOAT8E4M3FN


def read_fp8(source: Source, weights: Fields, weight: str, per_token: bool) -> LazyTensor:
    """A weight [N, K] of format ``float-quantized``: ``weight`` and ``weight_scale``.

    Args:
        source: The tensors.
        weights: The scheme of weights.
        weight: Its name.
        per_token: The scheme rounds activations token by token, too (:func:`rounds_per_token`).
    """
    rows, depth = matrix(source, weight)
    _require_type(weights, 8)
    codes = source.require(weight, (E4M3,), (rows, depth))
    strategy = weights.get("strategy", "tensor")
    name = f"{weight}_scale"
    if strategy == "block":
        return _in_blocks(source, weights, codes, name)
    found = source.stored.get(name)
    possible: Mapping[object, tuple[Shape, ...]] = {"tensor": ((1,), (), (1, 1)), "channel": ((rows, 1), (rows,))}
    shapes = possible.get(strategy) if isinstance(strategy, str) else None
    if shapes is None:
        weights.fail("strategy", f"is {quote(strategy)}: not supported for FP8", "supported: tensor, channel, block")
    shape = found.dims if found is not None and found.dims in shapes else shapes[0]
    return e4m3_weight(codes, source.require(name, FLOAT_SCALES, shape), per_token)


def _in_blocks(source: Source, weights: Fields, codes: LazyTensor, name: str) -> LazyTensor:
    rows, depth = codes.dims
    given = weights.array("block_structure") or []
    if len(given) != 2:
        weights.fail("block_structure", f"is {quote(given)}, expected rows and columns of a block")
    height, width = (weights.checked_integer(f"block_structure[{i}]", size, 1, 1 << 20) for i, size in enumerate(given))
    scales = Finite(source.require(name, FLOAT_SCALES, (-(-rows // height), -(-depth // width))))
    return Prequantized(Finite(codes), Repeated(scales, (rows, scales.dims[1]), height), min(width, depth))


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
