"""Lower attention to TensorScatter: caches are written in place, and attention reads them whole, under a mask.

This is the form in which TensorRT takes a cache (its KVCacheUpdate layer): consecutive slots from one start a row. The
mask says which slots a token sees; a slice of the cache would be a copy of it (docs/adr/0014). In a chunked layer the
slots are those of one chunk, ``p mod C``, so a call must not cross a chunk boundary (l4convert/runtime/calls.py).
"""

from __future__ import annotations

import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import attention_calls, clean_up, replace_node
from l4convert.plugins.long_context_attention import definition, kv_cache
from l4convert.plugins.long_context_attention.definition import AttentionSpec, Inputs
from l4convert.quantization.recipe import Recipe

# Up to so many slots TensorRT-RTX 1.7 has a kernel for one new token that reads the caches where they are. For larger
# ones it would copy keys and values for every query head; folded, it copies them once (docs/adr/0014).
SMALL_CACHE = 16384
# Widths of heads that its kernels take. Others are computed by several kernels, and folded ones not always build.
FUSED_WIDTHS = (64, 128)
# The first opset with TensorScatter (onnx/onnx docs/Changelog.md).
OPSET = 24


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Replace every call of ``l4convert::LongContextAttention`` that has static caches."""
    outcome = Outcome()
    for node, spec, inputs in attention_calls(model.graph):
        if spec.kv_cache != "static":
            outcome.skip(node.name, f"the cache is {spec.kv_cache}; only a static one can be written in place")
            continue
        b = Builder(node.name or "attention")
        replace_node(model.graph, node, b, build(b, spec, inputs))
        outcome.fired += 1
    if outcome.fired:
        for imports in (model.graph.opset_imports, *(f.opset_imports for f in model.functions.values())):
            imports[""] = max(OPSET, imports.get("", 0))
    clean_up(model)
    return outcome


def build(b: Builder, spec: AttentionSpec, inputs: Inputs) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Append the op as plain ONNX; returns (attention, present_key, present_value)."""
    heads = definition.prepare_heads(b, spec, inputs)
    new = b.dim(inputs.query, 1)
    past_tokens = b.op("Sub", b.dim(inputs.positions, 1), new)
    length = kv_cache.past_length(b, inputs.positions, past_tokens)
    start = b.op("Mod", length, b.constant(spec.chunk_size)) if spec.chunk_size else length
    first = b.op("Squeeze", start, b.constant([1]))
    key, value = (
        b.op("TensorScatter", past, b.op("Transpose", update, perm=[0, 2, 1, 3]), first, axis=2)
        for past, update in ((inputs.past_key, heads.key), (inputs.past_value, heads.value))
    )
    capacity = b.dim(inputs.past_key, 2)
    mask = visible_slots(b, start, new, capacity)
    small = 0 < spec.chunk_size <= SMALL_CACHE
    fold = spec.num_heads > spec.kv_num_heads and spec.head_dim in FUSED_WIDTHS and not small
    attend = _folded if fold else _direct
    return attend(b, spec, heads.query, key, value, mask, capacity), key, value


def _direct(
    b: Builder,
    spec: AttentionSpec,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    mask: ir.Value,
    capacity: ir.Value,
) -> ir.Value:
    """Query [B,S,Hq,D] against caches [B,Hk,capacity,D] under a mask [B,1,S,capacity]: [B,S,Hq*D]."""
    query = b.op("Transpose", query, perm=[0, 2, 1, 3])
    attention = b.op("Attention", query, key, value, mask, scale=spec.scale)
    return b.reshape(b.op("Transpose", attention, perm=[0, 2, 1, 3]), [0, 0, -1])


def _folded(
    b: Builder,
    spec: AttentionSpec,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    mask: ir.Value,
    capacity: ir.Value,
) -> ir.Value:
    """The same, with the query heads that share a key head as so many tokens of it: key and value need no copies."""
    group = spec.num_heads // spec.kv_num_heads
    query = b.reshape(query, [0, 0, spec.kv_num_heads, group, spec.head_dim])
    query = b.reshape(b.op("Transpose", query, perm=[0, 2, 3, 1, 4]), [0, spec.kv_num_heads, -1, spec.head_dim])
    each = b.op("Expand", b.op("Unsqueeze", mask, b.constant([2])), b.constant([1, 1, group, 1, 1]))
    mask = b.op("Reshape", each, b.op("Concat", b.constant([0, 1, -1]), capacity, axis=0))
    attention = b.op("Attention", query, key, value, mask, scale=spec.scale)
    attention = b.reshape(attention, [0, spec.kv_num_heads, group, -1, spec.head_dim])
    return b.reshape(b.op("Transpose", attention, perm=[0, 3, 1, 2, 4]), [0, 0, spec.num_heads * spec.head_dim])


def visible_slots(b: Builder, start: ir.Value, new: ir.Value, capacity: ir.Value) -> ir.Value:
    """Slots that each new token sees, bool [B,1,S,capacity]: those up to its own.

    Args:
        b: Where the nodes go.
        start: Slot of each row's first new token, int64 [B,1].
        new: S, int64 [1].
        capacity: Slots of the cache, int64 [1].
    """
    own = b.op("Add", start, b.op("Range", b.constant(0), b.op("Squeeze", new), b.constant(1)))
    slots = b.op("Range", b.constant(0), b.op("Squeeze", capacity), b.constant(1))
    visible = b.op("LessOrEqual", slots, b.op("Unsqueeze", own, b.constant([2])))
    return b.op("Unsqueeze", visible, b.constant([1]))
