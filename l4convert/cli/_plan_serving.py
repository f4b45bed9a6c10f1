"""How the use of an artifact is shown: what fits, how fast it can be, and every number with its arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Any

from l4convert.cli._render import fields, size, table
from l4convert.planning.figures import Figure
from l4convert.planning.speed import Layout
from l4convert.planning.tokens import short_tokens
from l4convert.planning.use import CacheRow, ServingPlan


def serving_payload(plan: ServingPlan) -> dict[str, Any]:
    """JSON fields; docs/guides/planning.md describes them."""
    return {
        "machine": plan.machine,
        "memory_bytes": plan.memory,
        "bandwidth_bytes_per_second": plan.bandwidth,
        "batch": plan.batch,
        "prefill_tokens": plan.prefill_tokens,
        "context": plan.context,
        "caches": [_row_payload(row) for row in plan.rows],
        "arithmetic": {title: [dataclasses.asdict(f) for f in lines] for title, lines in plan.sections.items()},
        "notes": list(plan.notes),
    }


def _row_payload(row: CacheRow) -> dict[str, Any]:
    return {
        "dtype": row.caches.dtype,
        "chosen": row.chosen,
        "bytes_per_token": row.caches.bytes_per_token,
        "largest_context": {str(degree): tokens for degree, tokens in row.largest.items()},
        "context": row.context,
        "cache_bytes": row.cache_bytes,
        "gpus": _gpus_payload(row.layout),
        "used_bytes": None if row.used is None else round(row.used),
        "reason": row.reason or None,
        "gpus_by_bytes": row.by_bytes,
        "fewest": _gpus_payload(row.fewest),
        "decode_tokens_per_second": None if row.decode is None else round(row.decode, 2),
    }


def _gpus_payload(layout: Layout | None) -> dict[str, int] | None:
    return None if layout is None else {"gpus": layout.gpus, "by_heads": layout.tensor, "by_tokens": layout.context}


def serving_text(plan: ServingPlan, explain: bool) -> str:
    """Tables for people; ``explain`` adds every number's arithmetic."""
    parts = [_heading(plan)]
    if plan.memory is not None:
        parts.append(_largest_table(plan))
    if plan.context is not None or plan.memory is None:
        parts.append(_context_table(plan))
    reasons = [f"{row.caches.dtype}: {_reason(row)}" for row in plan.rows if row.reason and not _one_machine(plan)]
    parts.append("\n".join(reasons)) if reasons else None
    if "memory" in plan.sections:
        parts.append(_budget_table(plan))
    if plan.notes:
        parts.append("\n".join(f"note: {note}" for note in plan.notes))
    if explain:
        parts.append(_explanation(plan))
    return "\n\n".join(parts)


def _heading(plan: ServingPlan) -> str:
    speed = "" if plan.bandwidth is None else f", {size(plan.bandwidth)}/s"
    memory = "" if plan.memory is None else f": {size(plan.memory)}{speed}"
    summary = f" ({plan.summary})" if plan.summary else ""
    rows: list[tuple[str, object]] = [
        ("in use on", f"{plan.machine or '(no hardware named)'}{memory}{summary}"),
        ("batch", plan.batch),
    ]
    if plan.context is not None:
        rows.append(("context", f"{short_tokens(plan.context)} = {plan.context:,} tokens"))
    return fields(rows)


def _largest_table(plan: ServingPlan) -> str:
    """Largest contexts by type of caches and degree, and the speed where no context was asked for."""
    degrees = list(plan.rows[0].largest)
    one = _one_machine(plan)
    titles = ["largest context" if one else f"on {n} GPU{'s' if n > 1 else ''}" for n in degrees]
    headers = ["caches", "a token", "chunked layers", *titles]
    rows = []
    for row in plan.rows:
        chunked = row.caches.bytes(plan.batch, row.caches.chunk)["chunked"]
        fixed = "as global" if row.caches.form == "growing" else size(chunked)
        largest = [f"{tokens:,}" if tokens else "none" for tokens in row.largest.values()]
        rows.append([_name(row, plan), f"{row.caches.bytes_per_token:,} B", fixed, *largest])
    if plan.context is None and any(row.decode for row in plan.rows):
        headers.append("decode at most there")
        for cells, row in zip(rows, plan.rows, strict=True):
            cells.append(_rate(row.decode))
    caption = "" if one else "largest context in tokens, by GPUs that share the heads:\n"
    return caption + table(headers, rows, right=range(1, len(headers)))


def _context_table(plan: ServingPlan) -> str:
    one = _one_machine(plan)
    headers = ["caches", "all caches"]
    if plan.memory is not None:
        headers += ["fits", "needs"] if one else ["GPUs", "each holds"]
    rated = any(row.decode for row in plan.rows)
    headers += ["decode at most"] if rated else []
    rows = []
    for row in plan.rows:
        cells = [_name(row, plan), size(row.cache_bytes)]
        if plan.memory is not None:
            layout = row.layout
            count = "none" if layout is None else str(layout.gpus)
            used = size(row.used or 0)
            cells += [("no" if layout is None else "yes") if one else count, used]
        rows.append([*cells, _rate(row.decode)] if rated else cells)
    tokens = plan.rows[0].context
    return f"{tokens:,} tokens a sequence:\n" + table(headers, rows, right=range(1, len(headers)))


def _budget_table(plan: ServingPlan) -> str:
    lines = plan.sections["memory"]
    row = plan.chosen
    layout = row.layout
    gpus = 1 if layout is None else layout.gpus
    where = "this machine" if _one_machine(plan) else "one GPU" if gpus == 1 else f"each of {gpus} GPUs"
    rows = [(line.name, size(line.value)) for line in lines]
    rows += [("free", size((plan.memory or 0) - lines[-1].value))]
    prefill = plan.result("prefill")
    more = ""
    if prefill is not None and prefill.value:
        seconds = plan.batch * row.context / prefill.value
        more = f"\nprompt of {row.context:,} tokens: {seconds:,.1f} s at least ({prefill.value:,.0f} tokens/s)"
    return f"{where}, {row.caches.dtype} caches, {row.context:,} tokens:\n{table(['', 'size'], rows, right=[1])}{more}"


def _explanation(plan: ServingPlan) -> str:
    caches = plan.chosen.caches.dtype
    return "\n\n".join(
        f"{title}{'' if title == 'hardware' else f' ({caches} caches)'}\n" + "\n".join(map(_line, lines))
        for title, lines in plan.sections.items()
    )


def _line(figure: Figure) -> str:
    value = (
        f"{figure.value:,.0f}" if figure.value >= 1000 or figure.value == int(figure.value) else f"{figure.value:.4g}"
    )
    source = f"  [{figure.source}]" if figure.source else ""
    return f"  {figure.name}: {value} {figure.unit} = {figure.arithmetic}{source}"


def _one_machine(plan: ServingPlan) -> bool:
    return plan.machine == "this machine"


def _name(row: CacheRow, plan: ServingPlan) -> str:
    return f"{row.caches.dtype} *" if row.chosen and len(plan.rows) > 1 else row.caches.dtype


def _reason(row: CacheRow) -> str:
    layout = row.layout
    if layout is None:
        return f"does not fit: {row.reason}"
    gpus = f"{layout.gpus} GPU{'s' if layout.gpus > 1 else ''}"
    extra = f" ({layout.tensor} x {layout.context})" if layout.context > 1 else ""
    more = ""
    if row.by_bytes is not None and row.by_bytes < layout.gpus:
        more = f"; weights and caches alone are the memory of {row.by_bytes}"
    if row.fewest is not None:
        each = "" if row.fewest.tensor == 1 else f" groups of {row.fewest.tensor}"
        more += f"; {row.fewest.gpus} if {row.fewest.context}{each} share the tokens"
    return f"{gpus}{extra}: {row.reason}{more}"


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:,.{0 if rate >= 10 else 1}f} tokens/s"
