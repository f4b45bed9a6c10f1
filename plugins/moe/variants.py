"""Which MoE kernels are compiled: types, tile sizes, and what differs from GPU to GPU. See README.md for the reasons.

Names, as launch.cpp asks for them: ``moe_gate_up_int4_bf16_m8`` (product, weights, compute type, class of tiles),
``moe_route_bf16_t64`` (with ``_fp8`` where rows are E4M3 codes), ``moe_place_bf16``, ``moe_choose``, ``moe_scan``,
``moe_quantize_bf16``, ``moe_sum_bf16``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from l4convert.plugins.library.variants import Constant, Tuning, Variant

#: Compute type in names and in Triton.
FLOATS = ("bf16", "fp16")
#: Weights in names to the kernel's WEIGHTS constant: l4_weights of launch.h.
WEIGHTS = {"plain": 0, "int4": 1, "fp8": 2}
#: Experts that the routing kernels have room for, and tokens of a routing block.
EXPERTS = 128
TOKENS = 64
# GPUs without warp-group matrix instructions: a tile's sums and both operands share the registers of its warps.
OLD_MMA = (80, 89, 120)


@dataclass(frozen=True)
class Tile:
    """How one product is cut: SPLIT slices of K of DEPTH, COLUMNS output columns, TILE rows; see kernels.py."""

    split: int
    columns: int
    rows: int
    depth: int
    warps: int
    stages: int
    together: int = 8
    old: tuple[int, int, int, int, int] | None = None  # columns, rows, depth, warps and stages on OLD_MMA

    @property
    def constants(self) -> dict[str, Constant]:
        """As the kernel names them."""
        return {
            "SPLIT": self.split,
            "COLUMNS": self.columns,
            "TILE": self.rows,
            "DEPTH": self.depth,
            "TOGETHER": self.together,
        }

    @property
    def per_sm(self) -> dict[int, Tuning]:
        """What differs on :data:`OLD_MMA`."""
        if self.old is None:
            return {}
        columns, rows, depth, warps, stages = self.old
        constants = {"COLUMNS": columns, "TILE": rows, "DEPTH": depth}
        return dict.fromkeys(OLD_MMA, Tuning(constants=constants, num_warps=warps, num_stages=stages))


@dataclass(frozen=True)
class Product:
    """The tiles of one weight type by the class in their name, for the first and the second product."""

    gate_up: Mapping[int, Tile] = field(default_factory=dict)
    down: Mapping[int, Tile] = field(default_factory=dict)


PRODUCTS = {
    "int4": Product(
        gate_up={
            8: Tile(4, 32, 8, 128, 4, 3, together=1),
            64: Tile(1, 64, 64, 128, 4, 3, old=(128, 64, 128, 8, 3)),
            128: Tile(1, 128, 128, 128, 8, 3, old=(128, 64, 128, 8, 3)),
        },
        down={
            8: Tile(8, 32, 8, 128, 8, 3, together=1),
            64: Tile(1, 128, 64, 128, 4, 3, old=(128, 64, 128, 8, 3)),
            128: Tile(1, 256, 128, 128, 8, 3, old=(128, 64, 128, 8, 3)),
        },
    ),
    "fp8": Product(
        gate_up={
            16: Tile(4, 32, 16, 128, 4, 3, together=1),
            128: Tile(1, 128, 128, 128, 8, 3, old=(128, 64, 128, 8, 3)),
        },
        down={
            16: Tile(8, 32, 16, 128, 8, 3, together=1),
            128: Tile(1, 256, 128, 128, 8, 3, old=(128, 64, 128, 8, 3)),
        },
    ),
    "plain": Product(
        gate_up={
            16: Tile(1, 64, 16, 64, 4, 4, together=1),
            128: Tile(1, 128, 128, 64, 8, 3, old=(128, 64, 32, 8, 4)),
        },
        down={
            16: Tile(1, 64, 16, 128, 4, 4, together=1),
            128: Tile(1, 256, 128, 64, 8, 3, old=(128, 64, 64, 8, 3)),
        },
    ),
}


def variants(head_dims: Sequence[int] = ()) -> tuple[Variant, ...]:
    """Every kernel of the op. ``head_dims`` is for attention and has no part in this."""
    made = [*_routing(), *_rows()]
    for weights, product in PRODUCTS.items():
        for compute in FLOATS:
            made += [_product("gate_up", weights, compute, rows, tile) for rows, tile in product.gate_up.items()]
            made += [_product("down", weights, compute, rows, tile) for rows, tile in product.down.items()]
    return tuple(made)


def _product(name: str, weights: str, compute: str, rows: int, tile: Tile) -> Variant:
    stored = {"plain": f"*{compute}", "int4": "*i32", "fp8": "*fp8e4nv"}[weights]
    pointers = {
        "tiles": "*i32",
        "inputs": "*fp8e4nv" if weights == "fp8" else f"*{compute}",
        "row_scale": "*fp32",
        "weight": stored,
        "weight_scale": f"*{compute}",
        "output": f"*{compute}",
        "targets": "*i32",
    }
    numbers = dict.fromkeys(("slots", "K", "columns", "block_shift", "above", "up_to"), "i32")
    return Variant(
        name=f"moe_{name}_{weights}_{compute}_m{rows}",
        kernel="moe_product",
        signature=pointers | numbers,
        constants={"WEIGHTS": WEIGHTS[weights], "GATED": name == "gate_up"} | tile.constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        divisible=frozenset({"K", "columns"}),
        least_sm=89 if weights == "fp8" else 80,
        per_sm=tile.per_sm,
    )


def _routing() -> list[Variant]:
    made = [
        Variant(
            name="moe_choose",
            kernel="moe_choose",
            signature={"logits": "*fp32", "choices": "*i32", "counts": "*i32"} | dict.fromkeys("TEK", "i32"),
            constants={"EXPERTS": EXPERTS, "TOKENS": TOKENS},
            num_warps=16,
        ),
        Variant(
            name="moe_scan",
            kernel="moe_scan",
            signature={"counts": "*i32", "tiles": "*i32"} | dict.fromkeys(("blocks", "slots", "tile"), "i32"),
            constants={"EXPERTS": EXPERTS, "CHUNK": 32},
            num_warps=8,
        ),
    ]
    for compute in FLOATS:
        for fp8 in (False, True):
            made += [_route(compute, fp8, tokens) for tokens in (8, TOKENS)]
            made.append(_place(compute, fp8))
    return made


def _written(compute: str, fp8: bool) -> dict[str, str]:
    return {"rows": "*fp8e4nv" if fp8 else f"*{compute}", "row_scale": "*fp32", "targets": "*i32"}


def _route(compute: str, fp8: bool, tokens: int) -> Variant:
    pointers = {"x": f"*{compute}", "logits": "*fp32"} | _written(compute, fp8) | {"tiles": "*i32"}
    return Variant(
        name=f"moe_route_{compute}{'_fp8' * fp8}_t{tokens}",
        kernel="moe_route",
        signature=pointers | dict.fromkeys(("T", "E", "H", "K", "slots", "tile"), "i32"),
        constants={"FP8": fp8, "EXPERTS": EXPERTS, "TOKENS": tokens, "BLOCK": 1024},
        num_warps=4 if tokens == 8 else 16,
        divisible=frozenset({"H"}),
        least_sm=89 if fp8 else 80,
    )


def _place(compute: str, fp8: bool) -> Variant:
    pointers = {"x": f"*{compute}", "logits": "*fp32", "choices": "*i32", "first": "*i32"} | _written(compute, fp8)
    return Variant(
        name=f"moe_place_{compute}{'_fp8' * fp8}",
        kernel="moe_place",
        signature=pointers | dict.fromkeys("TEHK", "i32"),
        constants={"FP8": fp8, "EXPERTS": EXPERTS, "TOKENS": TOKENS, "BLOCK": 1024},
        num_warps=4,
        divisible=frozenset({"H"}),
        least_sm=89 if fp8 else 80,
    )


def _rows() -> list[Variant]:
    made = []
    for compute in FLOATS:
        quantize = Variant(
            name=f"moe_quantize_{compute}",
            kernel="moe_quantize",
            signature={"values": f"*{compute}", "codes": "*fp8e4nv", "scales": "*fp32", "width": "i32"},
            constants={"BLOCK": 1024},
            divisible=frozenset({"width"}),
            least_sm=89,
        )
        total = Variant(
            name=f"moe_sum_{compute}",
            kernel="moe_sum",
            signature={"rows": f"*{compute}", "y": f"*{compute}", "H": "i32", "K": "i32"},
            constants={"BLOCK": 1024},
            divisible=frozenset({"H"}),
        )
        made += [quantize, total]
    return made
