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


# Where a graph says what it computes in when its caches do not (``ir.Graph.metadata_props``).
_RECORD = "l4convert.compute"


def compute_type(graph: ir.Graph) -> ComputeType:
    """The type of a decoder's caches, which is the one it computes in, or what was recorded before it quantized them.

    float32 for a graph without any.
    """
    recorded = graph.metadata_props.get(_RECORD)
    for name, dtype in COMPUTE_TYPES.items():
        if recorded == name or (recorded is None and _first_float(graph) == dtype):
            return name
    return "float32"


def _first_float(graph: ir.Graph) -> ir.DataType | None:
    return next((value.dtype for value in graph.inputs if value.dtype in COMPUTE_TYPES.values()), None)


def record_compute_type(graph: ir.Graph, compute: ComputeType | None = None) -> None:
    """Write down :func:`compute_type`, or what is given, for when no cache tells it (any more)."""
    graph.metadata_props[_RECORD] = compute or compute_type(graph)
