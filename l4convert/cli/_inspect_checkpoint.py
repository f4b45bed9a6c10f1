"""What ``inspect`` says about a checkpoint."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

from l4convert.checkpoint import Checkpoint, open_checkpoint
from l4convert.checkpoint.config import DecoderConfig
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.parameters import parameter_counts
from l4convert.checkpoint.prequantized import quantized_parts, stored_bytes
from l4convert.checkpoint.traffic import TRAFFIC, Traffic
from l4convert.cli._network import network_payload, network_rows
from l4convert.cli._render import count, fields, ranges, size, table


def describe(path: Path, tensors: bool) -> tuple[dict[str, Any], str]:
    """The checkpoint as JSON fields and as text; ``tensors`` adds a row for each tensor to both."""
    before = TRAFFIC.now()
    checkpoint = open_checkpoint(path)
    traffic = None if checkpoint.hub is None else TRAFFIC.now() - before
    payload = _payload(checkpoint) | {"network": network_payload(traffic)}
    text = [_summary(checkpoint, payload, traffic), _bytes_table(payload["bytes_by_dtype"])]
    if tensors:
        rows = [(name, _stored_type(t), list(t.dims), stored_bytes(t)) for name, t in checkpoint.tensors.items()]
        payload["tensors"] = [
            {"name": name, "dtype": dtype, "shape": shape, "bytes": nbytes} for name, dtype, shape, nbytes in rows
        ]
        text.append(table(["tensor", "dtype", "shape", "bytes"], rows, right=[3]))
    return payload, "\n\n".join(text)


def _payload(checkpoint: Checkpoint) -> dict[str, Any]:
    nbytes: dict[str, int] = defaultdict(int)
    for tensor in checkpoint.tensors.values():
        nbytes[_stored_type(tensor)] += stored_bytes(tensor)
    total, active = parameter_counts(checkpoint.config, checkpoint.tensors)
    return {
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "hub": None if checkpoint.hub is None else dataclasses.asdict(checkpoint.hub),
        "format": checkpoint.format,
        "experts": checkpoint.experts,
        "quantization": checkpoint.quantization,
        "config": dataclasses.asdict(checkpoint.config),
        "parameters": total,
        "active_parameters": active,
        "tensor_count": len(checkpoint.tensors),
        "bytes": sum(nbytes.values()),
        "bytes_by_dtype": dict(nbytes),
    }


def _stored_type(tensor: LazyTensor) -> str:
    """The element type in the checkpoint: of what is stored quantized, that of the codes."""
    part = next(quantized_parts(tensor), None)
    return (tensor if part is None else part.values).dtype.name


def _summary(checkpoint: Checkpoint, payload: dict[str, Any], traffic: Traffic | None) -> str:
    config = checkpoint.config
    scaling = config.rope_scaling
    rope = f"theta {config.rope_theta:g}" + (", unscaled" if scaling is None else f", scaled by {scaling.factor:g}")
    active = f"{count(payload['active_parameters'])} active per token"
    experts = f"{config.num_local_experts} of width {config.intermediate_size}, top {config.num_experts_per_tok}"
    return fields(
        [
            ("checkpoint", checkpoint.title),
            ("format", f"{checkpoint.format}, experts {checkpoint.experts}"),
            *([] if checkpoint.quantization is None else [("quantized", checkpoint.quantization)]),
            ("parameters", f"{count(payload['parameters'])} ({active})"),
            ("size", f"{size(payload['bytes'])} in {payload['tensor_count']:,} tensors"),
            *layer_rows(config),
            ("hidden size", config.hidden_size),
            ("attention", f"{config.num_attention_heads} heads of {config.head_dim}, {config.num_key_value_heads} KV"),
            ("RoPE", rope + (", QK norm" if config.use_qk_norm else ", no QK norm")),
            ("experts", f"{experts}, and a shared one"),
            ("vocabulary", f"{config.vocab_size:,}" + (", tied head" if config.tie_word_embeddings else "")),
            ("positions", f"{config.max_position_embeddings:,}"),
            *network_rows(traffic),
        ]
    )


def layer_rows(config: DecoderConfig) -> list[tuple[str, str]]:
    """Which layers are of which kind."""
    layers = list(enumerate(config.layers))
    kinds = [
        (f"chunked ({config.attention_chunk_size:,} tokens)", [i for i, layer in layers if layer.chunked]),
        ("global", [i for i, layer in layers if not layer.chunked]),
        ("without RoPE", [i for i, layer in layers if not layer.rope]),
        ("mixture of experts", [i for i, layer in layers if layer.moe]),
        (f"dense (width {config.intermediate_size_mlp:,})", [i for i, layer in layers if not layer.moe]),
    ]
    rows = [("layers", str(len(layers)))]
    return rows + [(f"  {kind}", f"{len(where)}: {ranges(where)}") for kind, where in kinds if where]


def _bytes_table(by_dtype: dict[str, int]) -> str:
    return table(["dtype", "bytes"], [(name, size(nbytes)) for name, nbytes in by_dtype.items()], right=[1])
