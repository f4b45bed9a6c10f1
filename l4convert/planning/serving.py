"""An artifact in use: what it holds and how fast it can be at most, on the hardware that was named."""

from __future__ import annotations

from collections.abc import Mapping

from l4convert.checkpoint.config import DecoderConfig
from l4convert.emit.memory import available_bytes
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
from l4convert.planning.use import Artifact, CacheRow, ServingPlan, Wanted
from l4convert.quantization.recipe import Recipe
from l4convert.targets.hardware import Hardware

# compute type -> names of its rate in a profile, the first that is there; the 16-bit types have one rate.
_RATE_NAMES: Mapping[str, tuple[str, ...]] = {
    "bfloat16": ("bf16",),
    "float16": ("fp16", "bf16"),
    "float32": ("fp32",),
}


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
            prefill_tokens=wanted.prefill_tokens,
            context=wanted.context,
            rows=rows,
            sections=sections,
            notes=tuple(self.notes(rows, sections)),
        )

    def deployment(self, memory: int) -> Deployment:
        artifact, wanted = self.artifact, self.wanted
        return Deployment(
            config=self.config,
            target=artifact.target,
            compute=artifact.compute,
            weights=self.weights,
            memory=memory,
            batch=wanted.batch,
            degrees=self.degrees,
            prefill_tokens=wanted.prefill_tokens,
            host=self.on_host,
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
            by_bytes=None if context is None else int(there.by_bytes(caches, context).value) or None,
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
        found = {} if self.wanted.hardware is None else {"hardware": tuple(_hardware_figures(self.wanted.hardware))}
        found |= {"memory": (*budget, total("used on each GPU" if not self.on_host else "used", budget))}
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
            limit = f"; the model has {positions:,}" if tokens == positions else ""
            arithmetic = f"({self.memory:,} - {rest:,.0f} B of all else) / {slope:,} B a token{limit}"
            if not tokens:
                arithmetic = f"0; {used:,.0f} B without any token are more than {self.memory:,}"
            name = "largest context" if self.on_host else f"largest context, {n} GPU{'s' if n > 1 else ''}"
            figures.append(Figure(name, tokens, "tokens", arithmetic))
        return figures

    def gpus(self, there: Deployment, row: CacheRow) -> list[Figure]:
        assert row.layout is not None  # sections() asked
        figures = []
        for n in self.degrees:
            used = there.used(row.caches, row.context, Layout(n))
            verdict = "it fits" if used <= there.memory else f"{used - there.memory:,.0f} B too much"
            name = f"each of {n} GPUs" if n > 1 else "one GPU"
            figures.append(Figure(name, used, "B", f"{used:,.0f}: {verdict}"))
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

    def notes(self, rows: tuple[CacheRow, ...], sections: Mapping[str, tuple[Figure, ...]]) -> list[str]:
        hardware, found = self.wanted.hardware, []
        missing = sorted({row.caches.dtype for row in rows if row.caches.scaled_layers} - set(self.artifact.kv_dtypes))
        if missing:
            found.append(f"target {self.artifact.target} takes no caches in {', '.join(missing)}: for comparison only")
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
        masks = sum(figure.value for figure in sections.get("memory", ()) if figure.name == "masks")
        if self.memory is not None and masks > self.memory / 10:
            found.append(
                "masks grow with the new tokens of a call: --prefill-tokens, of plan and of build, lowers both"
            )
        if self.on_host and self.memory is not None:
            found.append("copies of quantized weights that ONNX Runtime repacks for its kernels are not counted")
        return found


def _hardware_figures(hardware: Hardware) -> list[Figure]:
    """What the profile says, with its own sources."""
    values = {
        "memory_bytes": ("memory", hardware.memory_bytes, "B", "as sold, which the GPU's own count may exceed"),
        "bandwidth_bytes_per_second": ("bandwidth", hardware.bandwidth_bytes_per_second, "B/s", "at its peak"),
    }
    known = [(key, *row) for key, row in values.items() if row[1] is not None]
    known += [("peak_flops", f"rate in {name}", rate, "FLOP/s", "dense") for name, rate in hardware.peak_flops.items()]
    sources = hardware.sources
    return [
        Figure(name, value or 0, unit, f"{value:,}: {how}", sources.get(key, ""))
        for key, name, value, unit, how in known
    ]


def _rates(hardware: Hardware | None, compute: str) -> Rates:
    if hardware is None:
        return Rates(None, None, None)
    rates = hardware.peak_flops
    plain = next((rates[name] for name in _RATE_NAMES[compute] if name in rates), None)
    return Rates(hardware.bandwidth_bytes_per_second, plain, rates.get("fp8"))


def _block_size(recipe: Recipe, config: DecoderConfig) -> int | None:
    sizes = (r.scheme.block_size_for(config.intermediate_size) for r in recipe.rules if r.scheme.kind == "int4")
    return max(sizes, default=None)
