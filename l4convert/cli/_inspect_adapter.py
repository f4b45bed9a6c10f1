"""What ``inspect`` says about a LoRA adapter."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from l4convert.checkpoint.adapters import Adapter, adapter_scales, open_adapter
from l4convert.checkpoint.text import show
from l4convert.cli._render import fields, ranges, size, table

_LAYER = re.compile(r"(.*\.layers)\.(\d+)\.(.+)")


def describe(path: Path, tensors: bool) -> tuple[dict[str, Any], str]:
    """The adapter as JSON fields and as text; ``tensors`` adds a row for each tensor to both."""
    adapter = open_adapter(path)
    stored = [*(tensor for pair in adapter.pairs.values() for tensor in pair), *adapter.whole.values()]
    payload: dict[str, Any] = {
        "kind": "adapter",
        "path": str(path),
        "base_model": adapter.config.base,
        "rank": adapter.config.rank,
        "alpha": adapter.config.alpha,
        "rslora": adapter.config.rslora,
        "changes": _changes(adapter),
        "vision_left_out": adapter.vision,
        "tensor_count": len(stored),
        "parameters": sum(tensor.size for tensor in stored),
        "bytes": sum(tensor.nbytes for tensor in stored),
    }
    rows = [
        (
            show(one["name"]),
            ranges(one["layers"]) if one["layers"] else "",
            one["rank"] or "whole",
            _scale(one["scale"]),
        )
        for one in payload["changes"]
    ]
    text = [_summary(adapter, payload), table(["changes", "layers", "rank", "scale"], rows, right=[2, 3])]
    if tensors:
        listed = [(show(t.key), t.dtype.name, list(t.dims), t.nbytes) for t in stored]
        payload["tensors"] = [
            {"name": name, "dtype": dtype, "shape": shape, "bytes": nbytes} for name, dtype, shape, nbytes in listed
        ]
        text.append(table(["tensor", "dtype", "shape", "bytes"], listed, right=[3]))
    return payload, "\n\n".join(text)


def _scale(scale: float | None) -> str:
    return "" if scale is None else f"{scale:.6g}"


def _summary(adapter: Adapter, payload: dict[str, Any]) -> str:
    config = adapter.config
    scale = "alpha / sqrt(rank)" if config.rslora else "alpha / rank"
    return fields(
        [
            ("adapter", show(adapter.path)),
            ("trained on", show(config.base or "(not said)")),
            ("rank, alpha", f"{config.rank}, {config.alpha:g}; scale is {scale}"),
            ("size", f"{size(payload['bytes'])} in {payload['tensor_count']:,} tensors"),
            *([("left out", f"{adapter.vision:,} tensors of the vision part")] if adapter.vision else []),
        ]
    )


def _changes(adapter: Adapter) -> list[dict[str, Any]]:
    """What is changed: modules that differ in their layer only are one entry."""
    found: dict[tuple[str, int | None, float | None], list[int]] = defaultdict(list)
    for name, rank, scale in [*adapter_scales(adapter), *((name, None, None) for name in adapter.whole)]:
        match = _LAYER.fullmatch(name)
        layers = found[(f"{match[1]}.*.{match[3]}" if match else name, rank, scale)]
        layers += [int(match[2])] if match else []
    return [
        {"name": name, "layers": sorted(layers), "rank": rank, "scale": scale}
        for (name, rank, scale), layers in found.items()
    ]
