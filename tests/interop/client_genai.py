"""Runs in .venv-genai: generate greedily with ONNX Runtime GenAI, as its own examples do. JSON on stdin and stdout."""

import json
import sys
from typing import Any

import numpy as np
import onnxruntime_genai as og


def main() -> None:
    """Answer one request: ``model`` (folder), ``text``, ``batches`` (of prompts, token ids), ``new_tokens``."""
    request = json.load(sys.stdin)
    model = og.Model(request["model"])
    tokenizer = og.Tokenizer(model)
    outputs, buffers = [], []
    for batch in request["batches"]:
        generator = start(model, batch, request)
        outputs.append(generate(generator, len(batch), max(map(len, batch))))
        buffers.append(cache_lengths(generator))
    answer = {
        "prompt": ints(tokenizer.encode(request["text"])),
        "outputs": outputs,
        "buffers": buffers,
        "texts": [[tokenizer.decode(np.array(ids, np.int32)) for ids in batch] for batch in outputs],
    }
    json.dump(answer, sys.stdout)


def start(model: Any, prompts: list[list[int]], request: dict[str, Any]) -> Any:
    """Feed a batch of prompts; the artifact's configuration decides everything but what is asked for here."""
    length = max(map(len, prompts))
    options = {"max_length": length + request["new_tokens"], "batch_size": len(prompts), "do_sample": False}
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(**options, **request.get("search", {}))
    generator = og.Generator(model, parameters)
    position = 0
    for piece in request.get("pieces", [length]):  # lengths of the calls the prompt goes in by; a batch has only one
        tokens = padded([prompt[position : position + piece] for prompt in prompts], request["pad"])
        generator.append_tokens(tokens if len(prompts) > 1 else tokens[0])
        position += piece
    return generator


def generate(generator: Any, batch: int, prompt_length: int) -> list[list[int]]:
    """The tokens that continue each prompt."""
    while not generator.is_done():
        generator.generate_next_token()
    return [ints(generator.get_sequence(row))[prompt_length:] for row in range(batch)]


def cache_lengths(generator: Any) -> list[int]:
    """Length of each layer's key cache in the last call."""
    lengths: list[int] = []
    while True:
        try:
            lengths.append(generator.get_input(f"past_key_values.{len(lengths)}.key").shape[2])
        except RuntimeError:  # no such layer
            return lengths


def padded(prompts: list[list[int]], pad: int) -> Any:
    """Prompts as int32 [B,S], padded on the right as ``Tokenizer.encode_batch`` does."""
    length = max(map(len, prompts))
    return np.array([[*prompt, *[pad] * (length - len(prompt))] for prompt in prompts], np.int32)


def ints(tokens: Any) -> list[int]:
    """Plain integers, for JSON."""
    return [int(token) for token in tokens]


if __name__ == "__main__":
    main()
