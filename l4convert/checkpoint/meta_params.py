"""Meta's params.json to a :class:`DecoderConfig`.

Fields, defaults and derived widths are those of Meta's own code (``llama_models/llama4``: ``args.py``, ``model.py``,
``moe.py``), which the tests compare with. Where that code would fail on a value, so does this, with a message.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l4convert.checkpoint.config import DecoderConfig, LayerConfig, RopeScaling
from l4convert.checkpoint.fields import MAX_INT, Fields
from l4convert.checkpoint.hf_config import MAX_CHUNK, MAX_CONFIG_BYTES, MAX_EXPERT_MLPS, MAX_EXPERTS, MAX_LAYERS
from l4convert.checkpoint.text import parse_object, read_bytes, show
from l4convert.checkpoint.tiktoken_model import special_token_ids

# apply_scaling of model.py: constants there, and what args.py puts in for values that no published file has.
_LOW_FREQ_FACTOR, _ORIGINAL_POSITIONS = 1.0, 8192
_SCALING_FACTOR, _HIGH_FREQ_FACTOR = 16.0, 1.0
# params.json does not say how long a context a model was trained for. These are the lengths of the published
# instruction-tuned models: scaled RoPE is Scout's alone, and one without chunks is dense, as Llama Guard 4 is.
_POSITIONS_SCALED, _POSITIONS, _POSITIONS_WITHOUT_CHUNKS = 10_485_760, 1_048_576, 131_072
_REFUSED = ("quantization_args", "lora_args")


def read_params(path: Path, vocab_rows: int) -> DecoderConfig:
    """Read params.json.

    Args:
        path: The file.
        vocab_rows: How many tokens the embedding table has, for files that say -1 or nothing.

    Raises:
        InputError: The file is unusable, or has a value that Meta's code does not take or that is out of range.
    """
    file = show(path)
    params = Fields(parse_object(read_bytes(path, MAX_CONFIG_BYTES), file), file)
    if not params.has("dim"):
        params = params.object("model") or params  # some releases nest what others have at the top
    for key in _REFUSED:
        if params.has(key):
            params.fail(key, "is set: such checkpoints are not supported", "convert the BF16 original")
    dim = params.integer("dim")
    heads, kv_heads = _heads(params, dim)
    layers, chunk = _layers(params)
    moe = params.object("moe_args")
    experts = moe.integer("num_experts", high=MAX_EXPERTS) if moe is not None else 1
    if moe is not None and experts * sum(layer.moe for layer in layers) > MAX_EXPERT_MLPS:
        moe.fail("num_experts", f"is {experts:,} in {len(layers)} layers: more than {MAX_EXPERT_MLPS:,} in all")
    scaling = _scaling(params)
    positions = _POSITIONS_WITHOUT_CHUNKS if chunk is None else _POSITIONS if scaling is None else _POSITIONS_SCALED
    vocab = params.integer("vocab_size", -1, low=-1)
    vocab = vocab_rows if vocab == -1 else params.checked_integer("vocab_size", vocab, 1, MAX_INT)
    tokens = special_token_ids(vocab)
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=_expert_width(params, moe, dim) if moe is not None else 1,
        intermediate_size_mlp=_dense_width(params, dim),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim // heads,
        num_local_experts=experts,
        num_experts_per_tok=moe.integer("top_k", 1, high=experts) if moe is not None else 1,
        rms_norm_eps=params.number("norm_eps", 1e-5),
        max_position_embeddings=positions,
        attention_chunk_size=positions if chunk is None else chunk,
        rope_theta=params.number("rope_theta", 500000.0),
        rope_scaling=scaling,
        use_qk_norm=params.boolean("use_qk_norm", False),
        attn_temperature_tuning=params.boolean("attn_temperature_tuning", False),
        floor_scale=params.number("floor_scale", 8192.0),
        attn_scale=params.number("attn_scale", 0.1, positive=False),
        attention_bias=False,
        tie_word_embeddings=False,
        layers=layers,
        bos_token_id=tokens.get("<|begin_of_text|>"),
        eos_token_ids=tuple(tokens[name] for name in ("<|end_of_text|>", "<|eom|>", "<|eot|>") if name in tokens),
        pad_token_id=tokens.get("<|finetune_right_pad|>"),
    )


def _heads(params: Fields, dim: int) -> tuple[int, int]:
    """Query heads and key/value heads."""
    heads = params.integer("n_heads")
    kv_heads = params.integer("n_kv_heads") if params.has("n_kv_heads") else heads
    if heads % kv_heads:
        params.fail("n_heads", f"is {heads}, not a multiple of n_kv_heads, {kv_heads}")
    if dim % heads or dim // heads % 2:
        params.fail("dim", f"is {dim}, which does not give each of {heads} heads an even number of elements")
    if params.has("head_dim") and params.integer("head_dim") != dim // heads:
        params.fail("head_dim", f"is {params.get('head_dim')}; Meta's code always uses dim / n_heads, {dim // heads}")
    return heads, kv_heads


def _layers(params: Fields) -> tuple[tuple[LayerConfig, ...], int | None]:
    """The layers, and the size of chunks; None where attention has none."""
    count = params.integer("n_layers", high=MAX_LAYERS)
    interval = params.integer("nope_layer_interval") if params.has("nope_layer_interval") else None
    chunk = params.integer("attention_chunk_size", low=0, high=MAX_CHUNK) if params.has("attention_chunk_size") else 0
    moe = params.object("moe_args")
    step = moe.integer("interleave_moe_layer_step", 1) if moe is not None else None
    layers = []
    for number in range(1, count + 1):
        rope = interval is None or number % interval != 0
        layers.append(LayerConfig(rope, rope and chunk > 0, step is not None and number % step == 0))
    return tuple(layers), chunk or None


def _dense_width(params: Fields, dim: int) -> int:
    """Width of a dense layer's SwiGLU (``TransformerBlock``)."""
    width = int(2 * int(4 * dim) / 3)
    if params.has("ffn_dim_multiplier"):
        width = _scaled(params, width)
    return _rounded(params, width)


def _expert_width(params: Fields, moe: Fields, dim: int) -> int:
    """Width of one expert, and of the shared one (``TransformerBlock``, ``MoE``)."""
    for key in ("ffn_exp", "ffn_dim_multiplier"):
        if not params.has(key):
            params.fail(key, "is missing, and the width of the experts depends on it")
    expanded = params.number("ffn_exp") * dim
    if expanded > MAX_INT:
        params.fail("ffn_exp", "is too large")
    width = _scaled(params, int(2 * int(expanded) / 3))
    if moe.boolean("auto_scale_F", True):
        capacity = moe.number("capacity_factor", 1.0, positive=False)
        if capacity <= -1:
            moe.fail("capacity_factor", f"is {capacity:g}, must be above -1")
        expanded = width / (capacity + 1)
        if expanded > MAX_INT:
            moe.fail("capacity_factor", f"is {capacity:g}, which makes the experts too wide")
        width = int(expanded)
    return _rounded(params, width)


def _scaled(params: Fields, width: int) -> int:
    scaled = params.number("ffn_dim_multiplier") * width
    if scaled > MAX_INT:
        params.fail("ffn_dim_multiplier", "is too large")
    return int(scaled)


def _rounded(params: Fields, width: int) -> int:
    multiple = params.integer("multiple_of", 256)
    rounded = width + -width % multiple
    if not 0 < rounded <= MAX_INT:
        params.fail("multiple_of", f"is {multiple:,}, which makes a layer {rounded:,} wide")
    return rounded


def _scaling(params: Fields) -> RopeScaling | None:
    if not params.boolean("use_scaled_rope", False):
        return None
    given: dict[str, Any] = {"rope_scaling_factor": _SCALING_FACTOR, "rope_high_freq_factor": _HIGH_FREQ_FACTOR}
    factor, high = (params.number(key) if params.has(key) else default for key, default in given.items())
    if high < _LOW_FREQ_FACTOR:
        params.fail("rope_high_freq_factor", f"is {high:g}, below {_LOW_FREQ_FACTOR:g}, the other frequency's")
    return RopeScaling(factor, _LOW_FREQ_FACTOR, high, _ORIGINAL_POSITIONS)
