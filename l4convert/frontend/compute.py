"""The type that a graph computes in: that of activations and caches. What it would blur is float32 between casts."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from l4convert.frontend.builder import Builder

ComputeType = Literal["float32", "bfloat16", "float16"]
COMPUTE_TYPES: dict[ComputeType, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "bfloat16": ir.DataType.BFLOAT16,
    "float16": ir.DataType.FLOAT16,
}


def to_float32(b: Builder, value: ir.Value, compute: ComputeType) -> ir.Value:
    """``value``, which is of the compute type, in float32."""
    return value if compute == "float32" else b.op("Cast", value, to=int(ir.DataType.FLOAT))


def from_float32(b: Builder, value: ir.Value, compute: ComputeType) -> ir.Value:
    """``value``, which is float32, in the compute type."""
    return value if compute == "float32" else b.op("Cast", value, to=int(COMPUTE_TYPES[compute]))


def compute_type(graph: ir.Graph) -> ComputeType:
    """The type of a decoder's caches, which is the one it computes in; float32 for a graph without any."""
    names = {dtype: name for name, dtype in COMPUTE_TYPES.items()}
    return next((names[value.dtype] for value in graph.inputs if value.dtype in names), "float32")
