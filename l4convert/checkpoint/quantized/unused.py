"""Tensors of quantized checkpoints that are scales of something else than weights: read past, and counted."""

from __future__ import annotations

from collections.abc import Mapping

from l4convert.checkpoint.quantized.source import FLOAT_SCALES, Source, where
from l4convert.checkpoint.safetensors_file import SAFETENSORS_NAMES
from l4convert.errors import InputError

# Ends of names -> what they are. Activations are rounded with scales of their own here, token by token, and scales of
# caches are found by calibration on a text.
ENDINGS: Mapping[str, str] = {
    "input_scale": "static scales of activations",
    "input_global_scale": "static scales of activations",
    "k_proj.k_scale": "scales of key and value caches",
    "v_proj.v_scale": "scales of key and value caches",
    "k_proj.output_scale": "scales of key and value caches",
    "v_proj.output_scale": "scales of key and value caches",
    "self_attn.k_scale": "scales of key and value caches",
    "self_attn.v_scale": "scales of key and value caches",
}


def take_unused(source: Source) -> str:
    """Take them all out, and say how many there were: "; not used: 48 static scales of activations".

    Raises:
        InputError: One is no floating-point number, so it is not what its name says.
    """
    counts: dict[str, int] = {}
    for name in list(source.stored):
        what = next((words for end, words in ENDINGS.items() if name.endswith(end)), None)
        if what is None:
            continue
        tensor = source.stored.pop(name)
        if tensor.dtype not in FLOAT_SCALES:
            names = ", ".join(SAFETENSORS_NAMES[dtype] for dtype in FLOAT_SCALES)
            raise InputError(f"{where(tensor)} is {SAFETENSORS_NAMES[tensor.dtype]}, expected {names}")
        counts[what] = counts.get(what, 0) + 1
    listed = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    return f"; not used: {listed}" if listed else ""
