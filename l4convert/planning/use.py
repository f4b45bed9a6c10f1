"""What is asked about an artifact in use, and what a plan answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from l4convert.checkpoint.config import DecoderConfig
from l4convert.frontend.compute import ComputeType
from l4convert.planning.caches import Caches
from l4convert.planning.figures import Figure
from l4convert.planning.speed import Layout
from l4convert.planning.tensors import TensorPlan
from l4convert.quantization.kv import KvDtype
from l4convert.quantization.recipe import Recipe
from l4convert.targets.hardware import Hardware


@dataclass(frozen=True)
class Wanted:
    """What was asked for.

    Attributes:
        context: Tokens; None: the largest context is looked for.
        batch: Sequences at once.
        prefill_tokens: Most new tokens of a call.
        tensor_parallel: Degree; None: the least that fits.
        hardware: None where only a conversion target was named.
    """

    context: int | None
    batch: int
    prefill_tokens: int
    tensor_parallel: int | None
    hardware: Hardware | None


@dataclass(frozen=True)
class CacheRow:
    """One type that the caches can have.

    Attributes:
        chosen: Whether the recipe stores them so.
        largest: Degree of tensor parallelism -> largest context; empty where the memory is not known.
        context: What the other fields are for: the context asked for, or the largest on the fewest GPUs.
        cache_bytes: Of all sequences, on all GPUs together, held once.
        layout: GPUs; None: it fits on no number of them, or the memory is not known.
        used: Bytes on each GPU.
        reason: Why so many.
        by_bytes: GPUs if bytes could be cut anywhere.
        fewest: Fewer GPUs than ``layout``'s, where splitting tokens earlier gives that.
        decode: Tokens a second of the whole batch, at most.
    """

    caches: Caches
    chosen: bool
    largest: Mapping[int, int]
    context: int
    cache_bytes: int
    layout: Layout | None
    used: float | None
    reason: str
    by_bytes: int | None
    fewest: Layout | None
    decode: float | None


@dataclass(frozen=True)
class ServingPlan:
    """Memory and speed of an artifact in use.

    Attributes:
        machine: Name of the hardware profile; ``this machine`` for targets of the CPU; None: memory is not known.
        memory: Bytes of one GPU, or of the machine.
        context: As asked for.
        sections: Title to figures, for the chosen type of caches; the last figure of a section is its result.
        notes: What the numbers leave out here.
    """

    machine: str | None
    summary: str
    memory: int | None
    bandwidth: int | None
    batch: int
    prefill_tokens: int
    context: int | None
    rows: tuple[CacheRow, ...]
    sections: Mapping[str, tuple[Figure, ...]]
    notes: tuple[str, ...]

    @property
    def chosen(self) -> CacheRow:
        """The row of the recipe."""
        return next(row for row in self.rows if row.chosen)

    def result(self, section: str) -> Figure | None:
        """The last figure of a section."""
        return self.sections[section][-1] if section in self.sections else None


@dataclass(frozen=True)
class Artifact:
    """What is planned with: a model, lowered and quantized; ``kv_dtypes``: formats of caches that its target takes."""

    config: DecoderConfig
    table: tuple[TensorPlan, ...]
    recipe: Recipe
    target: str
    form: str
    compute: ComputeType
    kv_dtypes: tuple[KvDtype, ...]
