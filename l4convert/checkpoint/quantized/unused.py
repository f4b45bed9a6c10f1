"""Tensors of quantized checkpoints that are scales of something else than weights: read past, and counted."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from l4convert.checkpoint.quantized.source import FLOAT_SCALES, Source, where
from l4convert.checkpoint.safetensors_file import SAFETENSORS_NAMES, Stored
from l4convert.errors import InputError

_ACTIVATIONS, _CACHES = "static scales of activations", "scales of key and value caches"
# Ends of names -> what they are. Activations are rounded with scales of their own here, token by token, and scales of
# caches are found by calibration on a text.
ENDINGS: Mapping[str, str] = {
    "k_proj.k_scale": _CACHES,
    "v_proj.v_scale": _CACHES,
    "k_proj.output_scale": _CACHES,
    "v_proj.output_scale": _CACHES,
    "self_attn.k_scale": _CACHES,
    "self_attn.v_scale": _CACHES,
    "self_attn.q_scale": _ACTIVATIONS,
    "input_scale": _ACTIVATIONS,
    "input_global_scale": _ACTIVATIONS,
    ".output_scale": _ACTIVATIONS,
}
_ZERO_POINT = "_zero_point"
_ZERO_POINTS = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN)  # zp_dtype of compressed-tensors' QuantizationArgs


def take_unused(source: Source) -> str:
    """Take them all out, and say how many there were: "; not used: 48 static scales of activations".

    A zero point counts with its scale.

    Raises:
        InputError: One is of no type for scales, so it is not what its name says.
    """
    counts: dict[str, int] = {}
    for name in list(source.stored):
        shifts = name.endswith(_ZERO_POINT)
        scale = name.removesuffix(_ZERO_POINT) + "_scale" if shifts else name
        what = next((words for end, words in ENDINGS.items() if scale.endswith(end)), None)
        if what is not None:
            _check(source.stored.pop(name), shifts)
            counts[what] = counts.get(what, 0) + (not shifts)
    listed = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    return f"; not used: {listed}" if listed else ""


def _check(tensor: Stored, shifts: bool) -> None:
    dtypes = (*FLOAT_SCALES, *_ZERO_POINTS) if shifts else FLOAT_SCALES
    if tensor.dtype not in dtypes:
        names = ", ".join(SAFETENSORS_NAMES[dtype] for dtype in dtypes)
        raise InputError(f"{where(tensor)} is {SAFETENSORS_NAMES[tensor.dtype]}, expected {names}")
