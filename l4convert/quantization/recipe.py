"""Recipes: which tensor is quantized how, as data.

A recipe is a TOML file with ``name``, ``description`` and ``[[rule]]`` tables. A rule has a ``pattern`` (shell-style,
on canonical tensor names; ``*`` also matches dots), a ``scheme`` and that scheme's options. The first rule that matches
decides; a tensor that no rule matches is left alone. A ``[kv_cache]`` table says how keys and values are stored:
``dtype`` and, where they differ from the defaults, ``granularity`` and ``layers`` (:mod:`l4convert.quantization.kv`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

from l4convert.errors import InputError, UsageError
from l4convert.quantization.int4 import BLOCK_SIZES, SCALE_RULES
from l4convert.quantization.kv import KvScheme, kv_scheme
from l4convert.toml_file import parse_toml, read_toml

MAX_PATTERN = 1000  # ten times the longest name
_RECIPE_KEYS = ("name", "description", "rule", "kv_cache")

# Scheme -> option -> values it may have in a file.
_OPTIONS: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "none": {},
    "int4": {"block_size": BLOCK_SIZES, "scale": SCALE_RULES, "whole_blocks": (False, True)},
    "fp8": {"activations": ("dynamic", "none")},
    "keep": {},
}

#: Value of ``Scheme.scale`` in a resolved recipe: codes and scales are the checkpoint's own.
STORED: Literal["stored"] = "stored"


@dataclass(frozen=True)
class Scheme:
    """How a tensor is stored.

    Attributes:
        kind: "none" as it is; "int4" 4-bit blocks; "fp8" E4M3 per output channel; "keep" as the checkpoint has it,
            which :func:`l4convert.quantization.carry_over.resolve` replaces by one of the others.
        block_size: int4: elements along K that share a scale.
        scale: int4: how a scale is chosen, see ``int4.int4_blocks``. :data:`STORED`, in resolved recipes only: codes
            and scales are the checkpoint's own.
        whole_blocks: int4: where ``block_size`` does not divide K, a smaller one that does takes its place.
        activations: fp8: the matmul's input is quantized too, with a scale for every token computed as it runs.
        exact_block: int4: the user asked for this block size, so another one will not do.
    """

    kind: Literal["none", "int4", "fp8", "keep"]
    block_size: int = 32
    scale: Literal["absmax", "lse", "stored"] = "lse"
    whole_blocks: bool = False
    activations: bool = False
    exact_block: bool = field(default=False, compare=False)

    def block_size_for(self, depth: int) -> int:
        """The block size of a weight of ``depth`` elements along K."""
        if not self.whole_blocks:
            return self.block_size
        fitting = [size for size in BLOCK_SIZES if size <= self.block_size and depth % size == 0]
        return max(fitting, default=self.block_size)

    def to_dict(self) -> dict[str, Any]:
        """The keys of a rule table, all options that do anything explicit."""
        whole = {"whole_blocks": True} if self.whole_blocks else {}
        stored = {"scale": self.scale} if self.scale == STORED else {}
        options: dict[str, dict[str, Any]] = {
            "none": {},
            "int4": {"block_size": self.block_size, "scale": self.scale, **whole},
            "fp8": {"activations": "dynamic" if self.activations else "none", **stored},
            "keep": {},
        }
        return {"scheme": self.kind, **options[self.kind]}


@dataclass(frozen=True)
class Rule:
    """Tensors whose canonical name matches ``pattern`` are stored by ``scheme``."""

    pattern: str
    scheme: Scheme

    def matches(self, tensor_name: str) -> bool:
        """Whether the name matches, in full and case-sensitively."""
        return fnmatchcase(tensor_name, self.pattern)


@dataclass(frozen=True)
class Recipe:
    """Rules in the order in which they are tried, and how the key/value caches are stored.

    Attributes:
        kv_cache: None: in the type that the graph computes in.
    """

    name: str
    rules: tuple[Rule, ...]
    description: str = ""
    kv_cache: KvScheme | None = None

    def rule_for(self, tensor_name: str) -> Rule | None:
        """The first rule that matches."""
        return next((rule for rule in self.rules if rule.matches(tensor_name)), None)

    def scheme_for(self, tensor_name: str) -> Scheme:
        """How the tensor is stored; "none" where no rule matches."""
        rule = self.rule_for(tensor_name)
        return rule.scheme if rule else Scheme("none")

    def to_dict(self) -> dict[str, Any]:
        """For the manifest; :func:`parse_recipe` reads it back, unless it was resolved."""
        rules = [{"pattern": rule.pattern, **rule.scheme.to_dict()} for rule in self.rules]
        kv_cache = {} if self.kv_cache is None else {"kv_cache": self.kv_cache.to_dict()}
        return {"name": self.name, "description": self.description, "rule": rules, **kv_cache}


def bundled_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the package, sorted."""
    return tuple(sorted(item.name.removesuffix(".toml") for item in _bundle().iterdir() if item.name.endswith(".toml")))


def load_recipe(name_or_path: str, block_size: int | None = None, usual_block_size: int | None = None) -> Recipe:
    """Read a bundled recipe by its name, or a file (a path that ends in ``.toml`` or has a folder in it).

    Args:
        name_or_path: Such as "int4" or "recipes/mine.toml".
        block_size: Replaces the block size of every INT4 rule.
        usual_block_size: Does so in bundled recipes, where ``block_size`` is not given, as far as blocks are whole.

    Raises:
        UsageError: No bundled recipe has this name; or ``block_size`` is not one of 32, 64 and 128, or the recipe has
            no INT4 rule.
        InputError: The file cannot be read or is not a recipe; the message names the file and the rule.
    """
    is_path = name_or_path.endswith(".toml") or Path(name_or_path).name != name_or_path
    recipe = _load_file(Path(name_or_path)) if is_path else _load_bundled(name_or_path)
    if block_size is None and not is_path and any(rule.scheme.kind == "int4" for rule in recipe.rules):
        return recipe if usual_block_size is None else _with_block_size(recipe, usual_block_size, whole_blocks=True)
    return recipe if block_size is None else _with_block_size(recipe, block_size)


def with_kv_cache(
    recipe: Recipe, dtype: str | None = None, granularity: str | None = None, layers: str | None = None
) -> Recipe:
    """The recipe with other words in its ``[kv_cache]`` table.

    Args:
        recipe: To start from.
        dtype: Its granularity becomes the usual one where the dtype changes and ``granularity`` is not given; "none":
            caches that are not quantized; None, here and below: as the recipe says.
        granularity: Of the scales.
        layers: Which layers.

    Raises:
        UsageError: An unknown word; or a granularity or layers of caches that are not quantized.
    """
    given = recipe.kv_cache
    dtype = dtype or (given.dtype if given else "none")
    if dtype == "none":
        if granularity or layers:
            raise UsageError(
                "--kv-granularity and --kv-layers say how caches are quantized, and they are not",
                "give --kv-dtype fp8, int8 or int4",
            )
        return replace(recipe, kv_cache=None)
    if given is not None:
        granularity = granularity or (given.granularity if given.dtype == dtype else None)
        layers = layers or given.layers
    try:
        return replace(recipe, kv_cache=kv_scheme(dtype, granularity, layers))
    except ValueError as error:
        raise UsageError(str(error)) from error


def parse_recipe(data: Mapping[str, Any], where: str) -> Recipe:
    """Check a recipe's data and build it.

    Args:
        data: As parsed from TOML or JSON.
        where: The file's name, for messages.

    Raises:
        InputError: Unknown or missing keys, wrong types or values.
    """
    _reject_unknown(data, _RECIPE_KEYS, where)
    name = _text(data, "name", where)
    description = _text(data, "description", where) if data.get("description", "") != "" else ""
    rules = data.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise InputError(f"{where}: 'rule' must be a list of tables", "write each rule under a [[rule]] heading")
    parsed = tuple(_parse_rule(rule, f"{where}: rule {index}") for index, rule in enumerate(rules, start=1))
    kv_cache = _parse_kv_cache(data["kv_cache"], f"{where}: kv_cache") if "kv_cache" in data else None
    return Recipe(name, parsed, description, kv_cache)


def unused_rules(recipe: Recipe, names: Iterable[str]) -> tuple[Rule, ...]:
    """Rules that decide for none of the tensors: they match nothing, or an earlier rule takes all they match."""
    used = {recipe.rule_for(name) for name in names}
    return tuple(rule for rule in recipe.rules if rule not in used)


def _bundle() -> Any:
    return resources.files("l4convert.quantization").joinpath("recipes")


def _load_bundled(name: str) -> Recipe:
    names = bundled_recipes()
    if name not in names:
        raise UsageError(
            f"there is no recipe {name!r}; there are {', '.join(names)}",
            "give one of them, or the path of a .toml file",
        )
    where = f"recipe {name}"
    recipe = parse_recipe(parse_toml(_bundle().joinpath(f"{name}.toml").read_bytes(), where), where)
    # Its block sizes are what is usual, and nobody asked for them.
    return replace(recipe, rules=tuple(_with_scheme(rule, exact_block=False) for rule in recipe.rules))


def _load_file(path: Path) -> Recipe:
    return parse_recipe(read_toml(path), str(path))


def _parse_rule(rule: Mapping[str, Any], where: str) -> Rule:
    pattern, kind = _text(rule, "pattern", where), _text(rule, "scheme", where)
    if len(pattern) > MAX_PATTERN:
        raise InputError(f"{where}: a pattern of {len(pattern):,} characters", f"at most {MAX_PATTERN:,}")
    if kind not in _OPTIONS:
        raise InputError(f"{where}: unknown scheme {kind!r}", f"one of {', '.join(_OPTIONS)}")
    allowed = _OPTIONS[kind]
    _reject_unknown(rule, ("pattern", "scheme", *allowed), where)
    for option, values in allowed.items():
        given = rule.get(option, values[0])
        if not any(type(given) is type(value) and given == value for value in values):
            raise InputError(f"{where}: {option} = {given!r} is not possible", f"one of {', '.join(map(str, values))}")
    fields = {option: rule[option] for option in allowed if option in rule}
    if "activations" in fields:
        fields["activations"] = fields["activations"] == "dynamic"
    asked = "block_size" in fields
    return Rule(pattern, Scheme(cast("Literal['none', 'int4', 'fp8', 'keep']", kind), **fields, exact_block=asked))


def _parse_kv_cache(table: Any, where: str) -> KvScheme:
    if not isinstance(table, dict):
        raise InputError(f"{where} must be a table", "write its keys under a [kv_cache] heading")
    _reject_unknown(table, ("dtype", "granularity", "layers"), where)
    given = {key: _text(table, key, where) for key in ("dtype", *(table.keys() - {"dtype"}))}
    try:
        return kv_scheme(**given)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _reject_unknown(data: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = tuple(known)
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}", f"possible here: {', '.join(known)}")


def _text(data: Mapping[str, Any], key: str, where: str) -> str:
    value = data.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(
            f"{where}: {key!r} must be a text that is not empty" if key in data else f"{where}: no {key!r}"
        )
    return value


def _with_block_size(recipe: Recipe, block_size: int, whole_blocks: bool = False) -> Recipe:
    if block_size not in BLOCK_SIZES:
        raise UsageError(f"block size {block_size} is not possible", f"one of {', '.join(map(str, BLOCK_SIZES))}")
    if not any(rule.scheme.kind == "int4" for rule in recipe.rules):
        raise UsageError(f"recipe {recipe.name} has no int4 rule, so it takes no block size", "leave --block-size out")
    changes: dict[str, Any] = {"block_size": block_size}
    changes |= {"whole_blocks": True} if whole_blocks else {"exact_block": True}
    rules = (_with_scheme(rule, **changes) if rule.scheme.kind == "int4" else rule for rule in recipe.rules)
    return replace(recipe, rules=tuple(rules))


def _with_scheme(rule: Rule, **changes: Any) -> Rule:
    return replace(rule, scheme=replace(rule.scheme, **changes))
