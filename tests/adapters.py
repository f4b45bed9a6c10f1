"""LoRA adapters on disk, made by the peft library, and what peft itself merges."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

PARAMETERS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]


def write_adapter(base: Path, path: Path, seed: int = 0, std: float = 0.1, **config: Any) -> Path:
    """An adapter for a checkpoint, with random factors; both of them, since peft begins with a lora_B of zeros.

    Args:
        base: Folder of the checkpoint.
        path: Folder to make.
        seed: Of the factors.
        std: Of the factors, and of what is added to weights that are saved whole.
        **config: Fields of ``LoraConfig`` beside rank 4 and alpha 6.

    Returns:
        ``path``.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import Llama4ForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"r": 4, "lora_alpha": 6, **config}
        model: Any = Llama4ForCausalLM.from_pretrained(base)
        adapted: Any = get_peft_model(model, LoraConfig(**options))
        randomize(adapted, seed, std)
        adapted.save_pretrained(path)
    return path


def randomize(adapted: Any, seed: int = 0, std: float = 0.1) -> None:
    """Give a peft model random factors, and change what it saves whole."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = std * torch.randn(parameter.shape, generator=generator)
        elif "modules_to_save" in name:
            parameter.data += std * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def merged_by_peft(base: Path, *adapters: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """State dict of transformers' model after peft merged adapters into it, computed in a type of torch."""
    from peft import PeftModel
    from transformers import Llama4ForCausalLM

    model: Any = Llama4ForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, adapter).to(getattr(torch, dtype)).merge_and_unload()
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of an adapter in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors")


def edit_config(path: Path, **fields: Any) -> None:
    """Change fields of adapter_config.json."""
    import json

    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def as_torch(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Our tensors, float32."""
    return {name: torch.from_numpy(np.asarray(tensor.numpy(), np.float32)) for name, tensor in tensors.items()}
