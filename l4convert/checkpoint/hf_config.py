"""Hugging Face's config.json to a :class:`DecoderConfig`.

Defaults and derived fields are those of transformers' ``Llama4TextConfig`` (5.23), which the tests compare with. The
spellings of transformers 4.51 and later are understood too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l4convert.checkpoint.config import DecoderConfig, LayerConfig, RopeScaling
from l4convert.checkpoint.fields import MAX_INT, Fields
from l4convert.checkpoint.text import parse_object, quote, read_bytes, show

MAX_CONFIG_BYTES = 10_000_000
# Far above any model known or announced (48 layers, 128 experts), far below what would exhaust memory by itself.
MAX_LAYERS = 1024
MAX_EXPERTS = 4096
MAX_EXPERT_MLPS = 1 << 17
MAX_CHUNK = 1 << 18  # 32 times Llama 4's; the graph has a rotation for each of its positions
MAX_TOKEN_ID = (1 << 31) - 1  # transformers and tokenizers hold ids in 32 bits

ARCHITECTURES = ("Llama4ForCausalLM", "Llama4ForConditionalGeneration")
TEXT, CONDITIONAL = "llama4_text", "llama4"
# compression_config: as early versions of compressed-tensors wrote it.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
CHUNKED, FULL = "chunked_attention", "full_attention"


def read_config(path: Path) -> DecoderConfig:
    """Read a config.json of ``Llama4ForCausalLM``, or the text part of one of ``Llama4ForConditionalGeneration``.

    Raises:
        InputError: The file is unusable, describes another model, or has a value that is out of range.
    """
    file = show(path)
    top = Fields(parse_object(read_bytes(path, MAX_CONFIG_BYTES), file), file)
    return _decoder(_text_part(top))


def read_quantization(path: Path) -> Fields | None:
    """What a config.json says about how weights are quantized; None where it says nothing.

    Raises:
        InputError: It says one thing here and another there, or the file is unusable.
    """
    file = show(path)
    top = Fields(parse_object(read_bytes(path, MAX_CONFIG_BYTES), file), file)
    parts = [top, *([text] if (text := top.object("text_config")) is not None else [])]
    found = [(part, key) for part in parts for key in QUANTIZATION_KEYS if part.has(key)]
    for part, key in found[1:]:  # some writers put it into text_config, too
        if part.get(key) != found[0][0].get(found[0][1]):
            part.fail(key, f"differs from {found[0][0].prefix}{found[0][1]}")
    return found[0][0].object(found[0][1]) if found else None


def _text_part(top: Fields) -> Fields:
    model_type = top.get("model_type")
    if model_type not in (TEXT, CONDITIONAL):
        top.fail("model_type", f"is {quote(model_type)}, not Llama 4's ('{TEXT}' or '{CONDITIONAL}')")
    architectures = top.array("architectures")
    if architectures and architectures[0] not in ARCHITECTURES:
        top.fail("architectures", f"names {quote(architectures[0])}, not one of {', '.join(ARCHITECTURES)}")
    if model_type == TEXT:
        return top
    text = top.object("text_config")
    if text is None:
        top.fail("text_config", "is missing")
    if text.values.get("model_type", TEXT) != TEXT:
        text.fail("model_type", f"is {quote(text.values['model_type'])}, not '{TEXT}'")
    return text


def _decoder(text: Fields) -> DecoderConfig:
    if text.get("hidden_act", "silu") != "silu":
        text.fail("hidden_act", f"is {quote(text.get('hidden_act'))}, only 'silu' is supported")
    vocab = text.integer("vocab_size", 202048)
    hidden = text.integer("hidden_size", 5120)
    heads, kv_heads, head_dim = _heads(text, hidden)
    experts = text.integer("num_local_experts", 16, high=MAX_EXPERTS)
    layers = _layers(text)
    if experts * sum(layer.moe for layer in layers) > MAX_EXPERT_MLPS:
        text.fail(
            "num_local_experts", f"is {experts:,} in {len(layers)} layers: more than {MAX_EXPERT_MLPS:,} experts in all"
        )
    positions = text.integer("max_position_embeddings", 4096 * 32)
    theta, scaling = _rope(text, positions)
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=text.integer("intermediate_size", 8192),
        intermediate_size_mlp=text.integer("intermediate_size_mlp", 16384),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_local_experts=experts,
        num_experts_per_tok=text.integer("num_experts_per_tok", 1, high=experts),
        rms_norm_eps=text.number("rms_norm_eps", 1e-5),
        max_position_embeddings=positions,
        attention_chunk_size=_chunk_size(text, layers, positions),
        rope_theta=theta,
        rope_scaling=scaling,
        use_qk_norm=text.boolean("use_qk_norm", True),
        # transformers 4.51 wrote 4 for true.
        attn_temperature_tuning=text.boolean("attn_temperature_tuning", True, or_integer=True),
        floor_scale=text.number("floor_scale", 8192),
        attn_scale=text.number("attn_scale", 0.1, positive=False),
        attention_bias=text.boolean("attention_bias", False),
        tie_word_embeddings=text.boolean("tie_word_embeddings", False),
        layers=layers,
        bos_token_id=_token(text, "bos_token_id", text.get("bos_token_id", 1), vocab),
        eos_token_ids=_eos(text, vocab),
        pad_token_id=_token(text, "pad_token_id", _pad(text), vocab),
    )


def _heads(text: Fields, hidden: int) -> tuple[int, int, int]:
    """Query heads, key/value heads, head_dim. Absent is not null: null means derived, absent means Llama 4's own."""
    heads = text.integer("num_attention_heads", 40)
    explicit_kv = text.get("num_key_value_heads", 8) is not None
    kv_heads = text.integer("num_key_value_heads", 8) if explicit_kv else heads
    explicit_dim = text.get("head_dim", 128) is not None
    head_dim = text.integer("head_dim", 128) if explicit_dim else hidden // heads
    if heads % kv_heads:
        text.fail("num_attention_heads", f"is {heads}, not a multiple of num_key_value_heads, {kv_heads}")
    if head_dim % 2 or not head_dim:
        text.fail("head_dim", f"is {head_dim}, must be even: rotary embeddings rotate pairs")
    return heads, kv_heads, head_dim


def _layers(text: Fields) -> tuple[LayerConfig, ...]:
    count = text.integer("num_hidden_layers", 48, high=MAX_LAYERS)
    interval = text.integer("no_rope_layer_interval", 4)
    flags = text.array("no_rope_layers") or [int((index + 1) % interval != 0) for index in range(count)]
    kinds = text.array("layer_types")
    if kinds is None:
        kinds = [CHUNKED if flag else FULL for flag in flags]
    for key, values in (("no_rope_layers", flags), ("layer_types", kinds)):
        if len(values) < count:
            text.fail(key, f"has {len(values)} entries for {count} layers")
    for index in range(count):
        text.checked_integer(f"no_rope_layers[{index}]", flags[index], 0, 1)
        if kinds[index] not in (CHUNKED, FULL):
            text.fail(f"layer_types[{index}]", f"is {quote(kinds[index])}, not '{CHUNKED}' or '{FULL}'")
    moe = _moe_layers(text, count)
    return tuple(LayerConfig(flags[i] == 1, kinds[i] == CHUNKED, i in moe) for i in range(count))


def _moe_layers(text: Fields, count: int) -> frozenset[int]:
    step = text.integer("interleave_moe_layer_step", 1)
    listed = text.array("moe_layers")
    if listed is None:
        return frozenset(range(step - 1, count, step))
    return frozenset(text.checked_integer(f"moe_layers[{i}]", value, 0, count - 1) for i, value in enumerate(listed))


def _chunk_size(text: Fields, layers: tuple[LayerConfig, ...], positions: int) -> int:
    chunked = any(layer.chunked for layer in layers)
    if text.get("attention_chunk_size", 8192) is not None:
        return text.integer("attention_chunk_size", 8192, high=MAX_CHUNK if chunked else MAX_INT)
    if chunked:
        text.fail("attention_chunk_size", "is null, but there are layers with chunked attention")
    return positions  # used by no layer; as wide as everything there is


def _rope(text: Fields, positions: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from rope_scaling (transformers 4) or rope_parameters (5); the former wins, as there."""
    old = text.object("rope_scaling")
    rope = (
        old if old is not None and old.values else text.object("rope_parameters") or Fields({}, text.file, text.prefix)
    )
    nested = next((key for key, value in rope.values.items() if isinstance(value, dict)), None)
    if nested is not None:
        rope.fail(show(nested), "is an object: RoPE that differs from layer to layer is not supported")
    holder = rope if rope.has("rope_theta") else text
    theta = holder.number("rope_theta") if holder.has("rope_theta") else 500000.0
    for part in (text, rope):
        if part.has("partial_rotary_factor") and part.number("partial_rotary_factor") != 1.0:
            part.fail("partial_rotary_factor", "is not 1: partial rotation is not supported")
    key = "rope_type" if "rope_type" in rope.values else "type"
    kind = rope.get(key, "default")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        rope.fail(key, f"is {quote(kind)}, only 'default' and 'llama3' are supported")
    return theta, _llama3(rope, positions)


def _llama3(rope: Fields, positions: int) -> RopeScaling:
    scaling = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", positions),
    )
    if scaling.low_freq_factor > scaling.high_freq_factor:
        rope.fail("low_freq_factor", f"is {scaling.low_freq_factor:g}, above high_freq_factor")
    return scaling


def _token(text: Fields, key: str, value: Any, vocab: int) -> int | None:
    """A token id; None where there is none, or one beyond the vocabulary, as models cut down from a large one have."""
    if value is None:
        return None
    token = text.checked_integer(key, value, 0, MAX_TOKEN_ID)
    return token if token < vocab else None


def _eos(text: Fields, vocab: int) -> tuple[int, ...]:
    value = text.get("eos_token_id", 2)
    items = value if isinstance(value, list) else [value]
    keys = [f"eos_token_id[{i}]" for i in range(len(items))] if isinstance(value, list) else ["eos_token_id"]
    tokens = (_token(text, key, item, vocab) for key, item in zip(keys, items, strict=True))
    return tuple(token for token in tokens if token is not None)


def _pad(text: Fields) -> Any:
    """-1 is how some configs write that there is none."""
    value = text.get("pad_token_id", None)
    return None if type(value) is int and value == -1 else value
