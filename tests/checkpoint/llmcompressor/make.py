"""Make the checkpoints of this folder with llm-compressor itself, on a CPU.

They are kept in the repository because llm-compressor 0.14 asks for an older transformers than the one everything else
is tested with. It was installed beside it without its requirements, into an environment that sees the project's:

    python -m venv --system-site-packages made && made/bin/pip install --no-deps llmcompressor==0.14.0.1 datasets ...
    made/bin/python -m tests.checkpoint.llmcompressor.make

Made with llmcompressor 0.14.0.1, compressed-tensors 0.20.0, transformers 5.23.0 and torch 2.13.0.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import checkpoints

HERE = Path(__file__).parent
SIZES: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 2,
    "no_rope_layer_interval": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
}
NOT_LINEAR = ["re:.*lm_head", "re:.*router", "re:vision_model.*", "re:multi_modal_projector.*"]
EXPERTS_ONLY = [*NOT_LINEAR, "re:.*self_attn", "re:.*shared_expert", r"re:.*feed_forward\.(gate|up|down)_proj"]

# Folder -> scheme, modules to leave alone, changes of the model.
CASES: Mapping[str, tuple[str, list[str], Mapping[str, Any]]] = {
    # meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8: routed experts only, in every second layer.
    "fp8-dynamic": ("FP8_DYNAMIC", EXPERTS_ONLY, checkpoints.MAVERICK),
    # One scale a tensor, and static scales of activations.
    "fp8-static": ("FP8", NOT_LINEAR, {}),
    # RedHatAI/Llama-4-Scout-17B-16E-Instruct-NVFP4: everything linear in the decoder but routers.
    "nvfp4": ("NVFP4", NOT_LINEAR, {}),
}


def main() -> None:
    checkpoints.VISION = {**checkpoints.VISION, "image_size": 4, "patch_size": 2}
    for name, (scheme, ignore, changes) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            source = checkpoints.write_random_checkpoint(Path(folder), conditional=True, **{**SIZES, **changes})
            compress(source, HERE / name, scheme, ignore)


def compress(source: Path, path: Path, scheme: str, ignore: list[str]) -> None:
    """Quantize a checkpoint as llm-compressor's examples do, calibrated on random tokens."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from tokenizers import Tokenizer, models
    from transformers import Llama4ForConditionalGeneration, PreTrainedTokenizerFast

    model: Any = Llama4ForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    tokens = torch.randint(3, 90, (8, 48), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * 48] * 8})
    letters = Tokenizer(models.BPE(vocab={chr(code): code for code in range(32, 90)}, merges=[]))
    processor: Any = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="A")
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=ignore)
    calibration = {"dataset": data, "processor": processor, "max_seq_length": 48, "pipeline": "basic"}
    oneshot(model=model, recipe=recipe, **({} if scheme == "FP8_DYNAMIC" else calibration))
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path, save_compressed=True)


if __name__ == "__main__":
    main()
