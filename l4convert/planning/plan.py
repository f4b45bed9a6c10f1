"""Everything that is known of a conversion before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from l4convert.checkpoint.adapters import AppliedAdapter
from l4convert.checkpoint.traffic import Traffic
from l4convert.emit.plan import WEIGHTS_FILE
from l4convert.graph_passes import PassReport
from l4convert.planning.disk import DiskPlan
from l4convert.planning.estimate import TimePlan
from l4convert.planning.memory import MemoryPlan
from l4convert.planning.sharing import SharingPlan
from l4convert.planning.tensors import KINDS, TensorPlan
from l4convert.planning.use import ServingPlan


@dataclass(frozen=True)
class ConversionPlan:
    """What would be written, and what that takes.

    Attributes:
        source: The checkpoint's folder or address, or ``preset`` and its name.
        parameters, active_parameters: Of the checkpoint: all of them, and those that work on one token.
        source_bytes: Bytes of the checkpoint's tensors.
        output: The folder to be made, where one was named.
        passes: One report for each pass that ran.
        table: Every weight of the artifact.
        files: File name to bytes, of all files but the manifest, which holds digests of the others.
        sharing: What stays in files of the checkpoint, where that was asked for; those are not among ``files``.
        adapters: What would be merged into the checkpoint's weights.
        time: None where it was not measured.
        serving: The artifact in use, where hardware or a context was named.
        traffic: What came over the network for the plan, where the checkpoint is on the hub.
    """

    source: str
    parameters: int
    active_parameters: int
    source_bytes: int
    output: Path | None
    target: str
    recipe: str
    kv_cache: str
    compute: str
    passes: tuple[PassReport, ...]
    table: tuple[TensorPlan, ...]
    files: Mapping[str, int]
    sharing: SharingPlan | None
    disk: DiskPlan
    memory: MemoryPlan
    time: TimePlan | None
    serving: ServingPlan | None = None
    adapters: tuple[AppliedAdapter, ...] = ()
    traffic: Traffic | None = None

    @cached_property
    def bytes(self) -> int:
        """Of the tensors in the weights file."""
        return sum(row.bytes for row in self.table if row.file == WEIGHTS_FILE)

    @cached_property
    def tensors(self) -> int:
        """How many there are in the weights file."""
        return sum(1 for row in self.table if row.file == WEIGHTS_FILE)

    @cached_property
    def kinds(self) -> dict[str, tuple[int, int]]:
        """Kind to number of tensors and their bytes, the kinds that occur, in the order of ``KINDS``."""
        rows = {kind: [row.bytes for row in self.table if row.kind == kind] for kind in KINDS}
        return {kind: (len(sizes), sum(sizes)) for kind, sizes in rows.items() if sizes}
