"""Upper bounds of speed: bytes over bandwidth for decoding, arithmetic over the peak rate for prompts.

Both leave out what a real run has on top: kernels that do not reach the peak, launches, and everything that GPUs send
to each other. So they are bounds, and no run is faster.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from l4convert.checkpoint.config import DecoderConfig
from l4convert.checkpoint.names import expected_tensors
from l4convert.checkpoint.parameters import ROUTED
from l4convert.graph_passes.lower_attention_to_tensor_scatter import SMALL_CACHE
from l4convert.planning.caches import Caches
from l4convert.planning.figures import Figure, total
from l4convert.planning.shards import Weights
from l4convert.quantization.recipe import Recipe


@dataclass(frozen=True)
class Rates:
    """What a GPU can do at most; None where it is not known.

    Attributes:
        bandwidth: Bytes a second.
        plain, fp8: Multiplications and additions a second in the compute type, and of FP8 products.
    """

    bandwidth: int | None
    plain: int | None
    fp8: int | None


@dataclass(frozen=True)
class Layout:
    """How the work lies on GPUs: ``tensor`` x ``context`` of them, the second splitting tokens of global layers."""

    tensor: int
    context: int = 1

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.tensor * self.context


def multiplied_elements(config: DecoderConfig, recipe: Recipe) -> dict[str, int]:
    """Weights that one token is multiplied with, by "fp8" or "plain": chosen experts only, no embedding, no norms."""
    elements: Counter[str] = Counter()
    for name, shape in expected_tensors(config, "stacked").items():
        if len(shape) < 2 or (name.startswith("model.embed_tokens") and not config.tie_word_embeddings):
            continue
        used = math.prod(shape)
        if ROUTED.search(name):
            used = used * config.num_experts_per_tok // config.num_local_experts
        elements["fp8" if recipe.scheme_for(name).kind == "fp8" else "plain"] += used
    return dict(elements)


def distinct_experts(experts: int, chosen: int, tokens: int) -> float:
    """Expected number of experts that a batch of tokens uses, E (1 - (1 - k/E)^B), if they choose independently."""
    return experts * (1 - (1 - chosen / experts) ** tokens) if experts else 0.0


def decode_bytes(
    config: DecoderConfig, weights: Weights, caches: Caches, target: str, batch: int, context: int, layout: Layout
) -> list[Figure]:
    """Bytes that one decode step of ``batch`` sequences of ``context`` tokens moves on one GPU."""
    n, own = layout.tensor, caches.rank(layout.tensor)
    other = weights.rank(n, "other")
    figures = [
        Figure("weights that every token uses", other, "B", f"{other:,.0f}: all but routed experts and embedding")
    ]
    experts = config.num_local_experts
    if weights.rank(n, "experts"):
        used = distinct_experts(experts, config.num_experts_per_tok, batch)
        value = weights.rank(n, "experts") * used / experts
        arithmetic = (
            f"{weights.rank(n, 'experts'):,.0f} B x (1 - (1 - {config.num_experts_per_tok} / {experts})^{batch});"
            f" {used:.3g} of {experts} experts are expected to be used"
        )
        figures.append(Figure("weights of experts", value, "B", arithmetic))
        if target == "tensorrt-rtx":
            moe = sum(layer.moe for layer in config.layers)
            size = 3 * config.hidden_size * (config.intermediate_size // n) * 2
            arithmetic = f"2 (written, read) x {moe} layers x {used:.3g} experts x {size:,} B; in 16 bits"
            figures.append(Figure("dequantized experts", 2 * moe * used * size, "B", arithmetic, "ADR 0014"))
    return [*figures, *_cache_reads(own, target, batch, context, layout)]


def _cache_reads(caches: Caches, target: str, batch: int, context: int, layout: Layout) -> list[Figure]:
    whole = target == "tensorrt-rtx"
    tokens = -(-context // layout.context)
    seen = _visible(caches.chunk, context)
    near = float(min(context, caches.chunk)) if whole else seen
    size = {kind: caches.slot_bytes(kind) for kind in (False, True)}
    split = f"; {context:,} shared by {layout.context} groups" if layout.context > 1 else ""
    figures = [
        Figure(
            "global layers' caches",
            batch * caches.global_layers * size[False] * tokens,
            "B",
            f"{batch} x {caches.global_layers} layers x {size[False]:,} B x {tokens:,} tokens{split}",
        ),
        Figure(
            "chunked layers' caches",
            batch * caches.chunked_layers * size[True] * near,
            "B",
            f"{batch} x {caches.chunked_layers} layers x {size[True]:,} B x {near:,.1f} tokens"
            + ("; read whole, ADR 0014" if whole else "; a chunk's mean, (C + 1) / 2" if near < context else ""),
        ),
    ]
    if whole and tokens > SMALL_CACHE:
        copy = 2 * caches.heads * caches.width * 2
        arithmetic = f"2 (written, read) x {batch} x {caches.global_layers} layers x {copy:,} B x {tokens:,} tokens"
        value = 2 * batch * caches.global_layers * copy * tokens
        figures.append(Figure("copies of large caches", value, "B", arithmetic, "ADR 0014"))
    if caches.copies > 1:
        moved = sum(caches.bytes(batch, context).values())
        arithmetic = f"2 (read, written) x {moved:,} B; present is a copy of past and the new token"
        figures.append(Figure("caches copied", 2 * moved, "B", arithmetic))
    return figures


def decode_bound(parts: list[Figure], rates: Rates, flops: list[Figure], batch: int, layout: Layout) -> list[Figure]:
    """Tokens a second of a whole batch, at most: none of it where the bandwidth is not known."""
    step = total("bytes of a step on each GPU", parts)
    if rates.bandwidth is None:
        return [*parts, step]
    seconds = step.value / rates.bandwidth
    reading = Figure("reading", seconds, "s", f"{step.value:,.0f} B / {rates.bandwidth:,} B/s")
    lines = [*parts, step, reading]
    computing = compute_time(flops, rates, layout)
    if computing is not None:
        lines += [*flops, computing]
        seconds = max(seconds, computing.value)
    lines.append(
        Figure("decode bound", batch / seconds, "tokens/s", f"{batch} / {seconds:.6g} s; the longer of the two")
    )
    return lines


def step_flops(
    config: DecoderConfig, elements: Mapping[str, int], batch: int, new: int, visible: float
) -> list[Figure]:
    """Multiplications and additions of ``new`` tokens of each sequence.

    Args:
        config: The model.
        elements: From :func:`multiplied_elements`.
        batch: Sequences.
        new: Tokens.
        visible: Keys that all of the new tokens of a sequence see, over all layers.
    """
    names = {"plain": "products in the compute type", "fp8": "products in FP8"}
    figures = [
        Figure(names[kind], 2 * n * batch * new, "FLOP", f"2 x {n:,} weights x {batch} x {new:,} tokens")
        for kind, n in sorted(elements.items(), reverse=True)
    ]
    heads, width = config.num_attention_heads, config.head_dim
    arithmetic = f"4 (scores, values) x {heads} heads x {width} x {batch} x {visible:,.0f} keys seen; in all layers"
    return [*figures, Figure("attention", 4 * heads * width * batch * visible, "FLOP", arithmetic)]


def visible_keys(config: DecoderConfig, context: int) -> tuple[float, int]:
    """Keys over all layers: seen by the token at the end of a context (mean of a chunk), and by all tokens of it."""
    chunked = sum(layer.chunked for layer in config.layers)
    other, size = config.num_hidden_layers - chunked, config.attention_chunk_size
    full, rest = divmod(context, size)
    near = full * (size * (size + 1) // 2) + rest * (rest + 1) // 2
    last = other * context + chunked * _visible(size, context)
    return last, other * (context * (context + 1) // 2) + chunked * near


def compute_time(flops: list[Figure], rates: Rates, layout: Layout) -> Figure | None:
    """Seconds at the peak rates; None where one that is needed is not known."""
    seconds, parts = 0.0, []
    for figure in flops:
        rate = rates.fp8 or rates.plain if figure.name == "products in FP8" else rates.plain
        if rate is None:
            return None
        seconds += figure.value / rate / layout.gpus
        parts.append(f"{figure.value:.4g} / {rate:.4g}")
    arithmetic = f"({' + '.join(parts)}) / {layout.gpus} GPUs; FLOP over FLOP/s"
    return Figure("computing", seconds, "s", arithmetic, "peak rates of the profile")


def _visible(chunk: int, context: int) -> float:
    """Keys that a token at the end of a context sees in a chunked layer: (C + 1) / 2 in the mean over a chunk."""
    return float(context) if context <= chunk else (chunk + 1) / 2
