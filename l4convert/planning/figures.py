"""A number beside the arithmetic that gave it, so that every line of a plan can be checked by hand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One number of a plan.

    Attributes:
        name: What it is.
        value: In ``unit``.
        unit: ``B``, ``tokens``, ``GPUs``, ``tokens/s``, ``FLOP``, ``s`` ...
        arithmetic: The formula with its numbers put in. Words name what stands before them; after ``;`` or ``:`` it is
            explained.
        source: Where its constants come from; empty where they are the lines above it or the model's configuration.
    """

    name: str
    value: float
    unit: str
    arithmetic: str
    source: str = ""


def total(name: str, parts: tuple[Figure, ...] | list[Figure], unit: str = "B") -> Figure:
    """The sum of figures of one unit, written out."""
    values = " + ".join(f"{part.value:,.0f}" for part in parts)
    return Figure(name, sum(part.value for part in parts), unit, values or "0")
