"""Memory that building takes, and a refusal where the machine has less."""

from __future__ import annotations

from l4convert.emit.memory import available_bytes, parse_size
from l4convert.engine.network import GraphFacts
from l4convert.errors import InputError
from l4convert.progress import format_amount

# Peak of anonymous memory while TensorRT-RTX 1.7.1.116 builds, *measured* on MatMuls of 8192x8192 weights (two
# profiles, SM 8.9): 0.14 and 0.55 GB of INT4: 0.3 GB and twice the weights; 0.67 GB of BF16 and 0.60 GB of FP8: 0.3 GB
# and once the weights; and on a layer of Scout, 1.1 GB of it experts in packed words: 2.7 GB, twice the weights. The
# weights file itself is mapped: its pages can be evicted, so they count for nothing here. A tenth is added to each.
_PACKED_FACTOR = 2.2
_OTHER_FACTOR = 1.1
_FIXED_BYTES = 600 << 20


def build_bytes(facts: GraphFacts) -> int:
    """Estimated peak of the memory that building one engine takes."""
    other = facts.weights_bytes - facts.packed_bytes
    return int(_FIXED_BYTES + _PACKED_FACTOR * facts.packed_bytes + _OTHER_FACTOR * other)


def require_memory(needed: int, engine: str, limit: str | None, layers: int) -> None:
    """Refuse a build that would run out of memory.

    Args:
        needed: Bytes, from :func:`build_bytes`.
        engine: How a message names it.
        limit: The user's limit, as "20G"; counts instead of what is free on the machine.
        layers: Of the engine; with more than one, cutting it helps.

    Raises:
        InputError: Less is available.
        UsageError: ``limit`` is no amount of memory.
    """
    available = parse_size(limit) if limit is not None else available_bytes()
    if available is not None and needed > available:
        have = "--memory-limit allows" if limit is not None else "the machine has"
        amounts = [format_amount(amount, "B") for amount in (needed, available)]
        hint = "cut the model with --layers-per-engine" if layers > 1 else "build on a machine with more memory"
        raise InputError(f"{engine}: building needs about {amounts[0]} of memory, {have} {amounts[1]}", hint)
