"""Weights that are NaN or infinite: refused, naming the tensor and how many values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.hostile.bases import checkpoint
from tests.hostile.case import Damage, Family, cases
from tests.hostile.files import EMBED, HEAD, NORM, SINGLE, read_arrays, write_safetensors

ROUTER = "model.layers.0.feed_forward.router.weight"
GATE_UP = "model.layers.1.feed_forward.experts.gate_up_proj"
DOWN = "model.layers.0.feed_forward.experts.down_proj"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
SHARED = "model.layers.1.feed_forward.shared_expert.up_proj.weight"
# Bit patterns: quiet, signalling and negative NaN, the largest payload, both infinities.
HALF = {"NaN": 0x7E00, "signalling NaN": 0x7C01, "-NaN": 0xFE00, "NaN of ones": 0x7FFF, "Inf": 0x7C00, "-Inf": 0xFC00}


def put(name: str, bits: int, places: slice = slice(0, 1), kind: str = "uint16") -> Callable[[Path], None]:
    """Set values of a tensor, in the order in which they are stored, to a bit pattern."""

    def damage(folder: Path) -> None:
        tensors = read_arrays(folder / SINGLE)
        target = {"uint16": np.float16, "uint32": np.float32, "bfloat16": np.uint16}[kind]
        if kind == "bfloat16":
            values = (tensors[name].astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            values = tensors[name].astype(target)
        flat = values.reshape(-1).view("uint32" if kind == "uint32" else "uint16")
        flat[places] = bits
        tensors[name] = values
        write_safetensors(folder / SINGLE, tensors)

    return damage


def named(damage: Damage, name: str, count: int) -> tuple[Damage, tuple[str, ...]]:
    return damage, (SINGLE, name, f"{count} of the ", "NaN or infinite")


CASES = {
    **{f"{what} in the embeddings": named(put(EMBED, bits), EMBED, 1) for what, bits in HALF.items()},
    "the last value": named(put(EMBED, 0x7E00, slice(-1, None)), EMBED, 1),
    "7 values": named(put(EMBED, 0x7C00, slice(0, 700, 100)), EMBED, 7),
    "all values": named(put(EMBED, 0x7E00, slice(None)), EMBED, 2048),
    "a norm": named(put(NORM, 0x7E00), NORM, 1),
    "all of a norm": named(put(NORM, 0x7C00, slice(None)), NORM, 32),
    "the output layer": named(put(HEAD, 0x7E00, slice(5, 6)), HEAD, 1),
    "a router": named(put(ROUTER, 0xFC00, slice(3, 4)), ROUTER, 1),
    "a projection": named(put(Q_PROJ, 0x7E00, slice(0, 3)), Q_PROJ, 3),
    "the last expert": named(put(GATE_UP, 0x7E00, slice(-1, None)), GATE_UP, 1),
    "the first expert": named(put(DOWN, 0x7E00), DOWN, 1),
    "the shared expert": named(put(SHARED, 0x7C00), SHARED, 1),
    "a signalling NaN of bfloat16": named(put(GATE_UP, 0x7F81, slice(0, 1), "bfloat16"), GATE_UP, 1),
    "float32 NaN": named(put(Q_PROJ, 0x7FC00000, slice(0, 1), "uint32"), Q_PROJ, 1),
    "float32 signalling NaN": named(put(NORM, 0x7F800001, slice(0, 1), "uint32"), NORM, 1),
    "float32 -Inf": named(put(EMBED, 0xFF800000, slice(0, 2), "uint32"), EMBED, 2),
    "bfloat16 NaN": named(put(Q_PROJ, 0x7FC0, slice(0, 1), "bfloat16"), Q_PROJ, 1),
    "bfloat16 Inf": named(put(EMBED, 0x7F80, slice(0, 4), "bfloat16"), EMBED, 4),
    "bfloat16 smallest NaN": named(put(NORM, 0x7F81, slice(0, 1), "bfloat16"), NORM, 1),
}
# Of a quantized weight it is the scales, one a block of values, that are not finite, so their number is what is told.
BLOCKS = {name: (damage, (file, tensor, "NaN or infinite")) for name, (damage, (file, tensor, *_)) in CASES.items()}
FAMILY = Family(base=checkpoint, cases=cases(CASES))
QUANTIZED = ("convert", "{input}", "--output", "{out}", "--recipe")
INT4 = Family(base=checkpoint, command=(*QUANTIZED, "int4"), real=False, cases=cases(BLOCKS))
FP8 = Family(base=checkpoint, command=(*QUANTIZED, "fp8", "--target", "portable"), real=False, cases=cases(BLOCKS))
