"""Checkpoints of compressed-tensors, which llm-compressor writes: ``quant_method: compressed-tensors``.

``config_groups`` say which modules have which scheme (compressed_tensors/quantization/quant_config.py); a module is
quantized where the checkpoint has scales for its weight. Groups of experts are always stored one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from l4convert.checkpoint.fields import Fields
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.quantized.compressed_floats import read_fp8, read_mxfp4, read_nvfp4, rounds_per_token
from l4convert.checkpoint.quantized.compressed_integers import SUPPORTED, read_bytes, read_packed
from l4convert.checkpoint.quantized.patterns import Patterns, UnusablePatternError
from l4convert.checkpoint.quantized.source import ReadWeights, Source, summary, where
from l4convert.checkpoint.quantized.unused import take_unused
from l4convert.checkpoint.text import quote, show
from l4convert.errors import InputError

NAME = "compressed-tensors"
MAX_GROUPS = 64
# A module that has one of these is quantized.
MARKS = ("weight_packed", "weight_scale")


@dataclass(frozen=True)
class Scheme:
    """One of ``config_groups``.

    Attributes:
        format: How weights are stored.
        weights: The scheme of weights (compressed_tensors/quantization/quant_args.py).
        per_token: Activations are rounded to FP8, token by token.
    """

    format: str
    weights: Fields
    per_token: bool


class Schemes:
    """Which module has which scheme, as the library's ``apply_quantization_config`` decides.

    Args:
        config: ``quantization_config``.

    Raises:
        InputError: A group that cannot be used; names the key.
    """

    def __init__(self, config: Fields) -> None:
        self._config = config
        self._ignored = _patterns(config, "ignore", config.texts("ignore"))
        self._schemes = {target: scheme for group in _groups(config) for target, scheme in _targets(group, config)}
        self._targets = _patterns(config, "config_groups.*.targets", self._schemes)

    def of(self, module: str, kinds: Collection[str]) -> Scheme:
        """The scheme of a module, by its name in the checkpoint and its classes."""
        try:
            if self._ignored.match(module, kinds):
                self._config.fail("ignore", f"names '{show(module)}', which the checkpoint has quantized all the same")
            target = self._targets.find(module, kinds)
        except UnusablePatternError as error:
            self._config.fail("config_groups", f"or ignore has {error}")
        if target is None:
            self._config.fail("config_groups", f"has no scheme for '{show(module)}', which is quantized")
        return self._schemes[target]


def read(source: Source) -> ReadWeights:
    """The weights that the checkpoint stores quantized; the others stay in ``source.stored``."""
    config = source.config
    _refuse_others(config)
    schemes = Schemes(config)
    tensors: dict[str, LazyTensor] = {}
    for weight in source.expected:
        module = weight.removesuffix(".weight")
        if not any(f"{module}.{mark}" in source.stored for mark in MARKS):
            continue
        scheme = schemes.of(source.layout.stored(module), kinds(weight))
        tensors[weight] = FORMATS[scheme.format](source, scheme, weight)
        if (plain := source.stored.get(weight)) is not None:
            raise InputError(f"{where(plain)} is there both quantized and not", "one of the two is left over")
    return ReadWeights(tensors, summary(NAME, tensors, source.expected) + take_unused(source))


def _one_a_byte(source: Source, scheme: Scheme, weight: str) -> LazyTensor:
    """A code an element: what the three formats have in common, whatever they are called."""
    if scheme.weights.get("type", "int") == "int":
        return read_bytes(source, scheme.weights, weight)
    return read_fp8(source, scheme.weights, weight, scheme.per_token)


# How the weights of a group are stored -> what reads one.
FORMATS: Mapping[str, Callable[[Source, Scheme, str], LazyTensor]] = {
    "pack-quantized": lambda source, scheme, weight: read_packed(source, scheme.weights, weight),
    "int-quantized": _one_a_byte,
    "float-quantized": _one_a_byte,
    "naive-quantized": _one_a_byte,
    "mxfp8-quantized": lambda source, scheme, weight: read_fp8(source, scheme.weights, weight, False, exponents=True),
    "nvfp4-pack-quantized": lambda source, scheme, weight: read_nvfp4(source, scheme.weights, weight),
    "mxfp4-pack-quantized": lambda source, scheme, weight: read_mxfp4(source, scheme.weights, weight),
}


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


def _groups(config: Fields) -> Iterator[Fields]:
    """The groups that are about weights: those of activations and caches alone leave weights as they are."""
    groups = config.object("config_groups")
    if groups is None or not (groups.values or config.has("kv_cache_scheme")):
        config.fail("config_groups", "is missing or empty", SUPPORTED)
    if len(groups.values) > MAX_GROUPS:
        config.fail("config_groups", f"has {len(groups.values)} entries, more than {MAX_GROUPS}")
    for name in groups.values:
        group = groups.object(name)
        if group is None:
            config.fail("config_groups", "has an entry that is null")
        if group.has("weights"):
            yield group


def _targets(group: Fields, config: Fields) -> Iterator[tuple[str, Scheme]]:
    """Each target of a group with its scheme."""
    weights = group.object("weights")
    assert weights is not None
    holder = group if group.has("format") else config
    name = holder.get("format")
    if not isinstance(name, str) or name not in FORMATS:
        holder.fail("format", f"is {quote(name)}: that cannot be read", f"supported: {', '.join(FORMATS)}")
    scheme = Scheme(name, weights, rounds_per_token(group.object("input_activations")))
    return ((target, scheme) for target in group.texts("targets"))


def _patterns(fields: Fields, key: str, patterns: Iterable[str]) -> Patterns:
    try:
        return Patterns(patterns)
    except UnusablePatternError as error:
        fields.fail(key, f"has {error}")


def kinds(weight: str) -> tuple[str, ...]:
    """The class of a weight's module in transformers, and what it derives from."""
    if weight.endswith("embed_tokens.weight"):
        return ("Embedding",)
    return ("Llama4Router", "Linear") if weight.endswith("router.weight") else ("Linear",)
