"""The cases of `make gpu`'s check, so small that Triton's interpreter takes about a second for one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.benchmarks.scripts import load

cases = load("gpu_cases")

SCALE = cases.Scale(
    tokens=(3, 20), experts=(4,), widths=(128,), head_dim=16, key_heads=(1, 2), chunks=(32,), lengths=70, new=45
)
GROUPS = {group.name: group for group in cases.groups(SCALE)}


def some(name: str, *numbers: int) -> Any:
    """A group with some of its cases."""
    group = GROUPS[name]
    return replace(group, cases=tuple(group.cases[number] for number in numbers))
