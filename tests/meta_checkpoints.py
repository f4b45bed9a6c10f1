"""Small random checkpoints in Meta's format: made by Meta's own modules, cut into files by Meta's own resharding."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESERVED = 2048
SCOUT: Mapping[str, Any] = {
    "dim": 64,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 8,
    "vocab_size": 256 + 40 + RESERVED,
    "ffn_exp": 1.5,
    "ffn_dim_multiplier": 1.2,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "attention_chunk_size": 8,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "nope_layer_interval": 4,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 8.0,
    "attn_scale": 0.3,
    "moe_args": {"num_experts": 4, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1},
}
MAVERICK: Mapping[str, Any] = {
    **SCOUT,
    "use_scaled_rope": False,
    "use_qk_norm": False,
    "moe_args": {**SCOUT["moe_args"], "interleave_moe_layer_step": 2},
}
VISION: Mapping[str, Any] = {
    "image_size": {"height": 28, "width": 28},
    "patch_size": {"height": 14, "width": 14},
    "dim": 32,
    "n_layers": 1,
    "n_heads": 2,
    "mlp_ratio": 2.0,
    "output_dim": 32,
    "pixel_shuffle_ratio": 0.5,
}
EXPERTS = {"w1": "moe_w_in_eD_F", "w2": "moe_w_out_eF_D", "w3": "moe_w_swiglu_eD_F"}
SHARED = {"w1": "w_in_shared_FD", "w2": "w_out_shared_DF", "w3": "w_swiglu_FD"}


def random_state(params: Mapping[str, Any], dtype: str = "bfloat16", seed: int = 0) -> dict[str, Any]:
    """A state dict of Meta's ``Transformer`` with random weights, under the names of its modules."""
    import torch
    from llama_models.llama4.args import ModelArgs
    from llama_models.llama4.model import Transformer

    from l4convert.parity.meta_reference import gloo

    with gloo():
        names = Transformer(ModelArgs(**params, max_batch_size=1, max_seq_len=1)).state_dict()
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in names.items():
        noise = torch.randn(value.shape, generator=generator)
        state[name] = (1 + 0.1 * noise if "norm" in name else 0.1 * noise).to(getattr(torch, dtype))
    return state


def published(state: Mapping[str, Any], *, dense: str = "w", norms: str = "attention.wqkv", flat: bool = True) -> Any:
    """The state dict as Meta's files have it: fused q, k, v, norms moved, experts under their other names, stale state.

    Args:
        state: As :func:`random_state` gives it.
        dense: ``fc`` fuses gate and up of dense layers, ``w`` does not.
        norms: The other name of the norm before a feed-forward layer: ``mlp`` or ``norm``.
        flat: Experts [E K, N] instead of [E, K, N].
    """
    import torch

    out = dict(state)
    for layer in range(sum(name.endswith(".attention_norm.weight") for name in state)):
        attention, ffn = f"layers.{layer}.attention.", f"layers.{layer}.feed_forward."
        out[f"{attention}wqkv.weight"] = torch.cat([out.pop(f"{attention}w{kind}.weight") for kind in "qkv"])
        out[f"{attention}wqkv.layer_norm_weight"] = out.pop(f"layers.{layer}.attention_norm.weight")
        moved = "mlp.layer_norm_weight" if norms == "mlp" else "norm.weight"
        out[f"{ffn}{moved}"] = out.pop(f"layers.{layer}.ffn_norm.weight")
        for name in ("wqkv", "wo"):
            out[f"{attention}{name}._extra_state"] = io.BytesIO(b"\xff\x00 state")
        if f"{ffn}router_DE" in out:
            for old, new in EXPERTS.items():
                experts = out.pop(f"{ffn}experts.{old}")
                out[f"{ffn}experts.{new}"] = experts.flatten(0, 1) if flat else experts
                out[f"{ffn}{SHARED[old]}.weight"] = out.pop(f"{ffn}shared_expert.{old}.weight")
            out[f"{ffn}global_gate_stats_3E"] = torch.zeros(3, 4)
        elif dense == "fc":
            out[f"{ffn}mlp.fc1_weight"] = torch.cat([out.pop(f"{ffn}w1.weight"), out.pop(f"{ffn}w3.weight")])
            out[f"{ffn}mlp.fc2_weight"] = out.pop(f"{ffn}w2.weight")
    out["rope.freqs"] = torch.arange(4.0)
    out["freqs_cis"] = torch.polar(torch.ones(2, 4), torch.ones(2, 4))
    return out


def sharded(state: Mapping[str, Any], count: int, experts: int) -> list[dict[str, Any]]:
    """A state dict cut into the parts of ``count`` ranks by Meta's ``reshard_mp``."""
    import torch
    from llama_models.checkpoint import convert_moe_weights, reshard_mp

    if count == 1:
        return [dict(state)]
    others = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    axes = {key: tensors[key].dim() for key in tensors if ".experts.moe" in key}
    stacked = convert_moe_weights(dict(tensors), experts)
    parts = [reshard_mp([stacked], size=count, rank=rank) for rank in range(count)]
    order = list(state)
    for part in parts:
        for key, number in axes.items():  # convert_moe_weights cuts the first axis in two, also where it is cut already
            part[key] = part[key].flatten(0, 1) if number == 2 else part[key].squeeze(1)
    return [{key: others[key] if key in others else part[key] for key in order} for part in parts]


def write_meta(
    path: Path, params: Mapping[str, Any] = SCOUT, state: Any = None, shards: int = 1, tokenizer: bool = False
) -> Path:
    """Write a folder as Meta releases them.

    Args:
        path: To make.
        params: Of params.json.
        state: Default: random, in the published spelling.
        shards: Files.
        tokenizer: Write tokenizer.model too.
    """
    import torch

    path.mkdir(parents=True, exist_ok=True)
    state = published(random_state(params)) if state is None else state
    experts = (params.get("moe_args") or {"num_experts": 1})["num_experts"]
    for rank, part in enumerate(sharded(state, shards, experts)):
        torch.save(part, path / f"consolidated.{rank:02d}.pth")
    (path / "params.json").write_text(json.dumps(params))
    if tokenizer:
        write_ranks(path / "tokenizer.model", params["vocab_size"] - RESERVED)
    return path


def write_ranks(path: Path, count: int) -> Path:
    """A tokenizer.model of all bytes and, up to ``count`` tokens, pieces of a text; each can be made by merges."""
    words = [" the", "ing", "ion", "er ", " and", "of", "or", "to", "at", "is", "it", "en", "es", "al", "re", "ed"]
    tokens = [bytes([byte]) for byte in range(256)]
    for word in words:
        for end in range(2, len(word) + 1):
            if (token := word[:end].encode()) not in tokens:
                tokens.append(token)
    extra = [first.encode() + second.encode() for first in "ABCDEFG" for second in "abcdefg"]
    tokens = [*tokens, *extra][:count]
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return path


QUANTIZED: Mapping[str, Any] = {
    **SCOUT,
    "dim": 128,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 96,
    "multiple_of": 256,
    "use_scaled_rope": False,
}


def quantize_impls(monkeypatch: Any) -> Any:
    """Meta's ``quantize_impls``, which imports FBGEMM and needs it for kernels only."""
    import importlib
    import sys
    from types import ModuleType

    for name in ("fbgemm_gpu", "fbgemm_gpu.experimental", "fbgemm_gpu.experimental.gen_ai"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return importlib.import_module("llama_models.quantize_impls")


def quantize_fp8_per_row(weight: Any) -> tuple[Any, Any]:
    """[..., N, K] to E4M3 and scales [..., N]: the formula of FBGEMM's ``quantize_fp8_row``, which needs a GPU here."""
    import torch

    largest = weight.float().abs().amax(-1)
    inverse = 448.0 / largest
    codes = (weight.float() * inverse[..., None]).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return codes, 1.0 / inverse


def quantize_rank(part: dict[str, Any], params: Mapping[str, Any], kind: str, impls: Any) -> dict[str, Any]:
    """Quantize the experts of one file in place, as ``llama4/scripts/quantize.py`` does; their scales."""
    import torch

    scales = {}
    for layer in range(1, params["n_layers"] - 1):
        prefix = f"layers.{layer}.feed_forward.experts."
        for name, key in ((name, prefix + last) for name, last in EXPERTS.items()):
            experts = params["moe_args"]["num_experts"]
            weight = part[key].reshape(experts, -1, part[key].shape[-1]).transpose(1, 2).contiguous()
            if kind == "fp8":
                codes, scale = quantize_fp8_per_row(weight)
            else:
                each = [impls.int4_row_quantize(matrix) for matrix in weight]
                codes = torch.stack([impls.pack_int4(one) for one, _ in each])
                scale = torch.stack([one for _, one in each])
            codes = codes.transpose(1, 2).reshape(-1, weight.shape[1]).contiguous()
            part[key] = torch.nn.Parameter(codes.view(torch.float8_e4m3fn))
            scales[prefix + name] = scale
    return scales


def write_quantized(path: Path, kind: str, impls: Any, shards: int = 1, params: Mapping[str, Any] = QUANTIZED) -> Path:
    """Write a folder as ``llama4/scripts/quantize.py`` leaves it: all MoE layers but the first and the last."""
    import torch

    path.mkdir(parents=True, exist_ok=True)
    state = published(random_state(params))
    for rank, part in enumerate(sharded(state, shards, params["moe_args"]["num_experts"])):
        scales = quantize_rank(part, params, kind, impls)
        torch.save(part, path / f"consolidated.{rank:02d}.pth")
        torch.save(scales, path / f"{kind}_scales_{rank}.pt")
    (path / "params.json").write_text(json.dumps(params))
    return path
