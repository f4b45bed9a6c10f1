"""Runs in .venv-optimum: generate greedily with optimum-onnx's ORTModelForCausalLM. JSON on stdin and stdout."""

import json
import sys
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def main() -> None:
    """Answer one request: ``model`` (folder), ``batches`` (of prompts, token ids), ``new_tokens``, ``pad``."""
    request = json.load(sys.stdin)
    model = ORTModelForCausalLM.from_pretrained(request["model"])
    outputs = [generate(model, batch, request) for batch in request["batches"]]
    json.dump({"config": type(model.config).__name__, "outputs": outputs}, sys.stdout)


def generate(model: Any, prompts: list[list[int]], request: dict[str, Any]) -> list[list[int]]:
    """Continue a batch of prompts, padded on the left as transformers' decoders are fed."""
    length = max(map(len, prompts))
    rows = [[request["pad"]] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with torch.inference_mode():
        sequences = model.generate(
            torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            max_new_tokens=request["new_tokens"],
            do_sample=False,
            pad_token_id=request["pad"],
        )
    return sequences[:, length:].tolist()


if __name__ == "__main__":
    main()
