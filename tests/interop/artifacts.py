"""Artifacts for the clients, and what the clients' answers are compared with."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l4convert.pipeline import ConvertOptions, convert
from l4convert.runtime import OrtSession, Sampler, TextTokenizer, eos_token_ids, generate

NEW_TOKENS = 100
TEXT = inspect.getsource(textwrap)  # every machine has it, and the checkpoints were trained on text like it


@dataclass(frozen=True)
class Case:
    """An artifact, two prompts for it, and our own greedy continuation of each.

    Attributes:
        prompts: Token ids; the first one is longer than two attention chunks, the second one shorter than the first.
        greedy: What ``l4convert generate`` continues each prompt with, alone.
        pad: The id that fills up the shorter prompts of a batch.
    """

    checkpoint: Path
    artifact: Path
    chunk_size: int
    prompts: list[list[int]]
    greedy: list[list[int]]
    pad: int


def make_case(checkpoint: Path, artifact: Path, *, recipe: str, kv_cache: str, kv_dtype: str | None = None) -> Case:
    """Convert a checkpoint for the target ``cpu``, perhaps with quantized caches, and generate from the result."""
    options = ConvertOptions(checkpoint, artifact, target="cpu", recipe=recipe, kv_cache=kv_cache)
    if kv_dtype is not None:
        text = artifact.parent / "calibration.txt"
        text.write_text(TEXT)
        options = dataclasses.replace(options, kv_dtype=kv_dtype, calibration=text)
    convert(options)
    ids = TextTokenizer.open(artifact).encode(TEXT, special=False)
    with OrtSession.open(artifact) as session:
        config = session.config
        chunk = config.attention_chunk_size
        long, short = 2 * chunk + chunk // 3, chunk + chunk // 4
        prompts = [ids[:long], ids[2 * long : 2 * long + short]]
        greedy = [
            list(generate(session, p, max_new_tokens=NEW_TOKENS, sampler=Sampler(), eos_ids=eos_token_ids(artifact)))
            for p in prompts
        ]
    assert config.pad_token_id is not None
    return Case(checkpoint, artifact, chunk, prompts, greedy, config.pad_token_id)


def crosses_chunk(case: Case) -> bool:
    """Whether each continuation runs over the end of an attention chunk."""
    return all(
        (len(prompt) + len(made)) // case.chunk_size > len(prompt) // case.chunk_size
        for prompt, made in zip(case.prompts, case.greedy, strict=True)
    )


def reference_shortfall(checkpoint: Path, prompt: Sequence[int], made: Sequence[int]) -> float:
    """How far the tokens made are from transformers' greedy choices: 0 where each of them is exactly that.

    By induction, a continuation is the greedy one if each of its tokens has the largest logit after the tokens before
    it, so one call over all of them decides.

    Returns:
        The largest difference between the largest logit and the chosen token's, relative to the largest |logit|.
    """
    import torch
    from transformers import Llama4ForCausalLM

    model = Llama4ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *made]]), use_cache=False).logits[0, len(prompt) - 1 : -1].numpy()
    chosen = logits[np.arange(len(made)), np.array(made)]
    return float(np.max(logits.max(axis=1) - chosen) / np.max(np.abs(logits)))
