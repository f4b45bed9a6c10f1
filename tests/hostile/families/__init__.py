"""The table of families, one file each; a row more is a family more."""

from __future__ import annotations

from collections.abc import Mapping

from tests.hostile.case import Family
from tests.hostile.families import (
    adapters,
    configs,
    indexes,
    not_finite,
    onnx_models,
    params,
    paths,
    pickles,
    pth_storages,
    quantization,
    safetensors_headers,
    tampered,
    templates,
    tokenizers,
    truncated_shards,
    zip_bombs,
)

FAMILIES: Mapping[str, Family] = {
    "safetensors headers": safetensors_headers.FAMILY,
    "truncated shards": truncated_shards.FAMILY,
    "index and shards": indexes.FAMILY,
    "paths and links": paths.FAMILY,
    "config extremes": configs.FAMILY,
    "templates": templates.FAMILY,
    "tokenizers": tokenizers.FAMILY,
    "weights that are not finite": not_finite.FAMILY,
    "weights that are not finite, to INT4": not_finite.INT4,
    "weights that are not finite, to FP8": not_finite.FP8,
    "pickle gadgets": pickles.FAMILY,
    "storages of .pth files": pth_storages.FAMILY,
    "zip bombs": zip_bombs.FAMILY,
    "params.json and Meta's files": params.FAMILY,
    "ONNX models and external data": onnx_models.FAMILY,
    "adapters": adapters.FAMILY,
    "quantization, compressed-tensors INT4": quantization.FAMILY,
    "quantization, compressed-tensors FP8": quantization.FLOATS,
    "quantization, FBGEMM": quantization.FBGEMM,
    "quantization, ModelOpt": quantization.MODELOPT_FAMILY,
    "tampered artifacts": tampered.FAMILY,
}
