"""Checkpoints of transformers' ``fbgemm_fp8``, made by its own conversion but for one kernel that needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.checkpoints import save_sharded, write_random_checkpoint

DENSE = ("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj")
#: What FbgemmFp8Config leaves alone here: all but the routed experts and the output projections of attention.
KEPT = ("lm_head", "router", "shared_expert", "q_proj", "k_proj", "v_proj", *DENSE)


def write_fbgemm_checkpoint(path: Path, **overrides: Any) -> Path:
    """Quantize a random checkpoint, experts stacked; the source lies beside it, with ``-bf16`` after its name."""
    import torch
    from safetensors.torch import load_file
    from transformers import Llama4ForCausalLM, Llama4TextConfig
    from transformers.integrations import fbgemm_fp8

    fbgemm: Any = fbgemm_fp8

    source = write_random_checkpoint(path.with_name(f"{path.name}-bf16"), **overrides)
    values = json.loads((source / "config.json").read_text())
    with torch.device("meta"):
        model: Any = Llama4ForCausalLM(Llama4TextConfig(**values))
        for name, module in list(model.named_modules()):
            if name.endswith(".experts"):
                model.set_submodule(name, fbgemm.FbgemmFp8Llama4TextExperts(model.config))
            elif isinstance(module, torch.nn.Linear) and not any(kept in name for kept in KEPT):
                new = fbgemm.FbgemmFp8Linear(module.in_features, module.out_features, bias=False)
                model.set_submodule(name, new)
    fbgemm.quantize_fp8_per_row = _quantize_per_row  # what replace_with_fbgemm_fp8_linear would set
    convert = fbgemm.FbgemmFp8Quantize(None).convert
    result: dict[str, Any] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        quantized = isinstance(
            model.get_submodule(name.rpartition(".")[0]),
            fbgemm.FbgemmFp8Linear | fbgemm.FbgemmFp8Llama4TextExperts,
        )
        result |= convert({name: [tensor]}, model) if quantized else {name: tensor}
    path.mkdir(parents=True)
    save_sharded(path, {name: tensor.detach().contiguous() for name, tensor in result.items()}, 1)
    settings = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": list(KEPT)}
    (path / "config.json").write_text(json.dumps({**values, "quantization_config": settings}))
    return path


def _quantize_per_row(rows: Any) -> tuple[Any, Any]:
    """``torch.ops.fbgemm.quantize_fp8_per_row``, which only GPUs have: the largest magnitude of a row becomes 448."""
    import torch

    scale = rows.float().abs().amax(dim=1).clamp(min=1e-12) / 448
    return (rows.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn), scale
