"""Llama 4 checkpoints quantized and exported by NVIDIA's ModelOpt itself, on a CPU."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

from tests.checkpoints import write_random_checkpoint


def export(path: Path, recipe: str, *, kv_cache: bool = False, conditional: bool = False, **overrides: Any) -> Path:
    """Calibrate a random checkpoint on random tokens, quantize and export it.

    Args:
        path: Folder to make; the checkpoint that it was made from is beside it, with ``-bf16`` after its name.
        recipe: Name of one of ModelOpt's quantization configs, such as ``FP8_DEFAULT_CFG``.
        kv_cache: Quantize the caches to FP8 as well.
        conditional: The multimodal model.
        **overrides: See :func:`tests.checkpoints.write_random_checkpoint`.

    Returns:
        ``path``.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions of transformers that ModelOpt is not tested with, and of its own
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
        from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

        source = write_random_checkpoint(path.with_name(f"{path.name}-bf16"), conditional=conditional, **overrides)
        kind: Any = Llama4ForConditionalGeneration if conditional else Llama4ForCausalLM
        model = kind.from_pretrained(source, dtype=torch.bfloat16)
        config = copy.deepcopy(getattr(mtq, recipe))
        if kv_cache:
            config["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
        tokens = torch.randint(3, 90, (2, 48), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            mtq.quantize(model, config, lambda quantized: quantized(input_ids=tokens))
            export_hf_checkpoint(model, export_dir=str(path))
    return path
