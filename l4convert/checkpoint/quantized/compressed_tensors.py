"""Checkpoints of compressed-tensors, which llm-compressor writes: ``quant_method: compressed-tensors``.

``config_groups`` say which modules have which scheme (compressed_tensors/quantization/quant_config.py); a module is
quantized where the checkpoint has scales for its weight. Groups of experts are always stored one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from l4convert.checkpoint.fields import Fields
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.prequantized import Prequantized
from l4convert.checkpoint.quantized.compressed_floats import read_fp8, read_nvfp4, rounds_per_token
from l4convert.checkpoint.quantized.packed import PACKED_TYPES, Unpacked, UnpackedRows
from l4convert.checkpoint.quantized.patterns import Patterns, UnusablePatternError
from l4convert.checkpoint.quantized.source import FLOAT_SCALES, ReadWeights, Source, checked, matrix, summary, where
from l4convert.checkpoint.quantized.unused import take_unused
from l4convert.checkpoint.text import quote, show
from l4convert.errors import InputError

NAME = "compressed-tensors"
MAX_GROUPS = 64
# A module that has one of these is quantized.
MARKS = ("weight_packed", "weight_scale")
SUPPORTED = "supported: 4-bit and 8-bit integers in groups or channels (pack-quantized), FP8 and NVFP4"


@dataclass(frozen=True)
class Scheme:
    """One of ``config_groups``.

    Attributes:
        format: How weights are stored.
        weights: The scheme of weights (compressed_tensors/quantization/quant_args.py).
        targets: The modules that it is for.
        per_token: Activations are rounded to FP8, token by token.
    """

    format: str
    weights: Fields
    targets: Patterns
    per_token: bool


def read(source: Source) -> ReadWeights:
    """The weights that the checkpoint stores quantized; the others stay in ``source.stored``."""
    config = source.config
    _refuse_others(config)
    schemes, ignored = _schemes(config), _patterns(config, "ignore")
    tensors: dict[str, LazyTensor] = {}
    for weight in source.expected:
        module = weight.removesuffix(".weight")
        if not any(f"{module}.{mark}" in source.stored for mark in MARKS):
            continue
        scheme = _scheme_of(source.layout.stored(module), schemes, ignored, config)
        tensors[weight] = FORMATS[scheme.format](source, scheme, weight)
        if (plain := source.stored.get(weight)) is not None:
            raise InputError(f"{where(plain)} is there both quantized and not", "one of the two is left over")
    return ReadWeights(tensors, summary(NAME, tensors, source.expected) + take_unused(source))


def read_packed(source: Source, scheme: Scheme, weight: str) -> LazyTensor:
    """A weight [N, K] of format ``pack-quantized``: ``weight_packed``, ``weight_scale``, ``weight_shape``, perhaps
    ``weight_zero_point`` and ``weight_g_idx``."""
    rows, depth = matrix(source, weight)
    bits, block_size = _integers(scheme.weights, depth)
    blocks = -(-depth // block_size)
    words = source.require(f"{weight}_packed", (ir.DataType.INT32,), (rows, -(-depth * bits // 32)))
    scales = source.require(f"{weight}_scale", FLOAT_SCALES, (rows, blocks))
    shape = source.require(f"{weight}_shape", (ir.DataType.INT64, ir.DataType.INT32), (2,))
    # A read for each of thousands of modules, but safetensors puts all tensors of 8-byte elements side by side.
    if (given := tuple(shape.numpy().tolist())) != (rows, depth):
        raise InputError(f"{where(shape)} is {list(given)}, config.json makes the weight {[rows, depth]}")
    zero_points = None
    if not scheme.weights.boolean("symmetric", True):
        zero_points = _zero_points(source, weight, bits, rows, blocks)
    groups = source.take(f"{weight}_g_idx")
    if groups is not None:
        checked(groups, (ir.DataType.INT32,), (depth,))
    return Prequantized(Unpacked(words, bits, depth), scales, block_size, zero_points, groups)


# How the weights of a group are stored -> what reads one.
FORMATS: Mapping[str, Callable[[Source, Scheme, str], LazyTensor]] = {
    "pack-quantized": read_packed,
    "float-quantized": lambda source, scheme, weight: read_fp8(source, scheme.weights, weight, scheme.per_token),
    "nvfp4-pack-quantized": lambda source, scheme, weight: read_nvfp4(source, scheme.weights, weight),
}


def _zero_points(source: Source, weight: str, bits: int, rows: int, blocks: int) -> LazyTensor:
    """Packed along the rows, or one a byte as early versions wrote them."""
    name = f"{weight}_zero_point"
    stored = source.stored.get(name)
    if stored is not None and stored.dtype == ir.DataType.INT8:
        return source.require(name, (ir.DataType.INT8,), (rows, blocks))
    words = source.require(name, (ir.DataType.INT32,), (-(-rows * bits // 32), blocks))
    return UnpackedRows(words, bits, rows)


def _integers(weights: Fields, depth: int) -> tuple[int, int]:
    """Bits, and how many elements along K share a scale."""
    bits = weights.integer("num_bits", 8)
    if bits not in PACKED_TYPES or weights.get("type", "int") != "int":
        weights.fail("num_bits", f"is {bits} of type {quote(weights.get('type', 'int'))}: not supported", SUPPORTED)
    strategy = weights.get("strategy")
    if strategy == "channel":
        return bits, depth
    if strategy != "group":
        weights.fail("strategy", f"is {quote(strategy)}: not supported for packed integers", SUPPORTED)
    size = weights.integer("group_size")
    if depth % size:
        weights.fail("group_size", f"is {size}, which does not divide a row of {depth}")
    return bits, size


def _refuse_others(config: Fields) -> None:
    """Refuse what changes the weights' meaning and is not understood here."""
    status = config.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        config.fail("quantization_status", f"is {quote(status)}: only compressed checkpoints can be read")
    sparsity = config.object("sparsity_config")
    if sparsity is not None and sparsity.values and sparsity.get("format", "dense") != "dense":
        sparsity.fail("format", f"is {quote(sparsity.get('format'))}: sparse weights are not supported")
    transforms = config.object("transform_config")
    if transforms is not None and transforms.values.get("config_groups"):
        transforms.fail("config_groups", "asks for transforms of activations, which are not supported")


def _schemes(config: Fields) -> tuple[Scheme, ...]:
    groups = config.object("config_groups")
    if groups is None or not groups.values:
        config.fail("config_groups", "is missing or empty", SUPPORTED)
    if len(groups.values) > MAX_GROUPS:
        config.fail("config_groups", f"has {len(groups.values)} entries, more than {MAX_GROUPS}")
    return tuple(_scheme(groups.object(name), config) for name in groups.values)


def _scheme(group: Fields | None, config: Fields) -> Scheme:
    if group is None:
        config.fail("config_groups", "has an entry that is null")
    weights = group.object("weights")
    if weights is None:
        group.fail("weights", "is missing: only quantized weights can be read", SUPPORTED)
    holder = group if group.has("format") else config
    name = holder.get("format")
    if not isinstance(name, str) or name not in FORMATS:
        holder.fail("format", f"is {quote(name)}: that cannot be read", f"supported: {', '.join(FORMATS)}")
    return Scheme(name, weights, _patterns(group, "targets"), rounds_per_token(group.object("input_activations")))


def _patterns(fields: Fields, key: str) -> Patterns:
    try:
        return Patterns(fields.texts(key))
    except UnusablePatternError as error:
        fields.fail(key, f"has {error}")


def _scheme_of(module: str, schemes: tuple[Scheme, ...], ignored: Patterns, config: Fields) -> Scheme:
    """The first scheme for a module; patterns name modules as the checkpoint does."""
    try:
        if ignored.match(module):
            config.fail("ignore", f"names '{show(module)}', which the checkpoint has quantized all the same")
        found = next((scheme for scheme in schemes if scheme.targets.match(module)), None)
    except UnusablePatternError as error:
        config.fail("config_groups", f"or ignore has {error}")
    if found is None:
        config.fail("config_groups", f"has no scheme for '{show(module)}', which is quantized")
    return found
