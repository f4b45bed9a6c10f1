"""Checkpoints that transformers saves after quantizing with FBGEMM: ``quant_method: fbgemm_fp8``.

Every matrix has E4M3 codes and one float32 scale for each output channel, beside it under ``NAME_scale``. Experts stay
stacked, [E, K, N]; the scales of ``gate_up_proj`` are [E, 1, N], those of ``down_proj`` [E, N, 1]
(transformers/integrations/fbgemm_fp8.py). ``activation_scale_ub`` bounds the scales of activations, which are found
token by token; here they have no bound.
"""

from __future__ import annotations

import onnx_ir as ir

from l4convert.checkpoint.combiners import transposed
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.names import Shape
from l4convert.checkpoint.quantized.floats import e4m3_weight
from l4convert.checkpoint.quantized.source import FLOAT_SCALES, ReadWeights, Source, summary

NAME = "fbgemm_fp8"


def read(source: Source) -> ReadWeights:
    """The weights that the checkpoint stores quantized; the others stay in ``source.stored``."""
    tensors: dict[str, LazyTensor] = {}
    for weight, shape in source.expected.items():
        if f"{weight}_scale" in source.stored:
            source.require_axes(weight, f"{weight}_scale")
            tensors[weight] = _weight(source, weight, shape)
    return ReadWeights(tensors, summary(NAME, tensors, source.expected))


def _weight(source: Source, weight: str, shape: Shape) -> LazyTensor:
    codes = source.require(weight, (ir.DataType.FLOAT8E4M3FN,), shape)
    name = f"{weight}_scale"
    if len(shape) == 2:
        return e4m3_weight(codes, source.require(name, FLOAT_SCALES, (shape[0], 1)), activations=True)
    experts, _, width = shape
    if weight.endswith("gate_up_proj"):
        scales: LazyTensor = transposed(source.require(name, FLOAT_SCALES, (experts, 1, width)))
    else:
        scales = source.require(name, FLOAT_SCALES, (experts, width, 1))
    return transposed(e4m3_weight(transposed(codes), scales, activations=True))
