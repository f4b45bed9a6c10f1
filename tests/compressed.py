"""Quantized checkpoints as llm-compressor saves them, made with the compressed-tensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.checkpoints import save_sharded, unfuse

# What the published W4A16 checkpoints of Llama 4 leave alone.
IGNORE = ("re:.*lm_head", "re:.*self_attn", "re:.*router", "re:vision_model.*", "re:multi_modal_projector.*")
W4A16: Mapping[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
PACKED = "pack-quantized"


def compress(
    source: Path,
    path: Path,
    weights: Mapping[str, Any] = W4A16,
    *,
    form: str = PACKED,
    inputs: Mapping[str, Any] | None = None,
    ignore: tuple[str, ...] = IGNORE,
    shards: int = 1,
    **config: Any,
) -> Path:
    """Quantize a random checkpoint of :func:`tests.checkpoints.write_random_checkpoint`, experts one by one.

    Args:
        source: The checkpoint, experts stacked or not.
        path: Folder to make.
        weights: Arguments of compressed-tensors' ``QuantizationArgs``.
        form: The library's format.
        inputs: Arguments of ``QuantizationArgs`` for activations.
        ignore: Modules that stay as they are.
        shards: Number of files.
        **config: More keys of ``quantization_config``.

    Returns:
        ``path``.
    """
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.utils.match import match_name
    from safetensors.torch import load_file

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=form)
    compressor: Any = BaseCompressor.get_value_from_registry(form)
    tensors = {
        name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    result: dict[str, Any] = {}
    for name, tensor in unfuse(tensors).items():
        module = name.removesuffix(".weight")
        plain = tensor.ndim != 2 or "embed" in name or any(match_name(module, pattern) for pattern in ignore)
        if plain:
            result[name] = tensor
            continue
        with torch.compiler.set_stance("force_eager"):  # else rounding to FP4 is compiled, which takes a minute
            local = compressor.compress({"weight": tensor, **_scales(tensor, scheme.weights)}, scheme)
        result |= {f"{module}.{key}": value.contiguous() for key, value in local.items()}
    path.mkdir(parents=True)
    save_sharded(path, result, shards)
    values = json.loads((source / "config.json").read_text())
    values["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": dict(weights), "input_activations": inputs}},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        **config,
    }
    (path / "config.json").write_text(json.dumps(values))
    return path


def _scales(weight: Any, args: Any) -> dict[str, Any]:
    """Scales and zero points as the library's own min-max rule has them."""
    from compressed_tensors.quantization.utils import calculate_qparams

    if args.strategy == "tensor":
        blocks = weight.float().reshape(1, -1)
    elif args.strategy == "block":
        height, width = args.block_structure
        blocks = weight.float().unfold(0, height, height).unfold(1, width, width).flatten(2)
    else:
        size = args.group_size if args.strategy == "group" else weight.shape[1]
        blocks = weight.float().reshape(weight.shape[0], -1, size)
    scale, zero_point = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    return {"weight_scale": scale.to(weight.dtype), "weight_zero_point": zero_point}
