"""How far logits are from a reference's: streaming, in float64, with memory for a few rows and one number a token.

Nothing here can pass by accident: a NaN, an infinity or an empty comparison is a problem that no threshold excuses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from l4convert.errors import CheckFailed

NO_TARGET = -1  # in `targets`: the text ends here, so there is no next token to be surprised by

_BLOCK_ELEMENTS = 1 << 22  # float64 elements worked on at a time: 32 MiB an array

Logits = npt.NDArray[np.floating]
Float64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Metrics:
    """A finished comparison. Where nothing could be measured the value is NaN.

    Attributes:
        tokens: Positions whose logits were compared; ``scored``: those of them with a known next token.
        non_finite: Positions left out because a logit of the artifact is NaN or infinite.
        non_finite_reference: The same of the reference.
        max_abs_logit: max |artifact - reference|; ``max_rel_logit``: that over max |reference|.
        mean_kl, p50_kl, p99_kl, max_kl: Of KL(reference || artifact) over tokens, in nats.
        top1: Share of tokens with the same most likely next token.
        ppl_reference, ppl_artifact: exp of the mean negative log likelihood of the next token.
    """

    tokens: int
    scored: int
    non_finite: int
    non_finite_reference: int
    max_abs_logit: float
    max_rel_logit: float
    mean_kl: float
    p50_kl: float
    p99_kl: float
    max_kl: float
    top1: float
    ppl_reference: float
    ppl_artifact: float

    @property
    def ppl_ratio(self) -> float:
        """The artifact's perplexity over the reference's; NaN where no next token is known."""
        return self.ppl_artifact / self.ppl_reference

    def problems(self) -> tuple[str, ...]:
        """What makes the comparison worthless whatever its numbers are; empty where it can be believed."""
        found = []
        if self.tokens == 0:
            found.append("no tokens were compared")
        if self.non_finite:
            found.append(f"the artifact gave NaN or Inf at {self.non_finite} tokens")
        if self.non_finite_reference:
            found.append(f"the reference gave NaN or Inf at {self.non_finite_reference} tokens")
        measured = (self.max_abs_logit, self.max_rel_logit, self.max_kl, *(self._scores() if self.scored else ()))
        if self.tokens and not all(math.isfinite(value) for value in measured):
            found.append("a measure is not finite")
        return tuple(found)

    def _scores(self) -> tuple[float, float]:
        return self.ppl_reference, self.ppl_artifact

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN and infinities, which JSON lacks, as None."""
        values = asdict(self) | {"ppl_ratio": self.ppl_ratio}
        return {key: value if math.isfinite(value) else None for key, value in values.items()}


@dataclass(frozen=True)
class Measured:
    """What was measured at consecutive tokens, one number a token.

    Attributes:
        finite, finite_reference: Whether all logits of the artifact, of the reference are finite, bool [N].
        difference: max |artifact - reference| over the vocabulary, [N]; ``largest``: max |reference|.
        agreeing: Whether both have the same most likely next token, bool [N].
        kl: KL(reference || artifact) in nats, [N].
        scored: Whether the next token is known, bool [N].
        nll_reference, nll_artifact: Its negative log likelihood, [N]; 0 where it is not known.

    Where a logit is not finite, only the first two mean something.
    """

    finite: Bools
    finite_reference: Bools
    difference: Float64
    largest: Float64
    agreeing: Bools
    kl: Float64
    scored: Bools
    nll_reference: Float64
    nll_artifact: Float64

    def __len__(self) -> int:
        return len(self.kl)

    def __getitem__(self, tokens: slice) -> Measured:
        return Measured(*(getattr(self, field.name)[tokens] for field in fields(self)))


def measure(reference: Logits, artifact: Logits, targets: npt.NDArray[np.int64] | None = None) -> Iterator[Measured]:
    """Compare the logits of some tokens, block by block.

    Args:
        reference: [N, vocabulary].
        artifact: The same shape.
        targets: [N], the next token of each, or ``NO_TARGET``; default: none is known.

    Raises:
        CheckFailed: The shapes differ.
    """
    if reference.shape != artifact.shape or reference.ndim != 2 or reference.shape[1] == 0:
        raise CheckFailed(f"logits of shape {artifact.shape} cannot be compared with {reference.shape}")
    if targets is None:
        targets = np.full(len(reference), NO_TARGET)
    for rows in _blocks(*reference.shape):
        yield _measure(reference[rows].astype(np.float64), artifact[rows].astype(np.float64), targets[rows])


def _measure(reference: Float64, artifact: Float64, targets: npt.NDArray[np.int64]) -> Measured:
    finite: Bools = np.all(np.isfinite(artifact), axis=1)
    finite_reference: Bools = np.all(np.isfinite(reference), axis=1)
    usable = (finite & finite_reference)[:, None]
    if not usable.all():
        reference, artifact = np.where(usable, reference, 0), np.where(usable, artifact, 0)
    log_p, log_q = log_softmax(reference), log_softmax(artifact)
    scored = targets != NO_TARGET
    index = np.arange(len(targets)), np.where(scored, targets, 0)
    return Measured(
        finite=finite,
        finite_reference=finite_reference,
        difference=np.abs(artifact - reference).max(axis=1),
        largest=np.abs(reference).max(axis=1),
        agreeing=reference.argmax(axis=1) == artifact.argmax(axis=1),
        kl=kl_divergence(log_p, log_q),
        scored=scored,
        nll_reference=np.where(scored, -log_p[index], 0),
        nll_artifact=np.where(scored, -log_q[index], 0),
    )


@dataclass
class Comparison:
    """Accumulates a comparison; :meth:`result` may be asked for at any time."""

    _kl: list[Float64] = field(default_factory=list)
    _max_abs: float = 0.0
    _max_reference: float = 0.0
    _agreeing: int = 0
    _scored: int = 0
    _nll_reference: float = 0.0
    _nll_artifact: float = 0.0
    _non_finite: int = 0
    _non_finite_reference: int = 0

    def update(self, reference: Logits, artifact: Logits, targets: npt.NDArray[np.int64] | None = None) -> None:
        """Compare the logits of some tokens; see :func:`measure`."""
        for measured in measure(reference, artifact, targets):
            self.add(measured)

    def add(self, measured: Measured) -> None:
        """Take in what was measured at some tokens."""
        usable = measured.finite & measured.finite_reference
        self._non_finite_reference += int((~measured.finite_reference).sum())
        self._non_finite += int((~measured.finite).sum())
        if not usable.any():
            return
        self._max_abs = max(self._max_abs, float(measured.difference[usable].max()))
        self._max_reference = max(self._max_reference, float(measured.largest[usable].max()))
        self._agreeing += int(measured.agreeing[usable].sum())
        self._kl.append(measured.kl[usable])
        self._scored += int(measured.scored[usable].sum())
        self._nll_reference += float(measured.nll_reference[usable].sum())
        self._nll_artifact += float(measured.nll_artifact[usable].sum())

    def result(self) -> Metrics:
        """What the tokens so far amount to."""
        kl = np.concatenate(self._kl) if self._kl else np.array([np.nan])
        tokens = sum(len(part) for part in self._kl)
        p50, p99 = np.percentile(kl, (50, 99))
        return Metrics(
            tokens=tokens,
            scored=self._scored,
            non_finite=self._non_finite,
            non_finite_reference=self._non_finite_reference,
            max_abs_logit=self._max_abs if tokens else math.nan,
            max_rel_logit=_ratio(self._max_abs, self._max_reference) if tokens else math.nan,
            mean_kl=float(kl.mean()),
            p50_kl=float(p50),
            p99_kl=float(p99),
            max_kl=float(kl.max()),
            top1=self._agreeing / tokens if tokens else math.nan,
            ppl_reference=_perplexity(self._nll_reference, self._scored),
            ppl_artifact=_perplexity(self._nll_artifact, self._scored),
        )


def log_softmax(logits: Float64) -> Float64:
    """Log probabilities over the last axis; shifted by the maximum, so that nothing overflows."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Float64 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def kl_divergence(log_p: Float64, log_q: Float64) -> Float64:
    """KL(p || q) over the last axis, in nats, from log probabilities; never below 0, as rounding could make it."""
    result: Float64 = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=-1), 0.0)
    return result


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def _ratio(difference: float, scale: float) -> float:
    if scale > 0:
        return difference / scale
    return 0.0 if difference == 0 else math.inf


def _perplexity(nll: float, scored: int) -> float:
    if scored == 0:
        return math.nan
    try:
        return math.exp(nll / scored)
    except OverflowError:
        return math.inf
