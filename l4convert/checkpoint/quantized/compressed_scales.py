"""The scales of a compressed-tensors weight: how many there are is its scheme's ``strategy``."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from l4convert.checkpoint.fields import Fields
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.names import Shape
from l4convert.checkpoint.quantized.floats import Finite, PowersOfTwo, Repeated, row_scales
from l4convert.checkpoint.quantized.source import FLOAT_SCALES, Source, matrix
from l4convert.checkpoint.text import quote

_MAX_BLOCK = 1 << 20
_STRATEGIES = "supported: tensor, channel, group, block"


def read_scales(source: Source, weights: Fields, weight: str, exponents: bool = False) -> tuple[LazyTensor, int]:
    """The scales of a weight [N, K], stored under ``weight_scale``.

    Args:
        source: The tensors.
        weights: The scheme of weights.
        weight: Its name.
        exponents: They are stored as bytes of E8M0, as the MX formats have them.

    Returns:
        Scales [N, ceil(K / block size)], and the block size: elements along K that share one.

    Raises:
        InputError: A strategy that is unknown or does not fit, or scales of another shape or type.
    """
    rows, depth = matrix(source, weight)
    height, width = _block(weights, rows, depth)
    shapes = _shapes(rows, height, -(-depth // width))
    found = source.stored.get(f"{weight}_scale")
    shape = found.dims if found is not None and found.dims in shapes else shapes[0]
    stored = source.require(f"{weight}_scale", (ir.DataType.UINT8,) if exponents else FLOAT_SCALES, shape)
    scales = PowersOfTwo(stored) if exponents else Finite(stored)
    if width == depth and height in (1, rows):
        return row_scales(scales, (rows, depth)), depth
    return (scales if height == 1 else Repeated(scales, (rows, scales.dims[1]), height)), width


def strategy_of(weights: Fields) -> object:
    """``strategy``, or what the library takes where it is left out (``validate_model_after`` of QuantizationArgs)."""
    if weights.has("strategy"):
        return weights.get("strategy")
    if not weights.has("group_size"):
        return "tensor"
    return "channel" if weights.get("group_size") == -1 else "group"


def _block(weights: Fields, rows: int, depth: int) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    strategy = strategy_of(weights)
    whole: Mapping[object, tuple[int, int]] = {"tensor": (rows, depth), "channel": (1, depth)}
    if isinstance(strategy, str) and strategy in whole:
        return whole[strategy]
    if strategy == "block":
        return _block_structure(weights, depth)
    if strategy != "group":
        weights.fail("strategy", f"is {quote(strategy)}: not supported", _STRATEGIES)
    size = weights.integer("group_size")
    if depth % size:
        weights.fail("group_size", f"is {size}, which does not divide a row of {depth}")
    return 1, size


def _block_structure(weights: Fields, depth: int) -> tuple[int, int]:
    """[rows, columns]; early versions of the library wrote "128x128"."""
    given = weights.get("block_structure", None)
    parts = given.split("x") if isinstance(given, str) else given
    if not isinstance(parts, list) or len(parts) != 2:
        weights.fail("block_structure", f"is {quote(given)}, expected rows and columns of a block")
    sizes = [int(part) if isinstance(part, str) and part.isdecimal() and len(part) < 8 else part for part in parts]
    height, width = (
        weights.checked_integer(f"block_structure[{i}]", size, 1, _MAX_BLOCK) for i, size in enumerate(sizes)
    )
    return height, min(width, depth)


def _shapes(rows: int, height: int, blocks: int) -> tuple[Shape, ...]:
    """How scales may be stored, the usual way first; one scale, or one a row, may lack an axis."""
    grid = (-(-rows // height), blocks)
    shorter: Mapping[Shape, tuple[Shape, ...]] = {(1, 1): ((1,), (), grid), (rows, 1): (grid, (rows,))}
    return shorter.get(grid, (grid,))
