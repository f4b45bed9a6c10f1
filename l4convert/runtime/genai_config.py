"""``genai_config.json``: what ONNX Runtime GenAI needs to know to drive our decoder unchanged.

Checked against onnxruntime-genai 0.18, whose parser refuses unknown keys. Sources below are files of
github.com/microsoft/onnxruntime-genai; the format is described at https://onnxruntime.ai/docs/genai/reference/config.html.

How that client calls the decoder, as observed and as its sources say:

- Prompts of a batch are padded on the right with ``pad_token_id`` (``src/models/model.cpp``, ``PadInputs``), and every
  pad token at the end of a prompt gets mask 0 (``src/models/position_inputs.cpp``). A decode step appends a column of
  ones, so later masks have zeros in the middle: positions must be counted from the mask, as our graph does.
- ``attention_mask`` is [B, past+S] with both kinds of cache. ``position_ids`` are given only to graphs that want them.
- A growing cache has the whole past on every layer, from length 0, and each ``present`` is allocated beforehand,
  [B, heads, past+S, D]. A shared buffer is zeroed, and bound as past and present at once (``src/models/kv_cache.cpp``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l4convert.checkpoint.config import DecoderConfig
from l4convert.checkpoint.fields import MAX_INT, Fields
from l4convert.errors import UsageError
from l4convert.quantization.kv import KvScheme
from l4convert.runtime.loading import SETTINGS

GENAI_KV_CACHES = ("growing", "static")
"""Caches that ONNX Runtime GenAI can drive; a windowed one it cannot, as it sizes every layer's ``present`` alike."""

PROVIDER_OPTIONS: Mapping[str, list[dict[str, Any]]] = {"cuda": [{"cuda": {"enable_cuda_graph": "0"}}]}
"""Target to ``provider_options``, where it is not the CPU. A CUDA graph cannot hold the ``If`` of our attention."""

_COUNTS = ("top_k", "min_length", "no_repeat_ngram_size")
_NUMBERS = ("temperature", "top_p", "repetition_penalty")
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "min_length", "no_repeat_ngram_size")
"""Fields of ``generation_config.json`` that GenAI's ``search`` section has under the same name and meaning."""


def genai_config(
    config: DecoderConfig,
    kv_cache: str,
    generation_config: Mapping[str, Any] | None = None,
    target: str = "cpu",
    scheme: KvScheme | None = None,
) -> dict[str, Any]:
    """Return the content of ``genai_config.json`` for an artifact.

    ``search.chunk_size`` is left out on purpose. With it GenAI cuts the flattened [B*S] prompt into pieces
    (``src/models/decoder_only.cpp``, ``RunWithChunking``): a batch with more tokens than that ends in an error about
    continuous decoding, or, when a piece is one column, in mixed-up sequences. Our graph takes a prompt of any length
    in one call. To bound memory on one long prompt, a caller can set ``chunk_size`` through ``set_search_options``.

    Args:
        config: The decoder.
        kv_cache: ``growing`` or ``static``, as the graph was built.
        generation_config: The checkpoint's ``generation_config.json``; its token ids win over the decoder's.
        target: What the graph was lowered to, which says where GenAI runs it.
        scheme: How the caches are quantized. GenAI takes FP8 and INT8 ones as it takes floats. It allocates growing
            ones by ``head_size``, of which INT4 ones have half; where only some layers have them, it cannot.

    Raises:
        UsageError: The cache is one that GenAI cannot drive.
    """
    if kv_cache not in GENAI_KV_CACHES:
        raise UsageError(
            f"ONNX Runtime GenAI cannot drive a {kv_cache!r} KV cache", hint=f"use one of: {', '.join(GENAI_KV_CACHES)}"
        )
    given = _checked(Fields(generation_config or {}, "generation_config.json"))
    static = kv_cache == "static"
    decoder = _decoder(config, PROVIDER_OPTIONS.get(target, []))
    if scheme is not None and not static:
        decoder["head_size"] //= scheme.format.packing
    if static:
        decoder |= _chunked_layer_buffers(config)
    return {
        "model": {
            "type": "decoder",  # any plain decoder (src/models/model_type.h, IsLLM); there is no llama4 among them
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            **_token_ids(config, given),
            "decoder": decoder,
        },
        "search": {
            "max_length": _static_length(config) if static else config.max_position_embeddings,
            "past_present_share_buffer": static,
            **{name: given[name] for name in _SAMPLING if given.get(name) is not None},
        },
    }


def _checked(fields: Fields) -> Mapping[str, Any]:
    """The values of a ``generation_config.json``, those that are used here of the type that they must have.

    Raises:
        InputError: One is not.
    """
    if fields.has("do_sample"):
        fields.boolean("do_sample")
    for key in _COUNTS:
        if fields.has(key):
            fields.integer(key, low=0)
    for key in _NUMBERS:
        if fields.has(key):
            fields.number(key, positive=False)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for token in _as_tuple(fields.values.get(key)):
            fields.checked_integer(key, token, -1, MAX_INT)  # -1 is how some write that there is none
    return fields.values


def _decoder(config: DecoderConfig, provider_options: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "filename": "model.onnx",
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": provider_options, **SETTINGS},
        "hidden_size": config.hidden_size,
        "head_size": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def _chunked_layer_buffers(config: DecoderConfig) -> dict[str, Any]:
    """Give chunked layers buffers of exactly ``attention_chunk_size`` slots, and the other layers ``max_length``.

    GenAI allocates ``window_size + max(cache_slack, chunk_size - 1)`` slots for the listed layers, where a slack of 0
    means 16 (``src/models/windowed_kv_cache.cpp``, ``ComputeWindowedKvCacheSize``); hence C - 1 and 1. It then also
    refuses to rewind a sequence longer than the buffer, as it must: the slots of earlier chunks have been overwritten.
    The two ``slide`` switches would have it move keys and prompt tokens by itself.
    """
    chunked = [i for i, layer in enumerate(config.layers) if layer.chunked]
    size = config.attention_chunk_size
    if not chunked or size < 2:  # a window of 0 means none
        return {}
    return {
        "sliding_window": {
            "window_size": size - 1,
            "cache_slack": 1,
            "slide_key_value_cache": False,
            "slide_inputs": False,
            "layers": chunked,
        }
    }


def _static_length(config: DecoderConfig) -> int:
    """Default length, in tokens, of the buffers that GenAI allocates before the first token.

    The whole context of Scout would take a terabyte; four chunks (32,768 tokens) take 6 GB in float32. A caller raises
    it with ``set_search_options(max_length=...)``, up to the context length.
    """
    return min(config.max_position_embeddings, max(4 * config.attention_chunk_size, 4096))


def _token_ids(config: DecoderConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``bos_token_id``, ``eos_token_id`` (a list; GenAI stops at any) and ``pad_token_id``, where they exist.

    GenAI reads the logits of the last token that is not ``pad_token_id``, even of a single prompt
    (``src/models/logits.cpp``), and takes an absent id for 0, an ordinary token. So a pad id is always written: an end
    of sequence where the model has none.
    """
    bos = given.get("bos_token_id", config.bos_token_id)
    eos = _as_tuple(given.get("eos_token_id")) or config.eos_token_ids
    pads = [*_as_tuple(given.get("pad_token_id")), *_as_tuple(config.pad_token_id), *eos, config.vocab_size - 1]
    ids: dict[str, Any] = {"pad_token_id": next(pad for pad in pads if 0 <= pad < config.vocab_size)}
    if bos is not None:
        ids["bos_token_id"] = bos
    if eos:
        ids["eos_token_id"] = list(eos)
    return ids


def _as_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)
