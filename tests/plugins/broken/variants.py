"""The table of kernels that the build must refuse; the "head dim" chooses one."""

from __future__ import annotations

from collections.abc import Sequence

from l4convert.plugins.library.variants import Variant

ONE = {"x": "*bf16"}
BROKEN = {
    16: Variant("undefined", "undefined", ONE, {"COUNT": 16}),
    32: Variant("described", "described", ONE, {"COUNT": 32}),
    64: Variant("large", "large", {"x": "*bf16", "y": "*bf16"}, {"COUNT": 256}, num_warps=8, num_stages=4),
    128: Variant("misnamed", "undefined", {"z": "*bf16"}, {"COUNT": 16}),
}


def variants(head_dims: Sequence[int]) -> tuple[Variant, ...]:
    """One broken kernel a head dim."""
    return tuple(BROKEN[size] for size in head_dims)
