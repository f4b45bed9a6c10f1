"""Feed tokens, get logits: the interface of our sessions and of the references they are compared with."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from l4convert.checkpoint.config import DecoderConfig
from l4convert.errors import InputError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class Stream(Protocol):
    """A batch of sequences that is being fed, call by call; it remembers everything it was given before."""

    def step(self, input_ids: IntArray, mask: IntArray | None = None) -> FloatArray:
        """Append tokens to every sequence of the batch.

        Args:
            input_ids: [B, S], S >= 1.
            mask: [B, S], 1 for a token and 0 for padding, which may be anywhere; default: all tokens.

        Returns:
            Logits [B, S, vocabulary]; those at padding mean nothing.
        """
        ...


class Runner(Protocol):
    """A model that is ready to run; a context manager, because it may hold gigabytes."""

    @property
    def name(self) -> str:
        """What to call it in a report."""
        ...

    def start(self, batch: int) -> Stream:
        """Begin ``batch`` empty sequences."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ModelRunner(Runner, Protocol):
    """A runner that says what its model is and how long a text can be."""

    @property
    def config(self) -> DecoderConfig:
        """The model's hyperparameters."""
        ...

    @property
    def max_length(self) -> int:
        """How many tokens a sequence can have."""
        ...


@runtime_checkable
class SparingStream(Protocol):
    """A stream that can do without the logits of all tokens but the last."""

    def last(self, input_ids: IntArray) -> FloatArray:
        """Append tokens [B, S]; logits [B, vocabulary] of the last one of each row."""
        ...


@runtime_checkable
class SelfLimitedStream(Protocol):
    """A stream that knows how many tokens it can take at once in bounded memory."""

    def step_limit(self, context: int) -> int:
        """The most tokens to append so that a row has ``context`` of them afterwards."""
        ...


def last_logits(stream: Stream, input_ids: IntArray) -> FloatArray:
    """Append tokens [B, S] to a stream, none of them padding; give the logits [B, vocabulary] of each row's last one.

    A stream on a GPU does not copy the others to the host: 0.4 GB for 512 tokens of a vocabulary of 202,048.
    """
    return stream.last(input_ids) if isinstance(stream, SparingStream) else stream.step(input_ids)[:, -1]


def check_step(input_ids: IntArray, mask: IntArray | None, batch: int) -> IntArray:
    """Check the arguments of :meth:`Stream.step`; these are programming errors, hence ``ValueError``.

    Returns:
        The mask [B, S] of int64, made up where there was none.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != batch or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids has shape {input_ids.shape}, expected ({batch}, S) with S >= 1")
    if mask is None:
        return np.ones(input_ids.shape, np.int64)
    if mask.shape != input_ids.shape or not np.isin(mask, (0, 1)).all():
        raise ValueError(f"mask of shape {mask.shape} is not zeros and ones of shape {input_ids.shape}")
    return mask.astype(np.int64)


def check_vocabulary(input_ids: IntArray, vocabulary: int) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        InputError: One is negative or not below ``vocabulary``.
    """
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"token {low if low < 0 else high} is outside the model's vocabulary of {vocabulary}",
            "The artifact's tokenizer.json belongs to another model.",
        )
