"""Feed a prompt of any length with memory that has a bound.

A step of S tokens over a context of T makes scores of heads x S x T numbers in a layer, and S x vocabulary logits. Both
stay under :data:`BUDGET`, so that steps become shorter as the context grows, except where the kernel never holds all
scores at once. They end at chunk boundaries: a chunked
layer then sees one chunk at a time, which is the case that kernels are made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from l4convert.checkpoint.config import DecoderConfig
from l4convert.progress import NO_PROGRESS, Progress
from l4convert.runtime.runner import FloatArray, IntArray, SelfLimitedStream, SparingStream, Stream, last_logits

#: The most bytes that the scores of one layer, and the logits of one step, may take.
BUDGET = 512 << 20
_FLOAT32 = 4


def step_limit(config: DecoderConfig, context: int, batch: int = 1, *, scores: bool = True) -> int:
    """The most tokens to feed at once.

    Args:
        config: The model's hyperparameters.
        context: Tokens of a row after the step.
        batch: Rows.
        scores: Whether all scores of a layer are held at once.

    Returns:
        At least 1, even where the scores of a single token take more than :data:`BUDGET`.
    """
    a_token = batch * max(scores * config.num_attention_heads * context, config.vocab_size) * _FLOAT32
    return max(1, BUDGET // a_token)


def prefill_steps(start: int, tokens: int, chunk: int, limit: int | Callable[[int], int]) -> Iterator[int]:
    """Sizes of steps that feed a prompt; none crosses a chunk boundary.

    Args:
        start: Tokens that were fed before.
        tokens: Tokens of the prompt.
        chunk: C, the chunk size.
        limit: The most tokens of a step; or a function that gives it for the length of the context after the step.
    """
    at, end = start, start + tokens
    while at < end:
        width = min(end - at, chunk - at % chunk)
        width = max(1, min(width, limit(at + width) if callable(limit) else limit))
        yield width
        at += width


def prefill(
    stream: Stream,
    ids: IntArray,
    config: DecoderConfig,
    progress: Progress = NO_PROGRESS,
    start: int = 0,
) -> FloatArray:
    """Feed a prompt to every row of a stream.

    A stream that gives the last logits alone has its memory set apart, and cuts its steps itself.

    Args:
        stream: Where to; its rows have ``start`` tokens each.
        ids: Token ids [B, T], T >= 1.
        config: The model's hyperparameters.
        progress: Shows the tokens fed so far.
        start: Tokens of each row before.

    Returns:
        Logits [B, vocabulary] of each row's last token.
    """
    (rows, total), chunk = ids.shape, config.attention_chunk_size
    limit: int | Callable[[int], int] = lambda context: step_limit(config, context, rows)  # noqa: E731
    if isinstance(stream, SparingStream):
        limit = chunk
    elif isinstance(stream, SelfLimitedStream):
        limit = stream.step_limit
    done = 0
    with progress.task("Reading the prompt", total=total, unit="tokens") as task:
        for size in prefill_steps(start, total, chunk, limit):
            logits = last_logits(stream, ids[:, done : done + size])
            done += size
            task.advance(size)
    return logits
