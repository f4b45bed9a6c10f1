"""The C interface's structures (moe/launch.h, long_context_attention/launch.h), as ctypes has them."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64
from ctypes import c_void_p as address

FLOATS = {"bf16": 0, "fp16": 1}
WEIGHTS = {"plain": 0, "int4": 1, "fp8": 2}
KV_DTYPES = {"none": 0, "fp8": 1, "int8": 2}


class Moe(Structure):
    """``l4_moe``: sizes, and members of :data:`FLOATS` and :data:`WEIGHTS`."""

    _fields_ = tuple(
        (name, c_int32)
        for name in (
            "num_experts",
            "hidden_size",
            "intermediate_size",
            "top_k",
            "compute",
            "weights",
            "gate_up_block",
            "down_block",
        )
    )


class MoeBuffers(Structure):
    """``l4_moe_buffers``: addresses; those of absent scales are None."""

    _fields_ = tuple(
        (name, address)
        for name in ("x", "router_logits", "gate_up", "gate_up_scale", "down", "down_scale", "y", "workspace")
    )


class Attention(Structure):
    """``l4_attention``; ``chunk_size`` 0 is a global layer."""

    _fields_ = (
        *((name, c_int32) for name in ("num_heads", "kv_num_heads", "head_dim", "chunk_size", "rope")),
        *((name, c_float) for name in ("qk_norm_eps", "floor_scale", "attn_scale")),
        *((name, c_int32) for name in ("compute", "kv_dtype")),
    )


class AttentionShape(Structure):
    """``l4_attention_shape``."""

    _fields_ = tuple((name, c_int64) for name in ("batch", "new_tokens", "seen_tokens", "capacity", "table_rows"))


class AttentionBuffers(Structure):
    """``l4_attention_buffers``: addresses; those that a call has no use for are None."""

    _fields_ = tuple(
        (name, address)
        for name in (
            *("query", "key", "value", "past_key", "past_value", "positions", "cos", "sin", "key_scale", "value_scale"),
            *("attention", "present_key", "present_value", "workspace"),
        )
    )
