"""What makes two runs the same work: facts by name, compared before one goes on from what the other left."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from l4convert import __version__
from l4convert.checkpoint.remote import known_etag, remote_file
from l4convert.emit.jobs import total_jobs
from l4convert.emit.manifest import LIBRARIES
from l4convert.emit.plan import WeightsPlan
from l4convert.emit.staging import reported

SOURCE = "source file "
# Follow from the others or from the graph's bytes.
_DERIVED_FIELDS = {"passes", "config"}


def identify(
    plan: WeightsPlan, contents: Mapping[str, bytes], manifest: Mapping[str, Any], sources: Sequence[Path]
) -> dict[str, Any]:
    """The facts, JSON values by the names under which a user knows them.

    Args:
        plan: Of the weights file.
        contents: Name to content of the files that are made from the options and the graph.
        manifest: The caller's fields of the manifest: the source's digests and the options.
        sources: Files whose size and time of change must stay; those on a server: whose size and ETag.

    Raises:
        InputError: A source cannot be read.
    """
    facts: dict[str, Any] = {}
    for path in sources:
        facts[f"{SOURCE}{path.name}"] = _state(path)
    facts |= {name: value for name, value in manifest.items() if name not in _DERIVED_FIELDS}
    facts["version of l4convert"] = __version__
    facts |= {f"version of {name}": version(name) for name in LIBRARIES}
    facts |= {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}
    facts["layout of the weights"] = [hashlib.sha256(plan.header).hexdigest(), total_jobs(plan)]
    return facts


def _state(path: Path) -> list[int | str]:
    """Size, and what changes when the content does: the time; in Hugging Face's cache and on the hub, the ETag.

    So a run goes on also where a file was fetched into the cache, or out of it, in between.
    """
    if file := remote_file(path):
        return [file.size, file.etag]
    with reported(f"{path}: cannot be read"):
        status = path.stat()
        return [status.st_size, known_etag(path) or status.st_mtime_ns]
