"""How much memory a conversion will take: what the process holds already, and the largest tile on its way through."""

from __future__ import annotations

import math
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from l4convert.checkpoint.lazy import TILE_ELEMENTS, LazyTensor
from l4convert.emit.plan import PlannedTensor, WeightsPlan, group_rows
from l4convert.planning.tensors import classify, group_elements
from l4convert.quantization import native
from l4convert.quantization.recipe import Recipe

# Bytes of temporaries for an element of the checkpoint while its tile is quantized: a copy of the weight in order,
# results that are kept for the scales, and float32 copies where NumPy does it. tests/planning/test_memory.py holds
# them, and the number of copies of what is written (in order, and as bytes), to what tracemalloc counts.
_WORKING_BYTES = {"none": 0, "int4": 6, "fp8": 1 if native.AVAILABLE else 9}
_COPIES = 2
#: In words, for people who read a plan.
METHOD = (
    "what this process holds now (libraries, graph, plan) and the largest tile: its elements times the scheme's"
    " temporaries, and copies of the bytes written; mapped pages of the source files, which the system can take back"
    " at any time, are not counted"
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


def plan_memory(plan: WeightsPlan, recipe: Recipe) -> MemoryPlan:
    """The expectation for writing this weights file."""
    sizes = [(tile_bytes(group, recipe), group) for group in plan.groups]
    tile, group = max(sizes, key=lambda item: item[0], default=(0, ()))
    if not group:
        return MemoryPlan(_resident(), 0, "", 0)
    return MemoryPlan(_resident(), tile, group[0].name, min(group_rows(group), _height(group[0])))


def tile_bytes(group: Sequence[PlannedTensor], recipe: Recipe) -> int:
    """Bytes held, beside the source's own, while the rows of a group that are computed at a time become bytes."""
    rows = group_rows(group)
    written, share = 0.0, 0.0
    for planned in group:
        batch = planned.tensor.matrix[0] if isinstance(planned.tensor, LazyTensor) else 1
        part = min(1.0, rows / _height(planned)) / max(1, batch)
        written += part * planned.nbytes
        share = max(share, part)
    elements = min(share * group_elements(group), TILE_ELEMENTS)
    kind = classify(group[0], recipe)[1].partition(" ")[0]
    return math.ceil(_COPIES * written + _WORKING_BYTES[kind] * elements)


def _height(planned: PlannedTensor) -> int:
    return max(1, planned.tensor.matrix[1]) if isinstance(planned.tensor, LazyTensor) else 1


def _resident() -> int:
    """Bytes of memory that this process holds; its highest so far where the system only tells that."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
