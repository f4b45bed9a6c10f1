"""Targets: where an artifact will run, and what the graph is lowered to for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from l4convert.frontend.compute import ComputeType
from l4convert.graph_passes import PASSES, Pass
from l4convert.quantization.kv import KvDtype
from l4convert.targets import cpu, cuda, portable, tensorrt, tensorrt_rtx


@dataclass(frozen=True)
class Target:
    """One row of the table of targets.

    Attributes:
        name: As given to ``--target``.
        summary: One line for ``l4convert targets``.
        lowering: Passes that run after the canonical ones, in order.
        kv_caches: Forms of the cache that it can have, the default first.
        compute: Types that its graphs can compute in, the default first.
        kv_dtypes: Formats of quantized caches that it takes.
        block_size: Of INT4 in bundled recipes, where it is not asked for; None: the recipe's.
        calls: "in_place": the host cuts and packs calls (l4convert/runtime/calls.py); "any": the graph takes any call.
    """

    name: str
    summary: str
    lowering: tuple[Pass, ...]
    kv_caches: tuple[str, ...] = ("growing", "static", "windowed")
    compute: tuple[ComputeType, ...] = ("float32",)
    calls: Literal["any", "in_place"] = "any"
    block_size: int | None = None
    kv_dtypes: tuple[KvDtype, ...] = get_args(KvDtype)


_ON_GPU: tuple[ComputeType, ...] = ("bfloat16", "float16", "float32")


def _passes(names: tuple[str, ...]) -> tuple[Pass, ...]:
    by_name = {p.name: p for p in PASSES}
    return tuple(by_name[name] for name in names)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("cpu", cpu.SUMMARY, _passes(cpu.LOWERING)),
        Target("cuda", cuda.SUMMARY, _passes(cuda.LOWERING), cuda.KV_CACHES, _ON_GPU),
        Target("portable", portable.SUMMARY, _passes(portable.LOWERING)),
        Target(
            "tensorrt",
            tensorrt.SUMMARY,
            _passes(tensorrt.LOWERING),
            ("static",),
            _ON_GPU,
            "in_place",
            128,
            tensorrt.KV_DTYPES,
        ),
        Target(
            "tensorrt-rtx",
            tensorrt_rtx.SUMMARY,
            _passes(tensorrt_rtx.LOWERING),
            ("static",),
            _ON_GPU,
            "in_place",
            128,
            tensorrt_rtx.KV_DTYPES,
        ),
    )
}
