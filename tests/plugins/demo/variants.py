"""The table of the demonstration kernel: two tile sizes, one of them different on SM 90, one for newer SMs only."""

from __future__ import annotations

from collections.abc import Sequence

from l4convert.plugins.library.variants import Tuning, Variant

SIGNATURE = {
    "x": "*bf16",
    "codes": "*i8",
    "scales": "*fp32",
    "y": "*bf16",
    "rows": "i32",
    "depth": "i32",
    "bias": "fp32",
}


def variants(head_dims: Sequence[int]) -> tuple[Variant, ...]:
    """One variant for every "head dim", which is the columns of a tile here."""
    return tuple(
        Variant(
            name=f"demo_c{columns}",
            kernel="scaled_product",
            signature=SIGNATURE,
            constants={"ROWS": 16, "COLUMNS": columns, "DEPTH": 32},
            divisible=frozenset({"depth"}),
            least_sm=89 if columns == 64 else 80,
            per_sm={90: Tuning(constants={"DEPTH": 64}, num_stages=3)},
        )
        for columns in head_dims
    )
