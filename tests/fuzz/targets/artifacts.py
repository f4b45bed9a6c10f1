"""Files of an artifact: its manifest, its graph, the journal of a run that did not end."""

from __future__ import annotations

import functools
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir

from l4convert.checkpoint.hf_config import read_config
from l4convert.emit import write_artifact
from l4convert.emit.graph_refs import external_refs
from l4convert.emit.journal import SCHEMA, new_digest, read_journal
from l4convert.emit.verify import verify_artifact
from l4convert.runtime.manifest import read_artifact
from tests.emit.models import Weight, holder, values
from tests.fuzz.target import OneFile, Target, folder_in_memory
from tests.fuzz.targets.checkpoints import checkpoint_folder

_folder = folder_in_memory()
_graph = OneFile("model.onnx")
_journal = OneFile("journal")


@functools.cache
def artifact_folder() -> Path:
    """A valid artifact that lives as long as the process, with a graph of one product: small, so that it is quick."""
    folder = Path(_folder.name) / f"artifact-{os.getpid()}"  # targets are forks of one process
    weight = Weight(values(ir.DataType.FLOAT16, (4, 8)))
    write_artifact(holder({"w": weight}), folder, manifest=_facts())
    return folder


def _facts() -> dict[str, Any]:
    """What the manifest of a converted checkpoint says of it."""
    config = read_config(checkpoint_folder() / "config.json")
    rule = {"pattern": "*", "scheme": "int4", "block_size": 32}
    recipe = {"name": "int4", "rule": [rule], "kv_cache": {"dtype": "int8", "granularity": "channel", "layers": "all"}}
    return {
        "source": {"format": "hf", "files": {"config.json": {"bytes": 1, "sha256": "0"}}}, "config": asdict(config),
        "target": "cpu", "recipe": recipe, "kv_cache": "growing", "compute": "float32", "calls": "any", "passes": [],
    }  # fmt: skip


@functools.cache
def manifest() -> bytes:
    return (artifact_folder() / "l4convert.json").read_bytes()


def _with_manifest(data: bytes) -> Path:
    manifest()
    (artifact_folder() / "l4convert.json").write_bytes(data)
    return artifact_folder()


def parse_journal(data: bytes) -> None:
    recorded = read_journal(_journal(data))
    assert recorded is None or recorded.end <= len(data)


def journal_seeds() -> list[bytes]:
    first = b'{"schema": "%s", "facts": {"plan": "x", "options": [1, 2]}}\n' % SCHEMA.encode()
    lines = b"".join(b"%d %s\n" % (job, new_digest(b"%d" % job).hexdigest().encode()) for job in range(3))
    return [first, first + lines, first + lines + b"\0" * 40, first + lines[:-10]]


MANIFEST = Target(lambda data: read_artifact(_with_manifest(data)), lambda: [manifest()], form="json", longest=1 << 15)
VERIFY = Target(
    lambda data: verify_artifact(_with_manifest(data)).as_dict(), lambda: [manifest()], form="json", longest=1 << 15
)
GRAPH = Target(
    lambda data: list(external_refs(_graph(data))),
    lambda: [(artifact_folder() / "model.onnx").read_bytes()[:60000], b""],
    ("location", "offset", "length", "model.safetensors", "../"),
    longest=1 << 17,
)
JOURNAL = Target(parse_journal, journal_seeds, (SCHEMA, '"schema"', '"facts"'))
