"""Meta's tensor names, and how the canonical tensors are made of them.

Meta's files spell the same weight in several ways; which ones its code takes is in the ``load_hook`` methods of
``llama_models/llama4/{model,moe,ffn}.py``. Its norms may have the name of the layer that they are fused with, q, k and
v may lie in one tensor, and so may gate and up. In fused tensors every file has its own part of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from l4convert.checkpoint.combiners import SideBySide, transposed
from l4convert.checkpoint.config import DecoderConfig
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.meta_experts import ExpertScales, as_one, expert_parts
from l4convert.checkpoint.meta_shards import Rows, Shards, check_float, on_top, side_by_side
from l4convert.checkpoint.names import Shape, expected_tensors
from l4convert.checkpoint.pth_file import DOWNLOAD_HINT
from l4convert.errors import InputError

Make = Callable[[Sequence[LazyTensor], DecoderConfig], LazyTensor]


def _same(parts: Sequence[LazyTensor], config: DecoderConfig) -> LazyTensor:
    return parts[0]


def _rows(parts: Sequence[LazyTensor], config: DecoderConfig) -> LazyTensor:
    return on_top(parts)


def _columns(parts: Sequence[LazyTensor], config: DecoderConfig) -> LazyTensor:
    return side_by_side(parts)


def _swapped(parts: Sequence[LazyTensor], config: DecoderConfig) -> LazyTensor:
    return transposed(parts[0])


def _heads(first: Callable[[int, int], int], last: Callable[[int, int], int]) -> Make:
    """Rows of a fused [(q + 2 kv), H], from and to which numbers of rows of q and of k give."""

    def make(parts: Sequence[LazyTensor], config: DecoderConfig) -> LazyTensor:
        unit = _divided(parts[0], config.num_attention_heads + 2 * config.num_key_value_heads)
        q, k = unit * config.num_attention_heads, unit * config.num_key_value_heads
        return on_top([Rows(part, first(q, k), last(q, k)) for part in parts])

    return make


def _divided(part: LazyTensor, count: int) -> int:
    """Rows of each of ``count`` equal shares."""
    rows, rest = divmod(part.dims[0], count)
    if rest:
        raise InputError(f"{part.origin} has {part.dims[0]:,} rows, which are not {count} equal shares", DOWNLOAD_HINT)
    return rows


def _half(number: int) -> Make:
    def make(parts: Sequence[LazyTensor], config: DecoderConfig) -> LazyTensor:
        half = _divided(parts[0], 2)
        return on_top([Rows(part, number * half, (number + 1) * half) for part in parts])

    return make


_QUERY, _KEY, _VALUE = (
    _heads(lambda q, k: 0, lambda q, k: q),
    _heads(lambda q, k: q, lambda q, k: q + k),
    _heads(lambda q, k: q + k, lambda q, k: q + 2 * k),
)
Spellings = Mapping[str, Sequence[tuple[str, Make]]]
_ENDS: Spellings = {
    "model.embed_tokens.weight": [("tok_embeddings.weight", _rows)],
    "model.norm.weight": [("norm.weight", _same)],
    "lm_head.weight": [("output.weight", _rows)],
}
_LAYER: Spellings = {
    "input_layernorm.weight": [
        ("attention_norm.weight", _same),
        ("attention.wqkv.layer_norm_weight", _same),
    ],
    "post_attention_layernorm.weight": [
        ("ffn_norm.weight", _same),
        ("feed_forward.mlp.layer_norm_weight", _same),
        ("feed_forward.norm.weight", _same),
    ],
    "self_attn.q_proj.weight": [("attention.wq.weight", _rows), ("attention.wqkv.weight", _QUERY)],
    "self_attn.k_proj.weight": [("attention.wk.weight", _rows), ("attention.wqkv.weight", _KEY)],
    "self_attn.v_proj.weight": [("attention.wv.weight", _rows), ("attention.wqkv.weight", _VALUE)],
    "self_attn.o_proj.weight": [("attention.wo.weight", _columns)],
    "feed_forward.router.weight": [("feed_forward.router_DE", _swapped)],
    "feed_forward.gate_proj.weight": [
        ("feed_forward.w1.weight", _rows),
        ("feed_forward.mlp.fc1_weight", _half(0)),
    ],
    "feed_forward.up_proj.weight": [
        ("feed_forward.w3.weight", _rows),
        ("feed_forward.mlp.fc1_weight", _half(1)),
    ],
    "feed_forward.down_proj.weight": [
        ("feed_forward.w2.weight", _columns),
        ("feed_forward.mlp.fc2_weight", _columns),
    ],
    "feed_forward.shared_expert.gate_proj.weight": [
        ("feed_forward.w_in_shared_FD.weight", _rows),
        ("feed_forward.shared_expert.w1.weight", _rows),
        ("feed_forward.shared_expert.mlp.fc1_weight", _half(0)),
    ],
    "feed_forward.shared_expert.up_proj.weight": [
        ("feed_forward.w_swiglu_FD.weight", _rows),
        ("feed_forward.shared_expert.w3.weight", _rows),
        ("feed_forward.shared_expert.mlp.fc1_weight", _half(1)),
    ],
    "feed_forward.shared_expert.down_proj.weight": [
        ("feed_forward.w_out_shared_DF.weight", _columns),
        ("feed_forward.shared_expert.w2.weight", _columns),
        ("feed_forward.shared_expert.mlp.fc2_weight", _columns),
    ],
}
_EXPERTS = "feed_forward.experts."


def canonical_tensors(
    shards: Shards, config: DecoderConfig, scales: ExpertScales | None = None
) -> dict[str, LazyTensor]:
    """Every tensor of the decoder by its canonical name, with the shape that the config gives it.

    Args:
        shards: The files.
        config: The decoder.
        scales: Of experts that are stored quantized.

    Raises:
        InputError: A tensor is missing, left over, or of another shape or type.
    """
    made: dict[str, LazyTensor] = {}
    for name, shape in expected_tensors(config, "stacked").items():
        layer, within = _place(name)
        if within.startswith(_EXPERTS):
            made[name] = _experts(shards, config, layer, within, scales)
        else:
            made[name] = _plain(shards, config, layer, within, shape)
    shards.require_all_used()
    return made


def _place(name: str) -> tuple[str, str]:
    """Meta's prefix of a layer ("layers.0.", "" outside of layers), and what follows it in the canonical name."""
    if not name.startswith("model.layers."):
        return "", name
    number, _, within = name.removeprefix("model.layers.").partition(".")
    return f"layers.{number}.", within


def _plain(shards: Shards, config: DecoderConfig, layer: str, within: str, shape: Shape) -> LazyTensor:
    spellings = (_LAYER if layer else _ENDS)[within]
    key, make = next(((key, make) for key, make in spellings if layer + key in shards), spellings[0])
    parts = shards.parts(layer + key)
    where = shards.where(layer + key)
    if len(parts[0].dims) != len(shape):
        raise InputError(f"{where} has {len(parts[0].dims)} axes, expected {len(shape)}", DOWNLOAD_HINT)
    tensor = make(parts, config)
    if tensor.dims != shape:
        found = f"has shape {list(parts[0].dims)}" + (f" in each of {len(shards)} files" if len(shards) > 1 else "")
        raise InputError(f"{where} {found}: that makes {within} {list(tensor.dims)}, params.json {list(shape)}")
    return check_float(tensor, where)


def _experts(shards: Shards, config: DecoderConfig, layer: str, within: str, scales: ExpertScales | None) -> LazyTensor:
    """``gate_up_proj`` [E, H, 2I] or ``down_proj`` [E, I, H]."""
    width, rest = divmod(config.intermediate_size, len(shards))
    if rest:
        raise InputError(f"{shards.files[0].path}: experts of width {config.intermediate_size} in {len(shards)} files")
    inner = (config.num_local_experts, config.hidden_size, width)
    outer = (config.num_local_experts, width, config.hidden_size)
    prefix = f"{layer}{_EXPERTS}"
    if within.endswith("down_proj"):
        return as_one(on_top(expert_parts(shards, prefix, "w2", outer, scales)))
    gate = expert_parts(shards, prefix, "w1", inner, scales)
    up = expert_parts(shards, prefix, "w3", inner, scales)
    if gate[0].dtype != up[0].dtype:
        raise InputError(f"{shards.files[0].path}: {prefix}w1 and w3 are of different types", DOWNLOAD_HINT)
    return as_one(SideBySide([*gate, *up]))
