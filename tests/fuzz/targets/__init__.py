"""The table of fuzz targets, one a parser."""

from __future__ import annotations

from collections.abc import Mapping

from tests.fuzz.target import Target
from tests.fuzz.targets import (
    adapters,
    artifacts,
    checkpoints,
    hub,
    meta,
    onnx_models,
    quantization,
    settings,
    small_files,
)

TARGETS: Mapping[str, Target] = {
    "safetensors": checkpoints.SAFETENSORS,
    "index": checkpoints.INDEX,
    "config": checkpoints.CONFIG,
    "quantization": quantization.QUANTIZATION,
    "params": meta.PARAMS_JSON,
    "tokenizer_model": meta.RANKS,
    "pickle": meta.PICKLE,
    "storages": meta.STORAGES,
    "zip": meta.ZIP,
    "pth": meta.PTH,
    "adapter_config": adapters.ADAPTER_CONFIG,
    "adapter_weights": adapters.ADAPTER_WEIGHTS,
    "onnx": onnx_models.MODEL,
    "hub": hub.HUB,
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
