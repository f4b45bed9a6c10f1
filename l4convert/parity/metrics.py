"""How far logits are from a reference's: streaming, in float64, with memory for a few rows and one number a token.

Nothing here can pass by accident: a NaN, an infinity or an empty comparison is a problem that no threshold excuses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from l4convert.errors import CheckFailed

NO_TARGET = -1  # in `targets`: the text ends here, so there is no next token to be surprised by

_BLOCK_ELEMENTS = 1 << 22  # float64 elements worked on at a time: 32 MiB an array

Logits = npt.NDArray[np.floating]
Float64 = npt.NDArray[np.float64]


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
        """Compare the logits of some tokens.

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
            self._update_block(reference[rows].astype(np.float64), artifact[rows].astype(np.float64), targets[rows])

    def _update_block(self, reference: Float64, artifact: Float64, targets: npt.NDArray[np.int64]) -> None:
        finite_reference = np.isfinite(reference).all(axis=1)
        finite = np.isfinite(artifact).all(axis=1)
        self._non_finite_reference += int((~finite_reference).sum())
        self._non_finite += int((~finite).sum())
        usable = finite & finite_reference
        if not usable.any():
            return
        reference, artifact, targets = reference[usable], artifact[usable], targets[usable]
        self._max_abs = max(self._max_abs, float(np.abs(artifact - reference).max()))
        self._max_reference = max(self._max_reference, float(np.abs(reference).max()))
        self._agreeing += int((reference.argmax(axis=1) == artifact.argmax(axis=1)).sum())
        log_p, log_q = log_softmax(reference), log_softmax(artifact)
        self._kl.append(kl_divergence(log_p, log_q))
        scored = targets != NO_TARGET
        index = (np.flatnonzero(scored), targets[scored])
        self._scored += int(scored.sum())
        self._nll_reference -= float(log_p[index].sum())
        self._nll_artifact -= float(log_q[index].sum())

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
