"""How much memory a conversion will take: what the process holds already, and the largest tile on its way through."""

from __future__ import annotations

import math
import os
import resource
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from l4convert.checkpoint.lazy import LazyTensor
from l4convert.emit.plan import PlannedTensor, WeightsPlan, group_rows
from l4convert.planning.tensors import recipe_steps

# Temporaries that a step makes beside its result, bytes per element of the tile, by the dtype it makes: a copy of the
# weight in order, the test for NaN, results kept for the scales (INT4); float32 copies and magnitudes (FP8); nibbles
# before they are packed. Held to tracemalloc's peak by tests/planning/test_memory.py.
_WORKING_BYTES = {ir.DataType.INT4: 8.0, ir.DataType.FLOAT8E4M3FN: 9.0, ir.DataType.UINT8: 4.0}
#: In words, for people who read a plan.
METHOD = (
    "memory of this process now (libraries, graph, plan) + the largest group of tensors that are filled in step: every"
    " step of their recipes holds its result for the rows computed at a time, and its temporaries; source files are"
    " mapped, and their pages, which the system takes back when it needs them, are not counted"
)


@dataclass(frozen=True)
class MemoryPlan:
    """Expected peak memory of a conversion.

    Attributes:
        process: Bytes resident now, when the graph is built and every offset planned.
        tile: Bytes of the largest tile on its way from source to file.
        tensor: The tensor that tile belongs to.
        rows: How many of its rows are computed at a time.
    """

    process: int
    tile: int
    tensor: str
    rows: int

    @property
    def peak(self) -> int:
        """Bytes of both together."""
        return self.process + self.tile


def plan_memory(plan: WeightsPlan) -> MemoryPlan:
    """The expectation for writing this weights file."""
    sizes = [(tile_bytes(group), group) for group in plan.groups]
    tile, group = max(sizes, key=lambda item: item[0], default=(0, ()))
    name = group[0].name if group else ""
    return MemoryPlan(_resident(), tile, name, group_rows(group) if group else 0)


def tile_bytes(group: tuple[PlannedTensor, ...]) -> int:
    """Bytes that the steps of a group's recipes hold for the rows that are computed at a time.

    All steps of a recipe pass on the same part of a tensor, so each holds that share of its own elements.
    """
    rows = group_rows(group)
    held: dict[Hashable, float] = {}
    for planned in group:
        tensor = planned.tensor
        if not isinstance(tensor, LazyTensor):
            held[id(tensor)] = float(planned.nbytes)
            continue
        batch, height, _ = tensor.matrix
        share = min(rows, height) / max(1, batch * height)
        for step in recipe_steps(tensor):
            held[id(step)] = max(held.get(id(step), 0.0), share * step.size * _bytes_per_element(step))
        held[id(planned)] = share * planned.nbytes  # the bytes handed to the file
    return math.ceil(sum(held.values()))


def _bytes_per_element(step: LazyTensor) -> float:
    return math.ceil(step.dtype.itemsize) + _WORKING_BYTES.get(step.dtype, 0.0)


def _resident() -> int:
    """Bytes of memory that this process holds; its highest so far where the system only tells that."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
