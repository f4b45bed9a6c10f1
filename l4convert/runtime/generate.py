"""Generate text, token by token, as it comes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from l4convert.errors import InputError, UsageError
from l4convert.runtime.manifest import read_artifact, read_json
from l4convert.runtime.runner import IntArray, Runner, Stream, last_logits
from l4convert.runtime.sampling import Sampler
from l4convert.runtime.tokenizer import TextTokenizer

# A prompt goes in by calls of this many tokens: any split gives the same logits, and the logits of a whole
# long prompt would fill the memory (0.8 GB for each thousand tokens of a vocabulary of 202,048).
PREFILL_TOKENS = 512


def generate(
    runner: Runner,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    eos_ids: Collection[int] = (),
    prefill_tokens: int = PREFILL_TOKENS,
) -> Iterator[int]:
    """Continue one prompt.

    Args:
        runner: For example an :class:`~l4convert.runtime.session.OrtSession`.
        prompt_ids: The prompt's tokens, at least one.
        max_new_tokens: The most tokens to yield.
        sampler: Chooses each token.
        eos_ids: Tokens that end the text; the one that does is yielded too, as the last.
        prefill_tokens: How many tokens of the prompt to feed at once.

    Yields:
        Token ids, each as soon as it is known.

    Raises:
        UsageError: An empty prompt, no tokens asked for, or more positions than the runner has.
        CheckFailed: The model gives logits that are not finite.
    """
    if not prompt_ids:
        raise UsageError("the prompt has no tokens", "Give a prompt of at least one token.")
    if max_new_tokens < 1:
        raise UsageError(f"{max_new_tokens} new tokens were asked for, expected at least 1")
    prompt = np.array([prompt_ids], np.int64)
    parts = [prompt[:, start : start + prefill_tokens] for start in range(0, prompt.shape[1], prefill_tokens)]
    return _continue(runner.start(1), parts, max_new_tokens, sampler, eos_ids)


def _continue(
    stream: Stream, parts: Sequence[IntArray], max_new_tokens: int, sampler: Sampler, eos_ids: Collection[int]
) -> Iterator[int]:
    for part in parts[:-1]:
        last_logits(stream, part)
    logits = last_logits(stream, parts[-1])[0]
    for made in range(1, max_new_tokens + 1):
        token = sampler(logits)
        yield token
        if token in eos_ids or made == max_new_tokens:
            return
        logits = last_logits(stream, np.array([[token]], np.int64))[0]


def generate_text(
    runner: Runner,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampler: Sampler,
    eos_ids: Collection[int] = (),
) -> Iterator[str]:
    """Continue a text; :func:`generate` between the tokenizer's two directions.

    Yields:
        Pieces of text, never empty, never half a character; special tokens are left out.
    """
    ids = tokenizer.encode(prompt)
    if tokenizer.suffix_ids:
        ids = ids[: -len(tokenizer.suffix_ids)]  # an end-of-text token would end the text before it begins
    tokens = generate(runner, ids, max_new_tokens=max_new_tokens, sampler=sampler, eos_ids=eos_ids)
    return _decoded(tokens, tokenizer)


def _decoded(tokens: Iterator[int], tokenizer: TextTokenizer) -> Iterator[str]:
    stream = tokenizer.stream()
    for token in tokens:
        if piece := stream.push(token):
            yield piece
    if rest := stream.finish():
        yield rest


def eos_token_ids(artifact: Path) -> frozenset[int]:
    """The tokens that end a text: those of ``generation_config.json``, or else those of the model's config.

    Raises:
        InputError: ``generation_config.json`` is damaged.
    """
    file = artifact / "generation_config.json"
    value = read_json(file).get("eos_token_id") if file.is_file() else None
    if value is None:
        return frozenset(read_artifact(artifact).config.eos_token_ids)
    values = value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in values):
        raise InputError(f"{file}: eos_token_id is {value!r}, expected a token id or a list of them")
    return frozenset(values)
