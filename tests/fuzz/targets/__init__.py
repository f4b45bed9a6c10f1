"""The table of fuzz targets, one a parser."""

from __future__ import annotations

from collections.abc import Mapping

from tests.fuzz.target import Target
from tests.fuzz.targets import artifacts, checkpoints, settings, small_files

TARGETS: Mapping[str, Target] = {
    "safetensors": checkpoints.SAFETENSORS,
    "index": checkpoints.INDEX,
    "config": checkpoints.CONFIG,
    "sidecars": small_files.SIDECARS,
    "client_files": small_files.CLIENT_FILES,
    "tokenizer": small_files.TOKENIZER,
    "manifest": artifacts.MANIFEST,
    "verify": artifacts.VERIFY,
    "graph": artifacts.GRAPH,
    "journal": artifacts.JOURNAL,
    "recipe": settings.RECIPE,
    "policy": settings.POLICY,
    "hardware": settings.HARDWARE,
    "settings": settings.SETTINGS,
}
