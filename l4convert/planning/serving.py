"""An artifact in use: what it holds and how fast it can be at most, on the hardware that was named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from l4convert.checkpoint.config import DecoderConfig
from l4convert.emit.memory import available_bytes
from l4convert.frontend.compute import ComputeType
from l4convert.planning.caches import Caches, cache_choices
from l4convert.planning.figures import Figure, total
from l4convert.planning.fit import Deployment
from l4convert.planning.shards import Weights, check_degree, degrees, weights_of
from l4convert.planning.speed import (
    Layout,
    Rates,
    compute_time,
    decode_bound,
    decode_bytes,
    multiplied_elements,
    step_flops,
    visible_keys,
)
from l4convert.planning.tensors import TensorPlan
from l4convert.quantization.recipe import Recipe
from l4convert.targets.hardware import Hardware

# compute type -> names of its rate in a profile, the first that is there; the 16-bit types have one rate.
_RATE_NAMES: Mapping[str, tuple[str, ...]] = {
    "bfloat16": ("bf16",),
    "float16": ("fp16", "bf16"),
    "float32": ("fp32",),
}


@dataclass(frozen=True)
class Wanted:
    """What was asked for.

    Attributes:
        context: Tokens; None: the largest context is looked for.
        batch: Sequences at once.
        tensor_parallel: Degree; None: the least that fits.
        hardware: None where only a conversion target was named.
    """

    context: int | None
    batch: int
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
    """What is planned with: a model, lowered and quantized."""

    config: DecoderConfig
    table: tuple[TensorPlan, ...]
    recipe: Recipe
    target: str
    form: str
    compute: ComputeType


def plan_serving(artifact: Artifact, wanted: Wanted) -> ServingPlan:
    """Plan it.

    Raises:
        UsageError: The degree of tensor parallelism does not divide the model.
    """
    return _Serving(artifact, wanted).plan()


class _Serving:
    def __init__(self, artifact: Artifact, wanted: Wanted) -> None:
        self.artifact, self.wanted, self.config = artifact, wanted, artifact.config
        self.weights: Weights = weights_of(artifact.table, artifact.config)
        self.on_host = wanted.hardware is None and artifact.target in ("cpu", "portable")
        self.memory = available_bytes() if self.on_host else None
        if wanted.hardware is not None:
            self.memory = wanted.hardware.memory_bytes or available_bytes()
            self.on_host = wanted.hardware.memory_bytes is None
        block = _block_size(artifact.recipe, self.config)
        if wanted.tensor_parallel is not None:
            check_degree(self.config, block, wanted.tensor_parallel)
            self.degrees: tuple[int, ...] = (wanted.tensor_parallel,)
        else:
            self.degrees = (1,) if self.on_host else degrees(self.config, block)
        self.rates = _rates(wanted.hardware, artifact.compute)
        self.elements = multiplied_elements(self.config, artifact.recipe)

    def plan(self) -> ServingPlan:
        hardware, wanted = self.wanted.hardware, self.wanted
        choices = cache_choices(self.config, self.artifact.form, self.artifact.compute, self.artifact.recipe.kv_cache)
        rows = tuple(self.row(caches) for caches in choices)
        name = None if self.memory is None else "this machine" if self.on_host or hardware is None else hardware.name
        summary = "memory that is free now" if self.on_host else "" if hardware is None else hardware.summary
        chosen = next(row for row in rows if row.chosen)
        sections = self.sections(chosen)
        return ServingPlan(
            machine=name,
            summary=summary,
            memory=self.memory,
            bandwidth=self.rates.bandwidth,
            batch=wanted.batch,
            context=wanted.context,
            rows=rows,
            sections=sections,
            notes=tuple(self.notes(rows)),
        )

    def deployment(self, memory: int) -> Deployment:
        artifact = self.artifact
        return Deployment(
            self.config,
            artifact.target,
            artifact.compute,
            self.weights,
            memory,
            self.wanted.batch,
            self.degrees,
            self.on_host,
        )

    def row(self, caches: Caches) -> CacheRow:
        scheme = self.artifact.recipe.kv_cache
        chosen = caches.dtype == (self.artifact.compute if scheme is None else scheme.dtype)
        context = self.wanted.context
        if self.memory is None:
            tokens = context or self.config.max_position_embeddings
            size = sum(caches.bytes(self.wanted.batch, tokens).values())
            return CacheRow(caches, chosen, {}, tokens, size, None, None, "", None, None, None)
        there = self.deployment(self.memory)
        largest = {n: there.largest_context(caches, Layout(n)) for n in self.degrees}
        if context is None:
            layout = next((Layout(n) for n, tokens in largest.items() if tokens), None)
            tokens = 0 if layout is None else largest[layout.tensor]
        else:
            layout, tokens = there.layout_for(caches, context), context
        fewest = None if context is None or self.on_host else there.fewest(caches, context)
        return CacheRow(
            caches=caches,
            chosen=chosen,
            largest=largest,
            context=tokens,
            cache_bytes=sum(caches.bytes(self.wanted.batch, tokens).values()),
            layout=layout,
            used=there.used(caches, tokens, layout or Layout(self.degrees[-1])),
            reason="" if context is None else there.reason(caches, tokens, layout),
            by_bytes=None if context is None else int(there.by_bytes(caches, context).value),
            fewest=fewest if fewest and layout and fewest.gpus < layout.gpus else None,
            decode=self.decode_rate(caches, tokens, layout),
        )

    def decode_rate(self, caches: Caches, context: int, layout: Layout | None) -> float | None:
        if layout is None or not context or self.rates.bandwidth is None:
            return None
        return self.decode(caches, context, layout)[-1].value

    def decode(self, caches: Caches, context: int, layout: Layout) -> list[Figure]:
        batch = self.wanted.batch
        parts = decode_bytes(self.config, self.weights, caches, self.artifact.target, batch, context, layout)
        last, _ = visible_keys(self.config, context)
        flops = step_flops(self.config, self.elements, batch, 1, last)
        return decode_bound(parts, self.rates, flops, batch, layout)

    def sections(self, row: CacheRow) -> dict[str, tuple[Figure, ...]]:
        """The arithmetic of one row."""
        caches, batch = row.caches, self.wanted.batch
        if self.memory is None or row.layout is None or not row.context:
            lines = caches.figures(batch, row.context)
            return {"caches": (*lines, total("caches", lines))}
        there, gpus = self.deployment(self.memory), row.layout
        budget = there.budget(caches, row.context, gpus)
        found = {"memory": (*budget, total("used on each GPU" if not self.on_host else "used", budget))}
        found["largest context"] = tuple(self.largest(row))
        if self.wanted.context is not None and not self.on_host:
            found["GPUs"] = tuple(self.gpus(there, row))
        found["decode"] = tuple(self.decode(caches, row.context, gpus))
        prefill = self.prefill(row.context, gpus)
        return found | ({"prefill": tuple(prefill)} if prefill else {})

    def largest(self, row: CacheRow) -> list[Figure]:
        assert self.memory is not None  # sections() asked
        there, caches = self.deployment(self.memory), row.caches
        figures = []
        for n, tokens in row.largest.items():
            used = there.used(caches, tokens, Layout(n))
            slope = caches.rank(n).bytes_per_token * caches.copies * self.wanted.batch
            rest = used - slope * tokens
            positions = self.config.max_position_embeddings
            limit = f", the model has {positions:,}" if tokens == positions else ""
            arithmetic = f"({self.memory:,} - {rest:,.0f} B of all else) / {slope:,} B a token{limit}"
            if not tokens:
                arithmetic = f"{used:,.0f} B without any token are more than {self.memory:,}"
            name = "largest context" if self.on_host else f"largest context, {n} GPU{'s' if n > 1 else ''}"
            figures.append(Figure(name, tokens, "tokens", arithmetic))
        return figures

    def gpus(self, there: Deployment, row: CacheRow) -> list[Figure]:
        assert row.layout is not None  # sections() asked
        figures = []
        for n in self.degrees:
            used = there.used(row.caches, row.context, Layout(n))
            verdict = "fits" if used <= there.memory else f"{used - there.memory:,.0f} B too much"
            name = f"each of {n} GPUs" if n > 1 else "one GPU"
            figures.append(Figure(name, used, "B", f"of {there.memory:,} B: {verdict}"))
        figures.append(there.by_bytes(row.caches, row.context))
        layout = row.layout
        arithmetic = f"{layout.tensor} by heads x {layout.context} by tokens: {row.reason}"
        return [*figures, Figure("GPUs", layout.gpus, "GPUs", arithmetic)]

    def prefill(self, context: int, layout: Layout) -> list[Figure]:
        _, visible = visible_keys(self.config, context)
        batch = self.wanted.batch
        flops = step_flops(self.config, self.elements, batch, context, visible)
        computing = compute_time(flops, self.rates, layout)
        if computing is None:
            return []
        tokens = batch * context
        arithmetic = f"{tokens:,} tokens / {computing.value:.6g} s"
        return [*flops, computing, Figure("prefill bound", tokens / computing.value, "tokens/s", arithmetic)]

    def notes(self, rows: tuple[CacheRow, ...]) -> list[str]:
        hardware, found = self.wanted.hardware, []
        if self.memory is None:
            found.append("the memory is not known: --target also takes a GPU, as h100, or a profile of your own")
        elif any(row.layout and row.layout.gpus > 1 for row in rows):
            found.append("several GPUs stand for a runtime that divides tensors; l4convert's own engines run on one")
        if self.memory is not None and self.rates.bandwidth is None:
            found.append("no bandwidth is known of this machine, so no bound of decoding")
        if self.memory is not None and self.rates.plain is None and self.rates.bandwidth is not None:
            found.append(
                f"the profile has no rate of {self.artifact.compute}, so bounds count bytes only, prefill has none"
            )
        if hardware is not None and hardware.unified_memory:
            found.append(
                "the memory is the CPU's, too: the system and its programs take a part that is not counted here"
            )
        if self.on_host and self.memory is not None:
            found.append("weights are mapped from the file; they are counted as if all were in memory")
        return found


def _rates(hardware: Hardware | None, compute: str) -> Rates:
    if hardware is None:
        return Rates(None, None, None)
    rates = hardware.peak_flops
    plain = next((rates[name] for name in _RATE_NAMES[compute] if name in rates), None)
    return Rates(hardware.bandwidth_bytes_per_second, plain, rates.get("fp8"))


def _block_size(recipe: Recipe, config: DecoderConfig) -> int | None:
    sizes = (r.scheme.block_size_for(config.intermediate_size) for r in recipe.rules if r.scheme.kind == "int4")
    return max(sizes, default=None)
