"""What is compiled: one :class:`Variant` a kernel with fixed types and tile sizes, gathered from the ops' tables.

An op's table is ``variants(head_dims)`` in its ``variants.py``, importable without Triton; its kernels are the
``@triton.jit`` functions of its ``kernels.py``.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

Constant = int | float | bool | str

# What a library is built for when nothing else is asked: A100, RTX 40 and L40, H100, B200, RTX 50.
DEFAULT_SMS = (80, 89, 90, 100, 120)
DEFAULT_HEAD_DIMS = (128,)
# The types that activations may have (in this order: see Variant.compute).
COMPUTES = ("bf16", "fp16")
# Compute capabilities that the ptxas of Triton 3.6 has an architecture for, from A100 on.
KNOWN_SMS = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
# The ops that have kernels, and their packages.
OPS: Mapping[str, str] = {
    "moe": "l4convert.plugins.moe",
    "long_context_attention": "l4convert.plugins.long_context_attention",
}
# Shared memory that one block may have, in bytes (CUDA C++ Programming Guide, table "Technical Specifications per
# Compute Capability"), and the tuned relative whose choices fit an SM that has none of its own.
SHARED_LIMIT = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448}
SHARED_LIMIT |= {110: 232448, 120: 101376, 121: 101376}
RELATIVE = {86: 89, 87: 80, 103: 100, 110: 100, 121: 120}


@dataclass(frozen=True)
class Tuning:
    """What differs on one SM: constants are merged over the variant's, None keeps the variant's number."""

    constants: Mapping[str, Constant] = field(default_factory=dict)
    num_warps: int | None = None
    num_stages: int | None = None
    max_registers: int | None = None


@dataclass(frozen=True)
class Variant:
    """One kernel with everything fixed that the compiler is to know.

    Args:
        name: What the launch code asks for: ``moe_gate_up_int4_bf16_m16``. Unique in the library.
        kernel: Name of the ``@triton.jit`` function in the op's ``kernels.py``.
        signature: Parameter to Triton type (``"*bf16"``, ``"*u8"``, ``"*fp8e4nv"``, ``"i32"``, ``"i64"``, ``"fp32"``),
            in the kernel's order, constexpr parameters left out.
        constants: The ``tl.constexpr`` parameters. Integers and bools of them can be read by the launch code
            (``Launcher::constant``), so that grids follow the tiles.
        num_warps: Warps of a block.
        num_stages: Depth of the software pipeline.
        divisible: Integer parameters that are always multiples of 16. Pointers always are.
        least_sm: The oldest SM it can be compiled for.
        per_sm: What is different on some SMs. An SM without an entry takes that of its relative
            (:data:`RELATIVE`), if there is one.
        max_registers: Registers a thread may have (ptxas -maxrregcount); None lets the compiler choose.
    """

    name: str
    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, Constant]
    num_warps: int = 4
    num_stages: int = 2
    divisible: frozenset[str] = frozenset()
    least_sm: int = 80
    per_sm: Mapping[int, Tuning] = field(default_factory=dict)
    max_registers: int | None = None

    @property
    def compute(self) -> str | None:
        """The type of its activations; None where it touches none.

        Kernels for bfloat16 may keep codes of quantized caches as float16 numbers on their way; never the other way.
        """
        return next((compute for compute in COMPUTES if f"*{compute}" in self.signature.values()), None)

    def at(self, sm: int) -> Variant:
        """The variant as it is compiled for one SM: nothing left that depends on it."""
        tuning = self.per_sm.get(sm) or self.per_sm.get(RELATIVE.get(sm, sm)) or Tuning()
        return replace(
            self,
            constants={**self.constants, **tuning.constants},
            num_warps=tuning.num_warps or self.num_warps,
            num_stages=tuning.num_stages or self.num_stages,
            max_registers=tuning.max_registers or self.max_registers,
            per_sm={},
        )


def gather(
    head_dims: Sequence[int] = DEFAULT_HEAD_DIMS, ops: Mapping[str, str] = OPS, computes: Sequence[str] = COMPUTES
) -> dict[str, tuple[Variant, ...]]:
    """Every op's variants, by the op's key in ``ops``.

    Args:
        head_dims: Head dimensions of the attention kernels.
        ops: The ops and their packages.
        computes: Types of activations, of :data:`COMPUTES`; kernels that touch none of them are always there.
    """
    found = {
        op: tuple(
            variant
            for variant in importlib.import_module(f"{package}.variants").variants(head_dims=tuple(head_dims))
            if variant.compute is None or variant.compute in computes
        )
        for op, package in ops.items()
    }
    names = Counter(variant.name for variants in found.values() for variant in variants)
    twice = [name for name, count in names.items() if count > 1]
    assert not twice, f"variants must have different names: {twice}"
    return found
