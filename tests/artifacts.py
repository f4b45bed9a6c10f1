"""Artifacts made of a checkpoint's canonical graph: what runtime and parity are tested on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from l4convert.checkpoint import open_checkpoint
from l4convert.emit import write_artifact
from l4convert.frontend.decoder import build_decoder

#: Tokens of the text that sessions are fed: chunks of 8, four boundaries inside.
LENGTH = 37
KV_CACHES = ("growing", "static", "windowed")


def write_canonical_artifact(checkpoint: Path, out: Path, kv_cache: Any = "growing", **manifest: Any) -> Path:
    """Write the canonical graph of a checkpoint as an artifact; ``manifest`` overrides fields of the manifest."""
    source = open_checkpoint(checkpoint)
    model = build_decoder(source.config, source.tensors, source.experts, kv_cache)
    fields = {"kv_cache": kv_cache, "target": "portable", "recipe": "none", "config": asdict(source.config)}
    return write_artifact(model, out, sidecars=source.sidecars, manifest=fields | manifest)
