"""Generate text, token by token, as it comes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from l4convert.checkpoint.config import DecoderConfig
from l4convert.errors import InputError, UsageError
from l4convert.progress import NO_PROGRESS, Progress
from l4convert.runtime.manifest import read_artifact, read_json
from l4convert.runtime.prefill import prefill
from l4convert.runtime.runner import IntArray, ModelRunner, last_logits
from l4convert.runtime.sampling import Sampler
from l4convert.runtime.tokenizer import TextTokenizer


def generate(
    runner: ModelRunner,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    eos_ids: Collection[int] = (),
    progress: Progress = NO_PROGRESS,
) -> Iterator[int]:
    """Continue one prompt.

    Args:
        runner: For example an :class:`~l4convert.runtime.session.OrtSession`.
        prompt_ids: The prompt's tokens, at least one. They are fed in steps of bounded memory.
        max_new_tokens: The most tokens to yield.
        sampler: Chooses each token.
        eos_ids: Tokens that end the text; the one that does is yielded too, as the last.
        progress: Shows how much of the prompt was read.

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
    check_positions(len(prompt_ids), runner.config, runner.max_length)
    prompt = np.array([prompt_ids], np.int64)
    return _continue(runner, prompt, max_new_tokens, sampler, eos_ids, progress)


def check_positions(tokens: int, config: DecoderConfig, max_length: int | None = None) -> None:
    """Refuse a prompt that cannot be read to its end.

    Raises:
        UsageError: It has more tokens than the model has positions, or than what runs it has room for.
    """
    positions = config.max_position_embeddings
    if tokens > positions:
        raise UsageError(f"the prompt has {tokens} tokens and the model {positions} positions", "Shorten the prompt.")
    if max_length is not None and tokens > max_length:
        raise UsageError(
            f"the prompt has {tokens} tokens, and there is room for {max_length}",
            "Open the artifact with a larger maximum length, or build an engine with a larger --max-context.",
        )


def _continue(
    runner: ModelRunner,
    prompt: IntArray,
    max_new_tokens: int,
    sampler: Sampler,
    eos_ids: Collection[int],
    progress: Progress,
) -> Iterator[int]:
    stream = runner.start(1)
    logits = prefill(stream, prompt, runner.config, progress)[0]
    for made in range(1, max_new_tokens + 1):
        token = sampler(logits)
        yield token
        if token in eos_ids or made == max_new_tokens:
            return
        logits = last_logits(stream, np.array([[token]], np.int64))[0]


def generate_text(
    runner: ModelRunner,
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
