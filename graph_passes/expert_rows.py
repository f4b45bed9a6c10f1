"""Rows for experts, which both lowerings of MoE to standard operators begin and end with.

With top-k experts a token, row ``t*k + i`` is token t on its way to its i-th choice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import from_float32, to_float32
from l4convert.plugins.moe.definition import Inputs, MoESpec


class SortedRows(NamedTuple):
    """Where R rows are when they are sorted by expert; all int64.

    Attributes:
        counts: Rows of each expert, [E].
        starts: Where each expert's rows begin, and ``ends`` where they end, [E].
        place: Of each row, [R].
    """

    counts: ir.Value
    starts: ir.Value
    ends: ir.Value
    place: ir.Value


def scaled_rows(b: Builder, spec: MoESpec, inputs: Inputs) -> tuple[ir.Value, ir.Value]:
    """Every row's input [R,H], the token times its score, and the expert that it goes to, int64 [R]."""
    top, chosen = b.node("TopK", [inputs.router_logits, b.constant([spec.top_k])], outputs=2, axis=-1)
    x = b.op("Unsqueeze", to_float32(b, inputs.x, spec.compute), b.constant([1]))
    scaled = b.op("Mul", x, b.op("Unsqueeze", b.op("Sigmoid", top), b.constant([2])))
    scaled = b.reshape(from_float32(b, scaled, spec.compute), [-1, spec.hidden_size])
    return scaled, b.reshape(chosen, [-1])


def sort_rows(b: Builder, spec: MoESpec, chosen: ir.Value) -> SortedRows:
    """Sort rows by expert, in order within one, with running counts.

    TensorRT's own sort, TopK, takes no more than 3840 elements.

    Args:
        b: Where the nodes go.
        spec: The op's attributes.
        chosen: The expert of each row, int64 [R].
    """
    hit = b.op("Equal", b.op("Unsqueeze", chosen, b.constant([1])), b.constant(np.arange(spec.num_experts)))
    one_hot = b.op("Cast", hit, to=int(ir.DataType.INT64))
    counts = b.op("ReduceSum", one_hot, b.constant([0]), keepdims=0)
    ends = b.op("CumSum", counts, b.constant(0))
    starts = b.op("Sub", ends, counts)
    nth = b.op("Sub", b.op("CumSum", one_hot, b.constant(0)), b.constant(1))
    place = b.op("ReduceSum", b.op("Mul", one_hot, b.op("Add", nth, starts)), b.constant([1]), keepdims=0)
    return SortedRows(counts, starts, ends, place)


def sum_choices(b: Builder, spec: MoESpec, rows: ir.Value) -> ir.Value:
    """The outputs of all rows [R,H] as those of tokens: the sum over each token's experts."""
    if spec.top_k == 1:
        return rows
    grouped = b.reshape(to_float32(b, rows, spec.compute), [-1, spec.top_k, spec.hidden_size])
    return from_float32(b, b.op("ReduceSum", grouped, b.constant([1]), keepdims=0), spec.compute)
