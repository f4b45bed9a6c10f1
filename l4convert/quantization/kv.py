"""How keys and values are stored in a quantized cache: symmetric, with scales that calibration finds on a text.

A stored element is ``code = clip(round_half_even(x / scale), lowest, highest)`` (FP8: the nearest E4M3 number,
saturated), and stands for ``code * scale``. Scales are float32, one a key/value head or one a channel of a head. The
quotient is the float32 product with ``1 / scale``, as kernels have it.

INT4 codes lie two in a byte, along the head's width: element 2j in the low half, 2j+1 in the high half, each plus 8.
That is the layout of ONNX Runtime's GroupQueryAttention (``kv_cache_bit_width`` 4), so one layout serves all targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import onnx_ir as ir

KvDtype = Literal["fp8", "int8", "int4"]
Granularity = Literal["head", "channel"]
Layers = Literal["all", "global"]


@dataclass(frozen=True)
class KvFormat:
    """What one format of elements is.

    Attributes:
        storage: Element type of the graph's cache inputs and outputs.
        packing: Codes in one stored element.
        highest: Largest code; a scale maps the calibrated maximum to it.
        lowest: Smallest code.
    """

    storage: ir.DataType
    packing: int
    highest: float
    lowest: float


#: E4M3's largest finite number: OCP 8-bit Floating Point Specification 1.0, table 1.
KV_FORMATS: Mapping[KvDtype, KvFormat] = {
    "fp8": KvFormat(ir.DataType.FLOAT8E4M3FN, 1, 448.0, -448.0),
    "int8": KvFormat(ir.DataType.INT8, 1, 127.0, -128.0),
    "int4": KvFormat(ir.DataType.UINT8, 2, 7.0, -8.0),
}


@dataclass(frozen=True)
class KvScheme:
    """How the caches of a model are quantized.

    Attributes:
        dtype: Format of the elements.
        granularity: What shares a scale: a head, or one channel of a head.
        layers: Which layers: all, or those that see the whole context.
    """

    dtype: KvDtype
    granularity: Granularity = "channel"
    layers: Layers = "all"

    @property
    def format(self) -> KvFormat:
        """Of the elements."""
        return KV_FORMATS[self.dtype]

    def covers(self, chunked: bool) -> bool:
        """Whether a layer of this kind is quantized."""
        return self.layers == "all" or not chunked

    def to_dict(self) -> dict[str, Any]:
        """For the manifest and recipes."""
        return {"dtype": self.dtype, "granularity": self.granularity, "layers": self.layers}

    def __str__(self) -> str:
        """For people."""
        return f"{self.dtype}, one scale a {self.granularity}, {self.layers} layers"


def kv_scheme(dtype: str, granularity: str | None = None, layers: str | None = None) -> KvScheme:
    """A scheme from its words.

    Args:
        dtype: One of :data:`KvDtype`.
        granularity: Default: "head" for FP8, whose steps follow the size of a number, so that small channels keep their
            precision beside large ones; "channel" for integers.
        layers: Default: all.

    Raises:
        ValueError: A word that means nothing; the message lists those that do.
    """
    granularity = granularity or ("head" if dtype == "fp8" else "channel")
    layers = layers or "all"
    words = (("dtype", dtype, KvDtype), ("granularity", granularity, Granularity), ("layers", layers, Layers))
    for name, word, known in words:
        if word not in get_args(known):
            raise ValueError(f"{name} {word!r} is not possible; it is one of {', '.join(get_args(known))}")
    return KvScheme(cast("KvDtype", dtype), cast("Granularity", granularity), cast("Layers", layers))


def scale_name(layer: int, kind: str) -> str:
    """Name of the graph's initializer with the scales of a layer's keys ("key") or values ("value")."""
    return f"model.layers.{layer}.self_attn.{kind}_scale"
