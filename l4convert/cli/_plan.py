"""How a plan is shown, by ``plan`` and by ``convert --dry-run``."""

from __future__ import annotations

import dataclasses
from typing import Any

from l4convert.cli._adapters import adapter_rows, adapters_payload
from l4convert.cli._network import network_payload, network_rows
from l4convert.cli._passes import notes_lines, passes_payload, passes_text
from l4convert.cli._plan_serving import serving_payload, serving_text
from l4convert.cli._render import count, fields, size, table
from l4convert.cli._settings import Settings
from l4convert.cli._sharing import sharing_payload, sharing_rows
from l4convert.planning import ConversionPlan, TensorPlan, TimePlan
from l4convert.planning.memory import METHOD


def show_plan(settings: Settings, plan: ConversionPlan, tensors: bool = False, explain: bool = False) -> None:
    """Print the plan; its table for people has a row for each tensor with ``tensors`` or ``-v``, its JSON always.

    With ``explain`` or ``-v`` every number comes with its arithmetic.

    Raises:
        InputError: After that, if the disk is too small.
    """
    settings.emit("plan", plan_payload(plan), plan_text(plan, tensors or settings.verbose, settings.verbose, explain))
    plan.disk.check()


def plan_payload(plan: ConversionPlan) -> dict[str, Any]:
    """The schema ``l4convert.plan/1``; docs/guides/planning.md describes it."""
    disk, memory = plan.disk, plan.memory
    return {
        "source": plan.source,
        "parameters": plan.parameters,
        "active_parameters": plan.active_parameters,
        "source_bytes": plan.source_bytes,
        "output": None if plan.output is None else str(plan.output),
        "target": plan.target,
        "recipe": plan.recipe,
        "adapters": adapters_payload(plan.adapters),
        "kv_cache": plan.kv_cache,
        "compute": plan.compute,
        "bytes": plan.bytes,
        "tensor_count": plan.tensors,
        "kinds": [{"kind": kind, "tensors": n, "bytes": nbytes} for kind, (n, nbytes) in plan.kinds.items()],
        "files": dict(plan.files),
        "shared": None if plan.sharing is None else sharing_payload(plan.sharing),
        "disk": {
            "needed_bytes": disk.needed,
            "folder": None if disk.folder is None else str(disk.folder),
            "free_bytes": disk.free,
            "missing_bytes": None if disk.free is None else disk.missing,
        },
        "memory": {
            "peak_bytes": memory.peak,
            "process_bytes": memory.process,
            "tile_bytes": memory.tile,
            "pages_bytes": memory.pages,
            "jobs": memory.jobs,
            "largest_tile": {"tensor": memory.tensor, "rows": memory.rows},
            "method": METHOD,
        },
        "time": None if plan.time is None else _time_payload(plan.time),
        "network": network_payload(plan.traffic),
        "serving": None if plan.serving is None else serving_payload(plan.serving),
        "passes": passes_payload(plan.passes),
        "tensors": [dataclasses.asdict(row) for row in plan.table],
    }


def _time_payload(time: TimePlan) -> dict[str, Any]:
    return {
        "estimate": True,
        "seconds": round(time.seconds, 3),
        "schemes": [
            {"scheme": scheme, "elements": n, "elements_per_second": round(time.rates[scheme])}
            for scheme, n in time.elements.items()
        ],
        "jobs": time.jobs,
        "digest": {"bytes": 2 * time.weight_bytes, "bytes_per_second": round(time.digest_rate)},
    }


def plan_text(plan: ConversionPlan, tensors: bool, verbose: bool, explain: bool = False) -> str:
    """Summary, kinds and files, use; ``explain`` adds how the numbers were found, ``verbose`` the passes, too."""
    kinds = [(kind, f"{n:,}", size(nbytes)) for kind, (n, nbytes) in plan.kinds.items()]
    parts = [
        _summary(plan),
        table(["kind", "tensors", "size"], kinds, right=[1, 2]),
        table(["file", "size", "bytes"], [(name, size(n), f"{n:,}") for name, n in plan.files.items()], right=[1, 2]),
    ]
    if tensors:
        parts.append(_tensor_table(plan.table))
    if plan.serving is not None:
        parts.append(serving_text(plan.serving, explain or verbose))
    if verbose:
        parts.append(passes_text(plan.passes, verbose=True))
    elif notes := notes_lines(plan.passes):
        parts.append("\n".join(notes))
    if verbose or explain:
        parts.append(_methods(plan))
    return "\n\n".join(parts)


def _summary(plan: ConversionPlan) -> str:
    active = f"{count(plan.active_parameters)} active per token"
    memory = plan.memory
    tiles = f"{memory.jobs} x {size(memory.tile)} tiles, {size(memory.pages)} of mapped source"
    return fields(
        [
            ("would convert", plan.source),
            ("parameters", f"{count(plan.parameters)} ({active}), {size(plan.source_bytes)}"),
            ("would write", plan.output or "(no --output)"),
            ("target", plan.target),
            ("recipe", plan.recipe),
            *adapter_rows(plan.adapters),
            ("KV cache", plan.kv_cache),
            ("computes in", plan.compute),
            ("size", f"{size(plan.bytes)} in {plan.tensors:,} tensors"),
            *([] if plan.sharing is None else sharing_rows(plan.sharing)),
            ("disk", _disk(plan)),
            ("memory", f"{size(memory.peak)} expected: {size(memory.process)} program and graph, {tiles}"),
            ("time", _time(plan)),
            *network_rows(plan.traffic),
        ]
    )


def _disk(plan: ConversionPlan) -> str:
    disk = plan.disk
    if disk.free is None:
        return f"{size(disk.needed)} needed; --output compares with what is free there"
    verdict = f", {size(disk.missing)} TOO FEW" if disk.missing else ""
    return f"{size(disk.needed)} needed, {size(disk.free)} free in {disk.folder}{verdict}"


def _time(plan: ConversionPlan) -> str:
    if plan.time is None:
        return "not measured"
    time = plan.time
    rates = ", ".join(f"{scheme} {count(rate)}/s" for scheme, rate in time.rates.items())
    return f"about {duration(time.seconds)} (an estimate, measured here: {rates})"


def duration(seconds: float) -> str:
    """``2 h 11 min``, ``45 min``, ``12 s``: two digits or so, as an estimate deserves."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 600 else f"{minutes / 60:.0f} h"


def _tensor_table(rows: tuple[TensorPlan, ...]) -> str:
    cells = [(r.name, r.kind, r.scheme, r.dtype, list(r.shape), r.bytes, r.file, _offset(r), _sources(r)) for r in rows]
    headers = ["tensor", "kind", "scheme", "dtype", "shape", "bytes", "file", "offset", "from"]
    return table(headers, cells, right=[5, 7])


def _offset(row: TensorPlan) -> str:
    return "" if row.offset is None else str(row.offset)


def _sources(row: TensorPlan) -> str:
    more = len(row.sources) - 1
    return f"{row.sources[0]} and {more} more" if more > 0 else "".join(row.sources)


def _methods(plan: ConversionPlan) -> str:
    lines = [f"memory: {METHOD}; here {plan.memory.rows} rows of {plan.memory.tensor}"]
    if plan.time is not None:
        work = [f"{n:,} elements {scheme} at {plan.time.rates[scheme]:,.0f}/s" for scheme, n in
                plan.time.elements.items()]  # fmt: skip
        digest = f"2 x {plan.time.weight_bytes:,} bytes digested at {plan.time.digest_rate:,.0f}/s"
        lines.append(
            f"time: ({' + '.join([*work, digest])}) on {plan.time.jobs} cores, but no less than the digests, which take"
            " one; reading from a cold disk may take longer"
        )
    return "\n".join(lines)
