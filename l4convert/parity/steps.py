"""When a window is too long for one call, and the steps that the reference is fed in then."""

from __future__ import annotations

from l4convert.checkpoint.config import DecoderConfig
from l4convert.runtime.prefill import prefill_steps

#: The most numbers that the logits of a window, tokens x vocabulary, and the scores of one layer's eager attention,
#: tokens^2 x heads, may be for the window to be computed in one call: 1 GiB each in float32. That is 1,328 tokens of
#: Scout (vocabulary 202,048, 40 heads).
AT_ONCE = 1 << 28
#: Bytes that each of the large arrays of one step of the reference may take.
STEP_BYTES = 256 << 20
MOST_TOKENS = 2048  # of a step of the reference, so that a progress bar moves
_FLOAT32 = 4
_MASK_BYTES = 5  # for a query and a key: a Boolean, and the float32 that PyTorch makes of it


def is_long(tokens: int, config: DecoderConfig) -> bool:
    """Whether a window of so many tokens has to be fed in steps."""
    return max(tokens * config.vocab_size, tokens**2 * config.num_attention_heads) > AT_ONCE


def longest_at_once(config: DecoderConfig) -> int:
    """The most tokens of a window that is not long."""
    by_scores = int((AT_ONCE / config.num_attention_heads) ** 0.5)
    return min(AT_ONCE // config.vocab_size, by_scores)


def reference_limit(config: DecoderConfig, context: int) -> int:
    """The most tokens of a step of the reference; at least 1.

    A step of S tokens makes a mask of S x context, logits of S x vocabulary, and for a mixture of experts, which
    transformers computes for all tokens in all experts, S x experts x 2 x intermediate size.
    """
    experts = config.num_local_experts * 2 * config.intermediate_size * _FLOAT32
    fitting = STEP_BYTES // max(_MASK_BYTES * context, config.vocab_size * _FLOAT32, experts)
    return max(1, min(fitting, MOST_TOKENS))


def reference_steps(tokens: int, config: DecoderConfig) -> list[int]:
    """Sizes of the steps of a window of ``tokens``: whole chunks where they fit, else parts of one chunk."""
    chunk, limit = config.attention_chunk_size, reference_limit(config, tokens)
    if limit < chunk:
        return list(prefill_steps(0, tokens, chunk, limit))
    width = limit // chunk * chunk
    return [min(width, tokens - at) for at in range(0, tokens, width)]
