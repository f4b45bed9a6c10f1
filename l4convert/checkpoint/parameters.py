"""Counting parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from l4convert.checkpoint.config import DecoderConfig

# A routed expert's weights, stacked or one by one; the router and the shared expert work on every token.
ROUTED = re.compile(r"\.feed_forward\.experts\.")


class Sized(Protocol):
    """Anything that knows how many elements it has."""

    @property
    def size(self) -> int:
        """Number of elements."""


def parameter_counts(config: DecoderConfig, tensors: Mapping[str, Sized]) -> tuple[int, int]:
    """All parameters of the text decoder, and those that work on one token: of the routed experts the chosen ones only.

    Embedding and head are counted in both, as in the published figures (Scout: 17 B active).
    """
    total = sum(tensor.size for tensor in tensors.values())
    routed = sum(tensor.size for name, tensor in tensors.items() if ROUTED.search(name))
    idle = config.num_local_experts - config.num_experts_per_tok
    return total, total - routed * idle // max(config.num_local_experts, 1)
