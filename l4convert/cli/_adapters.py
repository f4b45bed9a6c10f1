"""How merged adapters are shown, by every command that knows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from l4convert.cli._network import local_folder

if TYPE_CHECKING:
    from pathlib import Path

    from l4convert.checkpoint.adapters import AppliedAdapter
    from l4convert.cli._settings import Settings


def adapter_folders(adapters: Sequence[Path], settings: Settings) -> tuple[Path, ...]:
    """The folders of what ``--adapter`` names; those on the hub are downloaded first, for they are small."""
    return tuple(local_folder(adapter, settings) for adapter in adapters)


def adapters_payload(adapters: Sequence[AppliedAdapter]) -> list[dict[str, Any]]:
    """JSON fields of each."""
    return [{**adapter.to_dict(), "path": str(adapter.path), "base_model": adapter.base} for adapter in adapters]


def adapter_rows(adapters: Sequence[AppliedAdapter]) -> list[tuple[str, object]]:
    """A row of a summary for each."""
    from l4convert.checkpoint.text import known_name

    return [("adapter", f"{known_name(adapter.path) or adapter.path}: {adapter.words}") for adapter in adapters]


def manifest_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The same of an artifact, from its manifest."""
    entries = manifest.get("adapters")
    return [("adapter", _entry(entry)) for entry in entries] if isinstance(entries, list) else []


def _entry(entry: Any) -> str:
    if not isinstance(entry, dict):
        return "(unreadable)"
    from l4convert.checkpoint.text import show

    merged, replaced = show(entry.get("merged")), show(entry.get("replaced"))
    return f"{show(entry.get('folder'))}: merged into {merged} tensors, {replaced} replaced"
