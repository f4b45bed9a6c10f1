"""How a checkpoint says that it is quantized, together with the tensors that it then has."""

from __future__ import annotations

import json
from typing import Any

from l4convert.checkpoint.fields import Fields
from l4convert.checkpoint.names import PLAIN
from l4convert.checkpoint.quantized import Source, read_quantized
from l4convert.checkpoint.safetensors_file import DTYPES, open_safetensors
from l4convert.checkpoint.text import parse_object
from tests.fuzz.target import OneFile, Target
from tests.hostile import quantized_base
from tests.hostile.quantized_base import FBGEMM, FLOAT8, MODELOPT, WEIGHT, scheme

_shard = OneFile("model.safetensors")
READ_BYTES = 1 << 16
MOST_TENSORS = 64
# Bytes of an element: the shape [32, 32] where shapes are, group 0 where groups are; ones elsewhere.
FILL = {"I64": (32).to_bytes(8, "little"), "I32": bytes(4)}
EXPERTS = "model.layers.0.feed_forward.experts.down_proj"
EXPECTED = {WEIGHT: (32, 32), EXPERTS: (2, 32, 16), "model.norm.weight": (32,)}


def parse(data: bytes) -> None:
    """An object with ``config`` and, by name, the dtype and shape of the ``tensors``, whose content is :data:`FILL`."""
    content = parse_object(data, "config.json")
    table = Fields(content, "config.json").object("tensors")
    config = Fields(content, "config.json").object("config")
    if table is None or config is None or len(table.values) > MOST_TENSORS:
        return
    header: dict[str, Any] = {}
    content_bytes = b""
    for name, described in table.values.items():
        size = _size(described)
        begin = len(content_bytes)
        if size is None or begin + size > READ_BYTES:
            return
        header[name] = {"dtype": described[0], "shape": described[1], "data_offsets": [begin, begin + size]}
        fill = FILL.get(described[0], b"\1")
        content_bytes += fill * (size // len(fill))
    text = json.dumps(header).encode()
    stored = open_safetensors(_shard(len(text).to_bytes(8, "little") + text + content_bytes))
    source = Source(config, dict(stored), EXPECTED, PLAIN)
    for tensor in read_quantized(config.get("quant_method", None), source).tensors.values():
        assert len(tensor.tobytes()) == tensor.nbytes


def _size(described: Any) -> int | None:
    """Bytes of a tensor; None where that is no dtype with a shape."""
    if not isinstance(described, list) or len(described) != 2 or described[0] not in list(DTYPES):
        return None
    size = DTYPES[described[0]].numpy().itemsize
    if not isinstance(described[1], list) or not all(type(n) is int and 0 <= n < READ_BYTES for n in described[1]):
        return None
    for extent in described[1]:
        size *= extent
    return size


def seeds() -> list[bytes]:
    """Every method and scheme that is read."""
    int4 = {f"{WEIGHT}_packed": ["I32", [32, 4]], f"{WEIGHT}_scale": ["F16", [32, 1]], f"{WEIGHT}_shape": ["I64", [2]]}
    zeros = {**int4, f"{WEIGHT}_zero_point": ["I32", [4, 1]], f"{WEIGHT}_g_idx": ["I32", [32]]}
    fp8 = {WEIGHT: ["F8_E4M3", [32, 32]], f"{WEIGHT}_scale": ["F32", [32, 1]]}
    stacked = {EXPERTS: ["F8_E4M3", [2, 32, 16]], f"{EXPERTS}_scale": ["F32", [2, 16, 1]]}
    nvfp4 = {
        f"{WEIGHT}_packed": ["U8", [32, 16]], f"{WEIGHT}_scale": ["F8_E4M3", [32, 2]],
        f"{WEIGHT}_global_scale": ["F32", [1]],
    }  # fmt: skip
    floats = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    plain = {WEIGHT: ["I8", [32, 32]], f"{WEIGHT}_scale": ["F32", [32, 1]], f"{WEIGHT}_zero_point": ["I8", [32, 1]]}
    mxfp4 = {f"{WEIGHT}_packed": ["U8", [32, 16]], f"{WEIGHT}_scale": ["U8", [32, 1]]}
    mxfp8 = {WEIGHT: ["F8_E4M3", [32, 32]], f"{WEIGHT}_scale": ["U8", [2, 2]]}
    blocks = {"strategy": "block", "block_structure": "16x16", "group_size": None}
    modelopt = {**MODELOPT, "quant_method": "modelopt"}
    nested = {EXPERTS: ["F8_E4M3", [2, 32, 16]], f"{EXPERTS}_weight_scale": ["F32", [2]]}
    found: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (scheme(), int4),
        ({**scheme(symmetric=False), "ignore": ["re:.*lm_head", "x"]}, zeros),
        ({**scheme(**FLOAT8), "format": "float-quantized"}, fp8),
        ({**scheme(**floats), "format": "nvfp4-pack-quantized"}, nvfp4),
        ({**scheme(symmetric=False), "format": "int-quantized"}, plain),
        ({**scheme(type="float"), "format": "mxfp4-pack-quantized"}, mxfp4),
        ({**scheme(**{**FLOAT8, **blocks}), "format": "mxfp8-quantized"}, mxfp8),
        (dict(FBGEMM), {**fp8, **stacked}),
        (modelopt, {**fp8, f"{WEIGHT}_scale": ["F32", []], **nested}),
    ]
    return [json.dumps({"config": config, "tensors": tensors}).encode() for config, tensors in found]


WORDS = (
    "_scale",
    "_packed",
    "_shape",
    "_zero_point",
    "_g_idx",
    "_global_scale",
    "re:",
    "tensor",
    "channel",
    "group",
    "block",
)
QUANTIZATION = Target(parse, seeds, (*WORDS, *(f'"{name}"' for name in DTYPES), quantized_base.MODULE), form="json")
