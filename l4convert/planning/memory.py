"""How much memory a conversion will take: what the process holds already, and the tiles on their way through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from l4convert.checkpoint.lazy import LazyTensor
from l4convert.emit.fill import Filling
from l4convert.emit.jobs import Job, group_jobs, largest_job, total_jobs
from l4convert.emit.memory import default_limit, resident_bytes, share_memory
from l4convert.emit.plan import PlannedTensor, WeightsPlan
from l4convert.errors import UsageError
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
    "what this process holds now (libraries, graph, plan) and, for each job that runs at once, the largest tile: its"
    " elements times the scheme's temporaries, and copies of the bytes written; and the pages of the source files that"
    " may be mapped at a time, which the system can take back"
)


@dataclass(frozen=True)
class MemoryPlan:
    """Expected peak memory of a conversion.

    Attributes:
        process: Bytes resident now, when the graph is built and every offset planned.
        tile: Bytes of the largest tile on its way from source to file.
        pages: Bytes of source files that are mapped at a time.
        jobs: How many tiles are on their way at once: those asked for, as far as the limit of memory lets them.
        tensor: The tensor that the largest tile belongs to.
        rows: How many of its rows are computed at a time.
    """

    process: int
    tile: int
    pages: int
    jobs: int
    tensor: str
    rows: int

    @property
    def peak(self) -> int:
        """Bytes of all of it together."""
        return self.process + self.jobs * self.tile + self.pages


def plan_memory(plan: WeightsPlan, recipe: Recipe, filling: Filling, source_bytes: int) -> MemoryPlan:
    """The expectation for writing this weights file from ``source_bytes`` of tensors.

    Raises:
        UsageError: The memory limit that was asked for is too small.
    """
    sizes = [(tile_bytes(group, recipe), group) for group in plan.groups]
    tile, group = max(sizes, key=lambda item: item[0], default=(0, ()))
    if not group:
        return MemoryPlan(resident_bytes(), 0, 0, 0, "", 0)
    jobs, pages = _at_once(plan, filling)
    rows = _rows(_first_job(group))
    return MemoryPlan(resident_bytes(), tile, min(pages, source_bytes), jobs, group[0].name, rows)


def tile_bytes(group: Sequence[PlannedTensor], recipe: Recipe) -> int:
    """Bytes held, beside the source's own, while a job of the group becomes bytes."""
    job = _first_job(group)
    batch, height = _height(group[0])
    share = 1.0 if job.pieces[0].whole else _rows(job) / (batch * height)
    elements = share * group_elements(group)
    kind = classify(group[0], recipe)[1].partition(" ")[0]
    return math.ceil(_COPIES * job.nbytes + _WORKING_BYTES[kind] * elements)


def _at_once(plan: WeightsPlan, filling: Filling) -> tuple[int, int]:
    """How many of the largest jobs will run together, and bytes for mapped pages.

    One job where this machine's default limit is too small even for that.
    """
    wanted = min(filling.threads, total_jobs(plan))
    largest = largest_job(plan)
    try:
        share = share_memory(filling.memory_limit or default_limit(), largest)
    except UsageError:
        if filling.memory_limit is not None:
            raise
        return 1, 0
    return min(wanted, max(1, share.jobs // largest)), share.pages


def _first_job(group: Sequence[PlannedTensor]) -> Job:
    return next(group_jobs(group, 0))


def _rows(job: Job) -> int:
    piece = job.pieces[0]
    return _height(piece.planned)[1] if piece.whole else piece.stop - piece.start


def _height(planned: PlannedTensor) -> tuple[int, int]:
    """Matrices, and rows of each."""
    batch, rows = planned.tensor.matrix[:2] if isinstance(planned.tensor, LazyTensor) else (1, 1)
    return max(1, batch), max(1, rows)
