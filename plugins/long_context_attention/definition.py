"""The definition of ``l4convert::LongContextAttention`` as plain ONNX: the frontend writes it, passes match it.

Inputs (B sequences, S new tokens, T tokens seen by the attention mask, D = head_dim, Hq and Hk heads):
    query [B,S,Hq*D], key and value [B,S,Hk*D]: projections, not yet rotated.
    past_key, past_value [B,Hk,P,D]: the cache before the call, in the form ``spec.kv_cache``; of the type that
        ``spec.kv_dtype`` is stored in, where it is quantized (INT4: [B,Hk,P,D/2]).
    positions [B,T] int64: each token's position in its sequence, counted from 0; -1 is padding. The last S are new.
    cos, sin [rows, D/2]: rotary tables, float32; RoPE layers only.
    key_scale, value_scale [1,Hk,1,D]: of the cache's elements, float32; quantized caches only.
Outputs: attention [B,S,Hq*D], present_key, present_value as the past, [B,Hk,P',D].
All but positions, tables, scales and quantized caches are of the type ``spec.compute``; rotation, norm and temperature
are float32 inside.

Query position p sees key position k when k <= p and, in a chunked layer, floor(k/C) == floor(p/C). In a chunked layer
``p mod C`` stands for p in the rotation: a score depends on the difference of two positions of one chunk only.

With a quantized cache new keys and values are quantized first, and attention reads them, like all others, as the cache
has them: what a token is given does not depend on how the text was split into calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import ComputeType, from_float32, to_float32
from l4convert.plugins.long_context_attention import kv_cache, quantized
from l4convert.quantization.kv import KvDtype

DOMAIN = "l4convert"
OP_TYPE = "LongContextAttention"
KvCache = Literal["growing", "windowed", "static"]


@dataclass(frozen=True)
class AttentionSpec:
    """The attributes of the op.

    Attributes:
        num_heads, kv_num_heads, head_dim: Hq, Hk and D.
        chunk_size: C, or 0 for a global layer.
        rope: Whether query and key are rotated (interleaved pairs).
        qk_norm_eps: Epsilon of the weightless RMS norm over D, or 0 for none.
        floor_scale, attn_scale: Temperature tuning of the query; attn_scale 0 for none.
        kv_cache: The form of the cache (DESIGN section 5).
        compute: The type of query, key, value and output, and of caches that are not quantized.
        kv_dtype: How the elements of a quantized cache are stored.
    """

    num_heads: int
    kv_num_heads: int
    head_dim: int
    chunk_size: int
    rope: bool
    qk_norm_eps: float
    floor_scale: float
    attn_scale: float
    kv_cache: KvCache
    compute: ComputeType = "float32"
    kv_dtype: KvDtype | Literal["none"] = "none"

    @property
    def overload(self) -> str:
        """Names the function among the variants of the op; layers of one kind share one function."""
        reach = f"chunked{self.chunk_size}" if self.chunk_size else "global"
        narrow = [x for x in (self.compute, self.kv_dtype) if x not in ("float32", "none")]
        return "_".join([reach, "rope" if self.rope else "nope", self.kv_cache, *narrow])

    @property
    def scale(self) -> float:
        """Of the scores: 1/sqrt(D)."""
        return float(self.head_dim**-0.5)


class Inputs(NamedTuple):
    """The op's inputs in order; the tables are None on layers without RoPE, the scales where caches are of floats."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    positions: ir.Value
    cos: ir.Value | None
    sin: ir.Value | None
    key_scale: ir.Value | None = None
    value_scale: ir.Value | None = None


def input_names(spec: AttentionSpec) -> tuple[str, ...]:
    """Fields of :class:`Inputs` that a call with these attributes has, in order."""
    given = {"cos": spec.rope, "sin": spec.rope}
    given |= dict.fromkeys(("key_scale", "value_scale"), spec.kv_dtype != "none")
    return tuple(name for name in Inputs._fields if given.get(name, True))


class Heads(NamedTuple):
    """New tokens, ready for scoring: query [B,S,Hq,D], key and value [B,S,Hk,D], their positions [B,S]."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    positions: ir.Value


def build(b: Builder, spec: AttentionSpec, inputs: Inputs) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Append the op as plain ONNX nodes; returns (attention, present_key, present_value)."""
    heads = prepare_heads(b, spec, inputs)
    new_key = b.op("Transpose", heads.key, perm=[0, 2, 1, 3])
    new_value = b.op("Transpose", heads.value, perm=[0, 2, 1, 3])
    step = kv_cache.Step(new_key, new_value, heads.positions, inputs.past_key, inputs.past_value, inputs.positions)
    join = _plain if spec.kv_dtype == "none" else _quantized
    cache = join(b, spec, step, inputs)
    mask = visibility(b, spec, heads.positions, cache.positions)
    query = b.op("Transpose", heads.query, perm=[0, 2, 1, 3])
    attention = b.op(
        "Attention", query, cache.key, cache.value, b.op("Unsqueeze", mask, b.constant([1])), scale=spec.scale
    )
    merged = b.reshape(b.op("Transpose", attention, perm=[0, 2, 1, 3]), [0, 0, -1])
    return merged, cache.present_key, cache.present_value


def _plain(b: Builder, spec: AttentionSpec, step: kv_cache.Step, inputs: Inputs) -> kv_cache.Cache:
    """Join past and new tokens in the form of the cache."""
    return kv_cache.FORMS[spec.kv_cache](b, spec.chunk_size, step)


def _quantized(b: Builder, spec: AttentionSpec, step: kv_cache.Step, inputs: Inputs) -> kv_cache.Cache:
    """The same in codes; what is attended to is dequantized after it was joined, and cut, as codes."""
    assert spec.kv_dtype != "none"
    dtype, scales = spec.kv_dtype, (_given(inputs.key_scale), _given(inputs.value_scale))
    key, value = (
        quantized.quantize(b, dtype, to_float32(b, x, spec.compute), scale, spec.head_dim)
        for x, scale in zip((step.key, step.value), scales, strict=True)
    )
    past_key, past_value = (quantized.join_form(b, dtype, x) for x in (step.past_key, step.past_value))
    cache = _plain(b, spec, step._replace(key=key, value=value, past_key=past_key, past_value=past_value), inputs)
    seen_key, seen_value = (
        from_float32(b, quantized.dequantize(b, dtype, x, scale, spec.head_dim), spec.compute)
        for x, scale in zip((cache.key, cache.value), scales, strict=True)
    )
    present_key, present_value = (quantized.store_form(b, dtype, x) for x in (cache.present_key, cache.present_value))
    return kv_cache.Cache(seen_key, seen_value, cache.positions, present_key, present_value)


def _given(scale: ir.Value | None) -> ir.Value:
    assert scale is not None  # a quantized cache has it
    return scale


def prepare_heads(b: Builder, spec: AttentionSpec, inputs: Inputs) -> Heads:
    """Split into heads and apply RoPE, QK norm and temperature (transformers ``Llama4TextAttention.forward``)."""
    new_tokens = b.op("Neg", b.dim(inputs.query, 1))
    positions = b.slice(inputs.positions, new_tokens, None, axis=1)
    query, key = inputs.query, inputs.key
    query_is_changed = spec.rope or bool(spec.qk_norm_eps) or bool(spec.attn_scale)
    key_is_changed = spec.rope or bool(spec.qk_norm_eps)
    if query_is_changed:
        query = to_float32(b, query, spec.compute)
    if key_is_changed:
        key = to_float32(b, key, spec.compute)
    if spec.rope:
        row = b.op("Max", positions, b.constant(0))  # padding has position -1, which no table has
        if spec.chunk_size:
            row = b.op("Mod", row, b.constant(spec.chunk_size))
        # Rows are gathered here: given the whole table, ONNX Runtime refuses calls longer than it has rows.
        cos, sin = (b.op("Gather", table, row, axis=0) for table in (inputs.cos, inputs.sin))
        query = b.op("RotaryEmbedding", query, cos, sin, interleaved=1, num_heads=spec.num_heads)
        key = b.op("RotaryEmbedding", key, cos, sin, interleaved=1, num_heads=spec.kv_num_heads)
    query = b.reshape(query, [0, 0, spec.num_heads, spec.head_dim])
    key = b.reshape(key, [0, 0, spec.kv_num_heads, spec.head_dim])
    value = b.reshape(inputs.value, [0, 0, spec.kv_num_heads, spec.head_dim])
    if spec.qk_norm_eps:
        ones = b.constant(np.ones(spec.head_dim), np.float32)
        query = b.op("RMSNormalization", query, ones, axis=-1, epsilon=spec.qk_norm_eps)
        key = b.op("RMSNormalization", key, ones, axis=-1, epsilon=spec.qk_norm_eps)
    if spec.attn_scale:
        query = b.op("Mul", query, temperature(b, spec, positions))
    if query_is_changed:
        query = from_float32(b, query, spec.compute)
    if key_is_changed:
        key = from_float32(b, key, spec.compute)
    return Heads(query, key, value, positions)


def temperature(b: Builder, spec: AttentionSpec, positions: ir.Value) -> ir.Value:
    """``1 + attn_scale * ln(1 + floor((p+1) / floor_scale))`` for positions [B,S], shaped [B,S,1,1].

    Source: transformers ``modeling_llama4.py``, after arXiv:2501.19399. The quotient is taken in float32 as there.
    """
    count = b.op("Cast", b.op("Add", positions, b.constant(1)), to=int(ir.DataType.FLOAT))
    steps = b.op("Floor", b.op("Div", count, b.constant(spec.floor_scale, np.float32)))
    log = b.op("Log", b.op("Add", steps, b.constant(1.0, np.float32)))
    scale = b.op("Add", b.op("Mul", log, b.constant(spec.attn_scale, np.float32)), b.constant(1.0, np.float32))
    return b.op("Unsqueeze", scale, b.constant([2, 3]))


def visibility(b: Builder, spec: AttentionSpec, query_positions: ir.Value, key_positions: ir.Value) -> ir.Value:
    """Which keys each query sees: bool [B,S,K].

    A token sees tokens of its own segment at or before its own position. Real tokens of one chunk are one segment (of
    one sequence, in a global layer). Padding (-1) is a segment of its own, so a padded row is never empty and stays
    finite, and unwritten slots of a static cache (below -1) are one that no query is in.
    """
    query = b.op("Unsqueeze", query_positions, b.constant([2]))
    key = b.op("Unsqueeze", key_positions, b.constant([1]))
    causal = b.op("LessOrEqual", key, query)
    if spec.chunk_size:
        size = b.constant(spec.chunk_size)  # position + C keeps the truncating division a floor
        segments = [b.op("Div", b.op("Add", x, size), size) for x in (key, query)]
    else:
        segments = [b.op("Min", x, b.constant(0)) for x in (key, query)]
    return b.op("And", causal, b.op("Equal", *segments))
