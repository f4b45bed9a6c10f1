"""ONNX models as people export them: torch.onnx.export of transformers' Llama4ForCausalLM.

``python -m tests.exports`` makes the files in tests/onnx_in/exports anew (two layers, with and without caches), so that
most tests need no export, which takes seconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.checkpoints import write_random_checkpoint

FOLDER = Path(__file__).parent / "onnx_in" / "exports"
#: Layer 0: chunked, RoPE, QK norm, experts; layer 1: global, no RoPE, temperature, dense.
TWO_LAYERS: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 2,
    "no_rope_layers": [1, 0],
    "layer_types": ["chunked_attention", "full_attention"],
    "moe_layers": [0],
    "head_dim": 8,
    "initializer_range": 0.3,
}
#: File name to attention, dtype, whether caches go in and out, and opset (None: torch's own choice).
KINDS: dict[str, tuple[str, str, bool, int | None]] = {
    "eager": ("eager", "float32", False, None),
    "sdpa-bfloat16": ("sdpa", "bfloat16", False, None),
    "sdpa-cache": ("sdpa", "float32", True, None),
    "opset23-cache": ("sdpa", "float32", True, 23),
}


@contextlib.contextmanager
def real_rotation() -> Iterator[None]:
    """transformers indexes a complex tensor, which torch.onnx (2.13) cannot export: take its two parts apart first."""
    import torch
    from transformers.models.llama4 import modeling_llama4

    original = modeling_llama4.apply_rotary_emb

    def apply_rotary_emb(query: Any, key: Any, freqs: Any) -> tuple[Any, Any]:
        turn = torch.complex(freqs.real[:, :, None, :], freqs.imag[:, :, None, :])
        pairs = [torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) for x in (query, key)]
        query_out, key_out = (torch.view_as_real(x * turn).flatten(3) for x in pairs)
        return query_out.type_as(query), key_out.type_as(key)

    modeling_llama4.apply_rotary_emb = apply_rotary_emb
    try:
        yield
    finally:
        modeling_llama4.apply_rotary_emb = original


def export(
    checkpoint: Path,
    path: Path,
    attention: str = "sdpa",
    dtype: str = "float32",
    cache: bool = False,
    opset: int | None = None,
) -> Path:
    """Export a checkpoint with dynamic batch and sequence; returns ``path``."""
    import torch
    from transformers import Llama4ForCausalLM

    model: Any = Llama4ForCausalLM.from_pretrained(
        checkpoint, attn_implementation=attention, dtype=getattr(torch, dtype)
    ).eval()
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    ids, mask = torch.full((2, 3), 5), torch.ones(2, 12 if cache else 3, dtype=torch.long)
    with torch.no_grad(), real_rotation():
        if cache:
            program = _with_cache(model, ids, mask, free, opset)
        else:
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            shapes = {"input_ids": free, "attention_mask": free, "use_cache": None}
            program = torch.onnx.export(
                model,
                (),
                kwargs=inputs,
                dynamic_shapes=shapes,
                dynamo=True,
                opset_version=opset,
                output_names=["logits"],
                verbose=False,
            )
    program.save(path)  # type: ignore[union-attr]
    return path


def _with_cache(model: Any, ids: Any, mask: Any, free: dict[int, Any], opset: int | None) -> Any:
    import torch
    from transformers import DynamicCache

    class WithCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = model

        def forward(self, input_ids: Any, attention_mask: Any, past: Any) -> Any:
            cache = DynamicCache()
            for layer, (key, value) in enumerate(past):
                cache.update(key, value, layer)
            out = self.decoder(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True
            )
            return (out.logits, *(x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)))

    config = model.config
    shape = (2, config.num_key_value_heads, mask.shape[1] - ids.shape[1], config.head_dim)
    layers = range(config.num_hidden_layers)
    past = [tuple(torch.randn(shape, dtype=model.dtype) for _ in range(2)) for _ in layers]
    grows = {0: free[0], 2: free[1]}
    names = [f"{i}.{part}" for i in layers for part in ("key", "value")]
    return torch.onnx.export(
        WithCache(),
        (ids, mask, past),
        dynamic_shapes=(free, free, [(grows, grows)] * len(past)),
        input_names=["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        dynamo=True,
        opset_version=opset,
        verbose=False,
    )


def main() -> None:
    """Make the files anew, without the stack traces that torch writes into them."""
    import tempfile

    import onnx

    for name, (attention, dtype, cache, opset) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = write_random_checkpoint(Path(folder) / "checkpoint", dtype=dtype, **TWO_LAYERS)
            model = onnx.load(export(checkpoint, Path(folder) / "model.onnx", attention, dtype, cache, opset))
        for node in model.graph.node:
            kept = [p for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"]
            scopes = [onnx.StringStringEntryProto(key=p.key, value=p.value) for p in kept]
            node.ClearField("metadata_props")
            node.metadata_props.extend(scopes)
            node.ClearField("doc_string")
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
            value.ClearField("metadata_props")
        onnx.save(model, FOLDER / f"{name}.onnx")


if __name__ == "__main__":
    main()
