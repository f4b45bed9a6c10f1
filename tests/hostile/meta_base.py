"""A valid checkpoint in Meta's format, written without torch, and damages to its pickle, its archive, its storages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.torch_files import Entry, Tensor, archive, state, text, torch_entries

PTH = "consolidated.00.pth"
PARAMS: Mapping[str, Any] = {
    "dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "vocab_size": 64, "ffn_exp": 1.5,
    "ffn_dim_multiplier": 1.0,
    "multiple_of": 32, "norm_eps": 1e-5, "attention_chunk_size": 8, "rope_theta": 10000.0, "use_scaled_rope": False,
    "nope_layer_interval": 4, "use_qk_norm": True, "attn_temperature_tuning": True, "floor_scale": 8.0,
    "attn_scale": 0.1,
    "moe_args": {"num_experts": 2, "capacity_factor": 1.0, "auto_scale_F": False, "top_k": 1},
}  # fmt: skip
WIDTH = 32  # of an expert: 2 * dim * ffn_exp / 3
_LAYER = {
    "attention.wqkv.layer_norm_weight": (32,),
    "feed_forward.norm.weight": (32,),
    **{f"attention.{name}.weight": (32, 32) for name in ("wq", "wk", "wv", "wo")},
    "feed_forward.router_DE": (32, 2),
    "feed_forward.w_in_shared_FD.weight": (WIDTH, 32),
    "feed_forward.w_swiglu_FD.weight": (WIDTH, 32),
    "feed_forward.w_out_shared_DF.weight": (32, WIDTH),
    "feed_forward.experts.moe_w_in_eD_F": (64, WIDTH),
    "feed_forward.experts.moe_w_swiglu_eD_F": (64, WIDTH),
    "feed_forward.experts.moe_w_out_eF_D": (2 * WIDTH, 32),
}
SHAPES: Mapping[str, tuple[int, ...]] = {
    "tok_embeddings.weight": (64, 32),
    **{f"layers.{i}.{name}": shape for i in range(2) for name, shape in _LAYER.items()},
    "norm.weight": (32,),
    "output.weight": (64, 32),
}
FIRST, NORM = "tok_embeddings.weight", "norm.weight"


def storages() -> dict[str, bytes]:
    """The bytes of every tensor, in half precision."""
    random = np.random.default_rng(0)
    return {
        str(i): random.normal(0, 0.1, shape).astype(np.float16).tobytes() for i, shape in enumerate(SHAPES.values())
    }


def tensors() -> dict[str, Tensor]:
    """How every tensor is pickled."""
    return {name: Tensor(text(str(i)), shape) for i, (name, shape) in enumerate(SHAPES.items())}


def pickle(before: bytes = b"", after: bytes = b"", extra: Mapping[str, bytes] | None = None) -> bytes:
    """The valid pickle with more opcodes or entries in it."""
    entries = {name: tensor.pickled() for name, tensor in tensors().items()}
    return state({**(extra or {}), **entries}, before, after)


def meta_checkpoint(folder: Path) -> None:
    """params.json and one file with all tensors."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(PARAMS))
    (folder / PTH).write_bytes(archive(torch_entries(pickle(), storages())))


def pickled(data: bytes) -> Callable[[Path], object]:
    """Damage: another pickle."""
    return lambda folder: (folder / PTH).write_bytes(archive(torch_entries(data, storages())))


def zipped(change: Callable[[list[Entry]], Sequence[Entry]], **ends: Any) -> Callable[[Path], object]:
    """Damage: other entries; ``ends`` are those of :func:`archive`."""
    return lambda folder: (folder / PTH).write_bytes(archive(change(torch_entries(pickle(), storages())), **ends))


def tensor(change: Callable[[Tensor], Tensor], name: str = FIRST) -> Callable[[Path], object]:
    """Damage: another description of one tensor."""
    entries = {key: (change(value) if key == name else value).pickled() for key, value in tensors().items()}
    return pickled(state(entries))
