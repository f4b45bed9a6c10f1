"""Choose how to run a comparison: every window in one call, or in steps."""

from __future__ import annotations

from collections.abc import Sequence

from l4convert.checkpoint.config import DecoderConfig
from l4convert.parity.at_once import AtOnce
from l4convert.parity.in_steps import InSteps, batch_limit
from l4convert.parity.splits import Split, batch_splits, long_splits, single_row_splits
from l4convert.parity.steps import is_long, longest_at_once
from l4convert.runtime.prefill import step_limit
from l4convert.runtime.runner import IntArray

Way = AtOnce | InSteps


def choose_way(
    windows: Sequence[IntArray], config: DecoderConfig, max_batch: int | None = None, one_stream: bool = False
) -> Way:
    """How to compare on ``windows``.

    Args:
        windows: Texts [tokens], the longest first.
        config: The model's hyperparameters.
        max_batch: The most texts that the artifact's runner takes at once; None: any number.
        one_stream: Whether it has only one stream at a time.
    """
    length = len(windows[0])
    if not is_long(length, config):
        return _at_once(windows, config, max_batch)
    if one_stream:
        beginning = _at_once([windows[0][: longest_at_once(config)]], config, max_batch)
        return InSteps(windows, (), (), beginning.too_many, beginning)
    chunk = config.attention_chunk_size
    lengths = batch_splits(length, chunk)[0].lengths
    batch = batch_splits(length, chunk, batch_limit(config, max(lengths), len(lengths)))
    done, too_many = _fitting(batch, max_batch)
    return InSteps(windows, long_splits(length, chunk, step_limit(config, length)), done, too_many)


def _at_once(windows: Sequence[IntArray], config: DecoderConfig, max_batch: int | None) -> AtOnce:
    length, chunk = len(windows[0]), config.attention_chunk_size
    done, too_many = _fitting(batch_splits(length, chunk), max_batch)
    return AtOnce(windows, single_row_splits(length, chunk), done, too_many)


def _fitting(batch: Sequence[Split], max_batch: int | None) -> tuple[Sequence[Split], int]:
    """The batches that a runner takes, and the texts of those that it does not."""
    done = [split for split in batch if max_batch is None or len(split.lengths) <= max_batch]
    return done, max((len(split.lengths) for split in batch if split not in done), default=0)
