"""Canonical tensor names, the shapes that a config gives them, and the names that checkpoints use for them.

Canonical names are those of the state dict of transformers' ``Llama4ForCausalLM``. Checkpoints of the multimodal model
nest the text decoder one level deeper, in one of the ways of :data:`LAYOUTS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from l4convert.checkpoint.base import Experts
from l4convert.checkpoint.config import DecoderConfig, LayerConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where a checkpoint keeps the text decoder: ``model.*`` under ``model``, the rest (lm_head) under ``rest``."""

    name: str
    model: str
    rest: str

    def stored(self, canonical: str) -> str:
        """The checkpoint's name of a canonical name."""
        tail = canonical.removeprefix("model.")
        return self.model + tail if tail != canonical else self.rest + canonical

    def canonical(self, stored: str) -> str | None:
        """The canonical name of a checkpoint's name; None: not a part of the text decoder."""
        if stored.startswith(self.model):
            return "model." + stored[len(self.model) :]
        rest = stored[len(self.rest) :]
        return None if not stored.startswith(self.rest) or rest.startswith("model.") else rest


# The most deeply nested first: each one's prefix also fits, or is the beginning of, a name of the ones after it.
LAYOUTS = (
    Layout("model.language_model", "model.language_model.", ""),
    Layout("language_model", "language_model.model.", "language_model."),
    Layout("plain", "model.", ""),
)
PLAIN = LAYOUTS[-1]

VISION_PREFIXES = ("vision_model.", "multi_modal_projector.", "model.vision_model.", "model.multi_modal_projector.")
_UNFUSED = re.compile(r"\.feed_forward\.experts\.\d+\.")


def find_layout(names: Iterable[str]) -> Layout:
    """The layout of a checkpoint with these tensor names; the plain one where nothing speaks for another."""
    known = list(names)
    return next((layout for layout in LAYOUTS if any(name.startswith(layout.model) for name in known)), PLAIN)


def find_experts(names: Iterable[str]) -> Experts:
    """Whether the experts are stacked or one by one."""
    return "unfused" if any(_UNFUSED.search(name) for name in names) else "stacked"


def is_vision(stored: str) -> bool:
    """Whether a checkpoint's tensor belongs to the image encoder or its projector."""
    return stored.startswith(VISION_PREFIXES)


def is_buffer(stored: str) -> bool:
    """Whether it is a RoPE table, which old versions of transformers saved and new ones compute."""
    return stored.endswith("rotary_emb.inv_freq")


def expected_tensors(config: DecoderConfig, experts: Experts) -> dict[str, Shape]:
    """The name and shape of every tensor that a text decoder of this config has, in model order."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for index, layer in enumerate(config.layers):
        prefix = f"model.layers.{index}."
        shapes.update((prefix + name, shape) for name, shape in _layer(config, layer, experts))
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer(config: DecoderConfig, layer: LayerConfig, experts: Experts) -> Iterator[tuple[str, Shape]]:
    hidden = config.hidden_size
    yield "input_layernorm.weight", (hidden,)
    yield from _attention(config)
    yield "post_attention_layernorm.weight", (hidden,)
    if not layer.moe:
        yield from _swiglu("feed_forward", hidden, config.intermediate_size_mlp)
        return
    count, width = config.num_local_experts, config.intermediate_size
    yield "feed_forward.router.weight", (count, hidden)
    if experts == "stacked":
        yield "feed_forward.experts.gate_up_proj", (count, hidden, 2 * width)
        yield "feed_forward.experts.down_proj", (count, width, hidden)
    else:
        for expert in range(count):
            yield from _swiglu(f"feed_forward.experts.{expert}", hidden, width)
    yield from _swiglu("feed_forward.shared_expert", hidden, width)


def _attention(config: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes: Mapping[str, tuple[int, int]] = {
        "q_proj": (queries, config.hidden_size),
        "k_proj": (keys, config.hidden_size),
        "v_proj": (keys, config.hidden_size),
        "o_proj": (config.hidden_size, queries),
    }
    for name, shape in shapes.items():
        yield f"self_attn.{name}.weight", shape
        if config.attention_bias:
            yield f"self_attn.{name}.bias", shape[:1]


def _swiglu(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)
