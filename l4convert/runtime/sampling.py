"""Choose the next token from logits: greedy, or sampled by temperature and nucleus."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from l4convert.errors import CheckFailed, UsageError


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token always.
        top_p: Sample among the fewest most likely tokens whose probabilities reach this sum (nucleus sampling,
            Holtzman et al. 2019, arXiv:1904.09751); 1 keeps all.
        seed: The same seed on the same logits gives the same tokens, on any machine.

    Raises:
        UsageError: A value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}, expected a number of at least 0")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}, expected a number above 0 and at most 1")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}, expected a number of at least 0")


class Sampler:
    """A sampler with its random state (PCG64): one for each generated text."""

    def __init__(self, options: SamplingOptions | None = None) -> None:
        self.options = options if options is not None else SamplingOptions()
        self._random = np.random.Generator(np.random.PCG64(self.options.seed))

    def __call__(self, logits: npt.NDArray[np.floating]) -> int:
        """Choose a token.

        Args:
            logits: [vocabulary].

        Raises:
            CheckFailed: A logit is NaN or infinite.
        """
        if not np.isfinite(logits).all():
            raise CheckFailed(
                "the model gave logits that are not finite", "`l4convert validate` shows where it starts."
            )
        if self.options.temperature == 0:
            return int(np.argmax(logits))
        tokens, probabilities = nucleus(logits, self.options.temperature, self.options.top_p)
        # Inverse transform on one uniform draw: numpy promises Generator.random's stream, but not choice's.
        drawn = np.searchsorted(np.cumsum(probabilities), self._random.random() * probabilities.sum(), side="right")
        return int(tokens[min(int(drawn), len(tokens) - 1)])


def nucleus(
    logits: npt.NDArray[np.floating], temperature: float, top_p: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens to sample from, most likely first, and their probabilities (float64, renormalised).

    Args:
        logits: [vocabulary], finite.
        temperature: Above 0.
        top_p: In (0, 1]. At least one token is kept.
    """
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    weights = np.exp(scaled)
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]  # mass of the tokens that are more likely
    kept = order[before < top_p]
    return kept, probabilities[kept] / probabilities[kept].sum()
