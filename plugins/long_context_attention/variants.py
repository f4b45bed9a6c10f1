"""What is compiled of kernels.py: types, tile sizes, warps and pipeline depths. Importable without Triton.

Tiles follow the resources that the compiler reports (README.md, "Compiled evidence"): no register spills, two blocks of
decode on a multiprocessor, and as much of a prefill tile in flight as shared memory holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from l4convert.plugins.library.variants import DEFAULT_HEAD_DIMS, Constant, Tuning, Variant

# Of launch.h: enum l4_float, and enum l4_kv with the type of a cache's elements (None: the compute type).
COMPUTE = ("bf16", "fp16")
KV: Mapping[str, tuple[int, str | None]] = {"none": (0, None), "fp8": (1, "u8"), "int8": (2, "u8")}
# Rows of a tile of queries in decode: what the matrix units take at least. More query heads to one key/value head than
# this are refused by launch.cpp.
DECODE_ROWS = 16

Signature = dict[str, str]


def variants(head_dims: Sequence[int] = DEFAULT_HEAD_DIMS) -> tuple[Variant, ...]:
    """Every kernel for each width of a head; names are ``attention_{kernel}_{types}_d{head_dim}``."""
    found: list[Variant] = []
    for head_dim in head_dims:
        for compute in COMPUTE:
            found.append(_combine(compute, head_dim))
            for kv in KV:
                found += [make(compute, kv, head_dim) for make in (_decode, _prepare, _prefill)]
        found += [_commit(bits, head_dim) for bits in (8, 16)]
    return tuple(found)


def _scale(head_dim: int) -> float:
    """Of scores in base 2: log2(e) / sqrt(D)."""
    return math.log2(math.e) / math.sqrt(head_dim)


def _small(head_dim: int, size: int) -> int:
    """Tile sizes of narrow heads, which only small models have: scaled down from those of a head of 64, to 16."""
    return max(16, min(size, size * head_dim // 64))


def _pointers(element: str, names: str) -> Signature:
    return dict.fromkeys(names.split(), f"*{element}")


def _integers(names: str) -> Signature:
    return dict.fromkeys(names.split(), "i32")


def _floats(names: str) -> Signature:
    return dict.fromkeys(names.split(), "fp32")


def _decode(compute: str, kv: str, head_dim: int) -> Variant:
    code, stored = KV[kv]
    constants: dict[str, Constant] = {
        "D": head_dim,
        "R": DECODE_ROWS,
        "BN": _small(head_dim, 64),
        "SCALE": _scale(head_dim),
        "KV": code,
        "HARDWARE_FP8": True,
    }
    # 99 KB of shared memory, not 163 or more.
    narrow = Tuning({"BN": _small(head_dim, 32)}) if kv == "none" else Tuning(num_stages=3)
    return Variant(
        name=f"attention_decode_{compute}_{kv}_d{head_dim}",
        kernel="decode",
        signature={
            **_pointers(compute, "query key value"),
            **_pointers(stored or compute, "cache_key cache_value"),
            "positions": "*i64",
            **_pointers("fp32", "cos sin key_scale value_scale partial partial_max partial_sum"),
            **dict.fromkeys(("seen_tokens", "capacity", "chunk"), "i64"),
            **_integers("table_rows group rope"),
            **_floats("qk_norm_eps floor_scale attn_scale"),
        },
        constants=constants,
        num_warps=4,
        num_stages=3 if kv == "none" else 4,  # a tile of bytes is half as large
        per_sm={80: Tuning({"HARDWARE_FP8": False}), **dict.fromkeys((89, 120), narrow)},
    )


def _combine(compute: str, head_dim: int) -> Variant:
    return Variant(
        name=f"attention_combine_{compute}_d{head_dim}",
        kernel="combine",
        signature={
            **_pointers("fp32", "partial partial_max partial_sum value_scale"),
            "attention": f"*{compute}",
            **_integers("splits num_heads group quantized"),
        },
        constants={"D": head_dim, "BS": _small(head_dim, 64)},
        num_warps=4,
        num_stages=2,
    )


def _operand(compute: str, kv: str) -> str:
    """What queries are multiplied as: codes are numbers of float16."""
    return compute if kv == "none" else "fp16"


def _prepare(compute: str, kv: str, head_dim: int) -> Variant:
    code, stored = KV[kv]
    return Variant(
        name=f"attention_prepare_{compute}_{kv}_d{head_dim}",
        kernel="prepare",
        signature={
            **_pointers(compute, "query key value"),
            "positions": "*i64",
            **_pointers("fp32", "cos sin key_scale value_scale"),
            "ready": f"*{_operand(compute, kv)}",
            **_pointers(stored or compute, "new_key new_value"),
            "sequences": "*i64",
            **_integers("new_tokens"),
            **dict.fromkeys(("seen_tokens", "chunk"), "i64"),
            **_integers("table_rows heads group rope"),
            **_floats("qk_norm_eps floor_scale attn_scale"),
        },
        constants={"D": head_dim, "BT": 16, "BS": 1024, "KV": code, "HARDWARE_FP8": True},
        num_warps=4,
        num_stages=2,
        per_sm={80: Tuning({"HARDWARE_FP8": False})},
    )


def _prefill(compute: str, kv: str, head_dim: int) -> Variant:
    code, stored = KV[kv]
    return Variant(
        name=f"attention_prefill_{compute}_{kv}_d{head_dim}",
        kernel="prefill",
        signature={
            "ready": f"*{_operand(compute, kv)}",
            **_pointers(stored or compute, "cache_key cache_value new_key new_value"),
            "sequences": "*i64",
            "value_scale": "*fp32",
            "attention": f"*{compute}",
            **_pointers("fp32", "partial partial_max partial_sum"),
            **_integers("new_tokens"),
            **dict.fromkeys(("capacity", "chunk"), "i64"),
            **_integers("group splits"),
        },
        constants={
            "D": head_dim,
            "BM": _small(head_dim, 128),
            "BN": _small(head_dim, 64),
            "SCALE": _scale(head_dim),
            "KV": code,
            "HARDWARE_FP8": True,
            "MASK_ALL": True,
        },
        num_warps=8,
        num_stages=2,
        per_sm={
            80: Tuning({"HARDWARE_FP8": False}, num_stages=3),
            89: Tuning(num_stages=3),
            90: Tuning({"BN": _small(head_dim, 128), "MASK_ALL": False}, num_stages=3),
            100: Tuning({"BN": _small(head_dim, 128), "MASK_ALL": False}, num_stages=2),
        },
    )


def _commit(bits: int, head_dim: int) -> Variant:
    element = f"i{bits}"
    return Variant(
        name=f"attention_commit_{bits}_d{head_dim}",
        kernel="commit",
        signature={
            **_pointers(element, "new_key new_value"),
            "sequences": "*i64",
            **_pointers(element, "cache_key cache_value"),
            **_integers("new_tokens"),
            **dict.fromkeys(("capacity", "chunk"), "i64"),
        },
        constants={"D": head_dim, "BT": 32},
        num_warps=4,
        num_stages=2,
    )
