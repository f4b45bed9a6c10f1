"""ONNX Runtime's ``com.microsoft.GroupQueryAttention`` as a node: what it is told about a call, and its operands.

Source of inputs and attributes: github.com/microsoft/onnxruntime, docs/ContribOperators.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import COMPUTE_TYPES
from l4convert.plugins.long_context_attention.definition import AttentionSpec, Heads, Inputs
from l4convert.quantization.kv import KV_FORMATS

CONTRIB = "com.microsoft"
Outputs = tuple[ir.Value, ir.Value, ir.Value]


class Call(NamedTuple):
    """One call of the kernel, as the graph around it computes it.

    Attributes:
        applies: bool [1], whether the kernel can do it.
        last: int32 [B] or [B,1], the index of each sequence's last slot after the call.
        total: int32 [], the largest number of slots after the call.
        held: int64 [B,K], the positions in the slots that are attended to; appended caches only.
        start: int64 [1], the first of those slots in the past, where that is not the first of all.
        tables: cos and sin [rows,D/2] in the compute type, where the kernel rotates.
        masked: The kernel is given a mask.
        again: int64 [1], how many of the last tokens of the past are given to the kernel once more; static caches only.
        past: int64 [], the largest number of slots before the call; where ``again`` is there.
    """

    applies: ir.Value
    last: ir.Value
    total: ir.Value
    held: ir.Value | None = None
    start: ir.Value | None = None
    tables: tuple[ir.Value, ...] = ()
    masked: bool = False
    again: ir.Value | None = None
    past: ir.Value | None = None


def group_query_attention(
    b: Builder,
    spec: AttentionSpec,
    heads: Heads,
    inputs: Inputs,
    call: Call,
    bias: ir.Value | None,
    prepares: bool,
) -> Outputs:
    """Append the contrib op.

    Args:
        inputs: The op's; of the past only the slots that are attended to.
        bias: [B,1,S,total] added to the scores, or None for plain causal attention.
        prepares: The op itself rotates and norms query and key.
    """
    flat = [b.reshape(x, [0, 0, -1]) for x in (heads.query, heads.key, heads.value)]
    optional: dict[str, ir.Value | None] = dict.fromkeys(_OPTIONAL)
    attributes: dict[str, Any] = {}
    optional["attention_bias"] = bias
    if prepares and spec.rope:
        optional["cos_cache"], optional["sin_cache"] = call.tables
        attributes |= {"do_rotary": 1, "rotary_interleaved": 1}
    if prepares and spec.qk_norm_eps:
        ones = b.constant(np.ones(spec.head_dim), COMPUTE_TYPES[spec.compute].numpy())
        optional["q_norm_weight"] = optional["k_norm_weight"] = ones
        attributes["qk_norm_epsilon"] = spec.qk_norm_eps
    if spec.kv_dtype != "none":
        optional["k_scale"], optional["v_scale"] = inputs.key_scale, inputs.value_scale
        bits = 8 // KV_FORMATS[spec.kv_dtype].packing
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": bits}
    given = [*flat, inputs.past_key, inputs.past_value, call.last, call.total, *optional.values()]
    while given[-1] is None:
        given.pop()
    outputs = b.node(
        "GroupQueryAttention",
        given,
        outputs=3,
        domain=CONTRIB,
        num_heads=spec.num_heads,
        kv_num_heads=spec.kv_num_heads,
        scale=spec.scale,
        **attributes,
    )
    return outputs[0], outputs[1], outputs[2]


# Inputs 7 and up of the op's schema, in order.
_OPTIONAL = (
    *("cos_cache", "sin_cache", "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale"),
    *("q_norm_weight", "k_norm_weight"),
)
