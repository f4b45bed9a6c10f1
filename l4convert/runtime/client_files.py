"""Files beside the graph that public clients read, written so that they load the artifact unchanged.

All else beside the graph is copied from the checkpoint as it is, and nothing of it is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l4convert.checkpoint.config import DecoderConfig
from l4convert.checkpoint.text import parse_object, read_bytes
from l4convert.quantization.kv import KvScheme
from l4convert.runtime.genai_config import GENAI_KV_CACHES, genai_config

MAX_BYTES = 64 << 20  # a tokenizer_config.json with a vocabulary of added tokens is a few megabytes


def client_files(
    config: DecoderConfig,
    kv_cache: str,
    sidecars: Sequence[Path],
    target: str = "cpu",
    scheme: KvScheme | None = None,
    generated: Mapping[str, bytes] | None = None,
) -> dict[str, str]:
    """File name to content of every file that is written rather than copied.

    Args:
        config: The decoder.
        kv_cache: The form of its cache.
        sidecars: The checkpoint's own files, some of which are rewritten.
        target: What the graph was lowered to.
        scheme: How its caches are quantized.
        generated: Name to content of files that are made because the checkpoint lacks them; they stand for its own.

    Raises:
        InputError: One of them is not a JSON object.
    """
    given = {
        path.name: parse_object(read_bytes(path, MAX_BYTES), str(path)) for path in sidecars if path.name in REWRITES
    }
    made = generated or {}
    given |= {name: parse_object(made[name], name) for name in made if name in REWRITES}
    rewritten = {name: REWRITES[name](content) for name, content in given.items()}
    files = {name: content for name, content in rewritten.items() if content != given[name]}
    if kv_cache in GENAI_KV_CACHES:
        generation = given.get("generation_config.json")
        files["genai_config.json"] = genai_config(config, kv_cache, generation, target, scheme)
    return {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for name, content in files.items()}


def text_config(content: dict[str, Any]) -> Mapping[str, Any]:
    """The text model's ``config.json``: what the artifact is, where the checkpoint's describes vision too."""
    nested = content.get("text_config")
    if not isinstance(nested, dict):
        return content
    kept = {name: content[name] for name in ("transformers_version",) if name in content}
    return {**kept, **nested, "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}


def portable_tokenizer_config(content: dict[str, Any]) -> Mapping[str, Any]:
    """What transformers 5 leaves out or calls otherwise, as older versions need it.

    ``TokenizersBackend`` is its name for ``PreTrainedTokenizerFast``. Without ``model_input_names`` older versions make
    ``token_type_ids`` too, which the decoder does not take.
    """
    renamed = (
        {"tokenizer_class": "PreTrainedTokenizerFast"} if content.get("tokenizer_class") == "TokenizersBackend" else {}
    )
    return {"model_input_names": ["input_ids", "attention_mask"], **content, **renamed}


REWRITES = {
    "config.json": text_config,
    "generation_config.json": lambda content: content,
    "tokenizer_config.json": portable_tokenizer_config,
}
