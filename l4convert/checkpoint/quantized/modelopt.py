"""Checkpoints that NVIDIA's ModelOpt exports for Hugging Face: FP8 and NVFP4.

What they hold is in ``hf_quant_config.json`` and, since ModelOpt 0.29, in config.json too, under other names. Experts
stay stacked and keep the axes of the weight that they replace, [E, K, N] (modelopt/torch/export/unified_export_hf.py);
their scales are called after the projection: ``gate_up_proj_weight_scale``. A weight in FP8 is ``codes *
weight_scale``; one in NVFP4 ``codes * (weight_scale * weight_scale_2)``, the scales of 16 elements along K being E4M3.

``input_scale`` is for activations that are rounded with scales found beforehand, ``k_scale`` and ``v_scale`` are for a
quantized cache. Both are read past: here activations are rounded token by token as they come, and scales of caches are
found by calibration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import translate

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.combiners import transposed
from l4convert.checkpoint.fields import Fields
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.names import Shape
from l4convert.checkpoint.prequantized import Prequantized
from l4convert.checkpoint.quantized.floats import NVFP4_BLOCK, Finite, Nested, e4m3_weight, nvfp4_weight
from l4convert.checkpoint.quantized.source import FLOAT_SCALES, ReadWeights, Source, summary, where
from l4convert.checkpoint.quantized.unused import take_unused
from l4convert.checkpoint.text import quote, show
from l4convert.errors import InputError

NAME = "modelopt"

E4M3, E2M1_PAIRS = ir.DataType.FLOAT8E4M3FN, ir.DataType.UINT8


@dataclass(frozen=True)
class Algorithm:
    """What a ``quant_algo`` says.

    Attributes:
        dtypes: How a weight may be stored.
        per_token: Activations are rounded to FP8 with scales found token by token.
    """

    dtypes: tuple[ir.DataType, ...]
    per_token: bool = False


ALGORITHMS: Mapping[str, Algorithm] = {
    "FP8": Algorithm((E4M3,)),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm((E4M3,), per_token=True),
    "NVFP4": Algorithm((E2M1_PAIRS,)),
    "W4A16_NVFP4": Algorithm((E2M1_PAIRS,)),
    "MIXED_PRECISION": Algorithm((E4M3, E2M1_PAIRS)),
}
# Of all patterns together. Matching takes time that grows with their length, but no faster: Python compiles ``*`` to a
# group that is not entered again.
MAX_CHARACTERS = 10_000


def read(source: Source) -> ReadWeights:
    """The weights that the checkpoint stores quantized; the others stay in ``source.stored``."""
    config = source.config.object("quantization") or source.config
    algorithm = _algorithm(config)
    excluded = _Excluded(config)
    tensors: dict[str, LazyTensor] = {}
    for weight, shape in source.expected.items():
        scale = _side(weight, "weight_scale")
        if scale not in source.stored:
            continue
        source.require_axes(weight, scale)
        excluded.refuse(source.layout.stored(weight.removesuffix(".weight")))
        tensors[weight] = _weight(source, weight, shape, algorithm)
    return ReadWeights(tensors, summary(NAME, tensors, source.expected) + take_unused(source))


def _weight(source: Source, weight: str, shape: Shape, algorithm: Algorithm) -> LazyTensor:
    """A weight as it is expected: [N, K] of a linear layer, [E, K, N] of stacked experts."""
    stacked = len(shape) == 3
    found = source.stored.get(weight)
    halves = 2 if found is not None and found.dtype == E2M1_PAIRS else 1
    *lead, rows, width = shape
    stored_shape = (*lead, rows // halves, width) if stacked else (*lead, rows, width // halves)
    codes = source.require(weight, algorithm.dtypes, stored_shape)
    if (rows if stacked else width) % (NVFP4_BLOCK if halves == 2 else 1):
        raise InputError(f"{where(codes)}: NVFP4 blocks of {NVFP4_BLOCK} do not divide its rows")
    if halves == 2:
        result = _nvfp4(source, weight, codes, stacked)
    else:
        result = _fp8(source, weight, codes, stacked, algorithm.per_token)
    return transposed(result) if stacked else result


def _fp8(source: Source, weight: str, codes: LazyTensor, stacked: bool, per_token: bool) -> Prequantized:
    k_last = transposed(codes) if stacked else codes
    scales = source.stored[_side(weight, "weight_scale")]
    per_row = (k_last.dims[0],)  # of experts: one a matrix
    shape = scales.dims if scales.dims in ((), (1,), per_row) else ()
    return e4m3_weight(k_last, source.require(_side(weight, "weight_scale"), FLOAT_SCALES, shape), per_token)


def _nvfp4(source: Source, weight: str, codes: LazyTensor, stacked: bool) -> Prequantized:
    *lead, rows, width = codes.dims
    whole = source.require(_side(weight, "weight_scale_2"), (ir.DataType.FLOAT,), ())
    each = NVFP4_BLOCK // 2  # bytes of a block
    shape = (*lead, rows // each, width) if stacked else (*lead, rows, width // each)
    blocks: LazyTensor = Finite(source.require(_side(weight, "weight_scale"), (E4M3,), shape))
    if stacked:
        codes, blocks = transposed(codes), transposed(blocks)
    return nvfp4_weight(codes, Nested(blocks, Finite(whole), np.multiply))


def _side(weight: str, name: str) -> str:
    """What is stored beside a weight: ``q_proj.weight_scale``, but ``experts.down_proj_weight_scale``."""
    stem = weight.removesuffix(".weight")
    return f"{stem}.{name}" if stem != weight else f"{weight}_{name}"


def _algorithm(config: Fields) -> Algorithm:
    name = config.get("quant_algo")
    algorithm = ALGORITHMS.get(name) if isinstance(name, str) else None
    if algorithm is None:
        known = ", ".join(ALGORITHMS)
        config.fail("quant_algo", f"is {quote(name)}: that cannot be read", f"supported: {known}")
    return algorithm


class _Excluded:
    """``exclude_modules`` (``ignore`` in config.json): names, or shell-style patterns."""

    def __init__(self, config: Fields) -> None:
        self._config = config
        self._key = "exclude_modules" if config.has("exclude_modules") else "ignore"
        given = config.texts(self._key)
        patterns = [item for item in given if set(item) & set("*?[")]
        total = sum(map(len, patterns))
        if total > MAX_CHARACTERS:
            config.fail(self._key, f"has patterns of {total:,} characters in all, more than {MAX_CHARACTERS:,}")
        self._names = frozenset(given) - frozenset(patterns)
        self._pattern = re.compile("|".join(map(translate, patterns)) or "(?!)")

    def refuse(self, module: str) -> None:
        """Refuse a module that is listed, but stored quantized all the same."""
        if module in self._names or self._pattern.match(module):
            self._config.fail(self._key, f"names '{show(module)}', which the checkpoint has quantized all the same")
