"""What an artifact must keep to be called good: thresholds from a TOML file, with defaults per recipe.

The files in ``policies/`` are the defaults, and the examples to write one's own from.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from l4convert.errors import InputError
from l4convert.parity.metrics import Metrics
from l4convert.quantization.kv import KvScheme
from l4convert.quantization.recipe import STORED
from l4convert.toml_file import parse_toml, toml_bytes

SCHEMA = "l4convert.policy/1"


@dataclass(frozen=True)
class Thresholds:
    """Limits on :class:`~l4convert.parity.metrics.Metrics`; None: no limit. All are inclusive.

    Attributes:
        min_tokens: So many tokens must be compared, or the other numbers mean little.
    """

    max_abs_logit: float | None = None
    max_rel_logit: float | None = None
    mean_kl: float | None = None
    p99_kl: float | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    max_ppl_ratio: float | None = None
    min_tokens: float | None = None

    def broken_by(self, metrics: Metrics, only: frozenset[str] | None = None) -> tuple[str, ...]:
        """One line for each limit that does not hold; a measure that is NaN holds none.

        Args:
            metrics: The measured values.
            only: Look at these limits only.
        """
        found = []
        for field in fields(self):
            limit = getattr(self, field.name)
            if limit is None or (only is not None and field.name not in only):
                continue
            measure, at_least = _MEASURES[field.name]
            value = getattr(metrics, measure)
            if not (value >= limit if at_least else value <= limit):
                found.append(
                    f"{measure} is {value:.6g}, the policy wants at {'least' if at_least else 'most'} {limit:g}"
                )
        return tuple(found)


# Threshold -> the measure it limits, and whether from below.
_MEASURES: Mapping[str, tuple[str, bool]] = {
    "max_abs_logit": ("max_abs_logit", False),
    "max_rel_logit": ("max_rel_logit", False),
    "mean_kl": ("mean_kl", False),
    "p99_kl": ("p99_kl", False),
    "max_kl": ("max_kl", False),
    "min_top1": ("top1", True),
    "max_ppl_ratio": ("ppl_ratio", False),
    "min_tokens": ("tokens", True),
}

# The measures that mean something on a part of the text: the others are averages and quantiles, which on a few hundred
# tokens say more about those tokens than about the artifact.
ELEMENTWISE = frozenset({"max_abs_logit", "max_rel_logit"})


# Schemes by how much they lose; each is also the name of a bundled recipe and its policy.
_COARSEST_FIRST = ("int4", "fp8")


@dataclass(frozen=True)
class Policy:
    """Thresholds with a name.

    Attributes:
        reference: The artifact against the reference: all of them on the whole text, those of ``ELEMENTWISE`` on every
            way of feeding it.
        drift: Every other way of feeding the text against the artifact's own single call. It is zero but for rounding,
            however coarse the weights are, so it finds cache and position errors that quantization would hide.
    """

    name: str
    reference: Thresholds
    drift: Thresholds


def default_policy(
    recipe: str, schemes: Collection[str], target: str, compute: str = "float32", kv: KvScheme | None = None
) -> Policy:
    """The bundled policy of a recipe; for one of the user's own, that of the coarsest scheme in it.

    Args:
        recipe: The recipe's name.
        schemes: The schemes that its rules name.
        target: The artifact's target, which may have limits of its own.
        compute: The type that it computes in, likewise.
        kv: How its caches are quantized, likewise.
    """
    folder = resources.files("l4convert.parity").joinpath("policies")
    known = {entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")}
    named = recipe in known and STORED not in schemes  # what was carried over is no coarser than the reference
    name = recipe if named else next((s for s in _COARSEST_FIRST if s in schemes), "none")
    text = folder.joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return parse_policy(text, target, compute, kv, name=f"default for {name}", where=f"{name}.toml")


def load_policy(file: Path, target: str, compute: str = "float32", kv: KvScheme | None = None) -> Policy:
    """Read a policy file for artifacts of ``target`` that compute in ``compute`` and quantize their caches by ``kv``.

    Raises:
        InputError: It cannot be read, is not TOML, or has a key or value that means nothing.
    """
    return parse_policy(toml_bytes(file), target, compute, kv, name=file.name, where=str(file))


def parse_policy(
    content: bytes | str, target: str, compute: str = "float32", kv: KvScheme | None = None, *, name: str, where: str
) -> Policy:
    """Read a policy: tables ``reference`` and ``drift``.

    Under ``compute.NAME``, then ``kv.DTYPE``, ``kv.DTYPE-GRANULARITY`` and ``target.NAME``, the same tables again
    override them.
    """
    tables = parse_toml(content, where)
    if tables.pop("schema", None) != SCHEMA:
        raise InputError(f"{where}: does not say schema = {SCHEMA!r}")
    overrides = [_overrides(tables, kind, name, where) for kind in _OVERRIDES]
    policy = _policy(tables, name, where)
    if policy == Policy(name, Thresholds(), Thresholds()):
        raise InputError(f"{where}: limits nothing", f"Known limits: {', '.join(_MEASURES)}.")
    caches = () if kv is None else (kv.dtype, f"{kv.dtype}-{kv.granularity}")
    for known, wanted in zip(overrides, ((compute,), caches, (target,)), strict=True):
        for override in (known[key] for key in wanted if key in known):
            policy = _merged(policy, override)
    return policy


# Tables of tables: what they are for, in the order in which they apply.
_OVERRIDES = ("compute", "kv", "target")
_TABLES_HINT = "Tables: reference, drift, compute.NAME, kv.NAME, target.NAME."


def _overrides(tables: dict[str, Any], kind: str, name: str, where: str) -> dict[str, Policy]:
    """Takes ``kind.NAME`` out of a policy's tables; those that are not asked for are checked too."""
    given = tables.pop(kind, {})
    if not isinstance(given, dict) or not all(isinstance(value, dict) for value in given.values()):
        raise InputError(f"{where}: [{kind}.NAME.reference] and [{kind}.NAME.drift] are the tables for a {kind}")
    return {key: _policy(value, name, where) for key, value in given.items()}


def _policy(tables: Mapping[str, Any], name: str, where: str) -> Policy:
    unknown = tables.keys() - {"reference", "drift"}
    if unknown:
        raise InputError(f"{where}: unknown table or key {min(unknown)!r}", _TABLES_HINT)
    return Policy(name, *(_thresholds(tables.get(key, {}), f"{where}: [{key}]") for key in ("reference", "drift")))


def _thresholds(table: Any, where: str) -> Thresholds:
    if not isinstance(table, dict):
        raise InputError(f"{where}: not a table")
    unknown = table.keys() - _MEASURES.keys()
    if unknown:
        raise InputError(f"{where}: unknown limit {min(unknown)!r}", f"Known limits: {', '.join(_MEASURES)}.")
    for key, value in table.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            raise InputError(f"{where}: {key} is {value!r}, expected a number of at least 0")
    return Thresholds(**{key: float(value) for key, value in table.items()})


def _merged(base: Policy, override: Policy) -> Policy:
    def merge(one: Thresholds, other: Thresholds) -> Thresholds:
        given = {field.name: getattr(other, field.name) for field in fields(other)}
        return replace(one, **{key: value for key, value in given.items() if value is not None})

    return Policy(base.name, merge(base.reference, override.reference), merge(base.drift, override.drift))
