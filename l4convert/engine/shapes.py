"""Optimization profiles: which input shapes an engine takes, and for which its kernels are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from l4convert.engine.network import Capacity
from l4convert.errors import InputError

#: New tokens of one decode call. With exactly one TensorRT-RTX 1.7.1 has a kernel that reads a cache of up to 16,384
#: slots where it is; with a range it copies keys and values for every query head (benchmarks/engine_forms.py).
DECODE_TOKENS = 1

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TokenProfile:
    """One optimization profile: least, usual and most new tokens of a call."""

    name: str
    least: int
    usual: int
    most: int

    def as_dict(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"name": self.name, "tokens": [self.least, self.usual, self.most]}


def token_profiles(prefill_tokens: int, capacity: Capacity) -> tuple[TokenProfile, ...]:
    """Prefill and decode. The tokens of a call lie in one chunk, so no more than a chunked layer's slots."""
    room = min(capacity.global_layers, capacity.chunked_layers)
    most = min(prefill_tokens, room)
    return TokenProfile("prefill", 1, most, most), TokenProfile("decode", *(DECODE_TOKENS,) * 3)


def input_shapes(
    inputs: list[onnx.ValueInfoProto], profile: TokenProfile, max_batch: int, capacity: Capacity
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Input name -> least, usual and most shape.

    The usual call has the whole batch, and the longest past: that is where time is spent.

    Raises:
        InputError: An input has a dimension of a name that no engine knows.
    """
    length = capacity.global_layers
    ranges = {
        "batch": (1, max_batch, max_batch),
        "sequence": (profile.least, profile.usual, profile.most),
        "total_sequence": (1, length, length),
    }
    return {value.name: _shapes(value, ranges) for value in inputs}


def _shapes(value: onnx.ValueInfoProto, ranges: Mapping[str, tuple[int, int, int]]) -> tuple[Shape, Shape, Shape]:
    columns: list[tuple[int, int, int]] = []
    for dim in value.type.tensor_type.shape.dim:
        if dim.HasField("dim_value"):
            columns.append((dim.dim_value,) * 3)
        elif dim.dim_param in ranges:
            columns.append(ranges[dim.dim_param])
        else:
            raise InputError(f"model.onnx: input {value.name} has a dimension {dim.dim_param!r}, which no engine knows")
    least, usual, most = zip(*columns, strict=True) if columns else ((), (), ())
    return tuple(least), tuple(usual), tuple(most)


def io_table(values: list[onnx.ValueInfoProto]) -> list[dict[str, Any]]:
    """Name, element type as NumPy names it, and shape of inputs or outputs; -1 for a dimension that calls choose."""
    return [
        {
            "name": value.name,
            "dtype": str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
            "shape": [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim],
        }
        for value in values
    ]
