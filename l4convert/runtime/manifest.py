"""What the runtime reads from an artifact's manifest, ``l4convert.json``; nothing is guessed from the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from l4convert.checkpoint.config import DecoderConfig, LayerConfig, RopeScaling
from l4convert.checkpoint.hf_config import MAX_CONFIG_BYTES
from l4convert.checkpoint.text import parse_object, read_bytes, show
from l4convert.emit.manifest import read_manifest
from l4convert.emit.staging import MANIFEST_FILE
from l4convert.errors import InputError
from l4convert.quantization.kv import KvScheme, kv_scheme
from l4convert.quantization.recipe import STORED

KvCache = Literal["growing", "static", "windowed"]


@dataclass(frozen=True)
class ArtifactInfo:
    """The part of the manifest that running the model needs.

    Attributes:
        path: The artifact's folder.
        recipe: Name of the quantization recipe; ``schemes``: those that its rules name; ``target``: of the lowering.
        compute: The type of activations, and of caches that are not quantized.
        kv_scheme: How the caches are quantized; None: they are not.
        calls: "in_place" where calls must be cut and packed (l4convert/runtime/calls.py), else "any".
    """

    path: Path
    kv_cache: KvCache
    recipe: str
    schemes: frozenset[str]
    target: str
    config: DecoderConfig
    compute: str
    calls: str
    kv_scheme: KvScheme | None = None


def read_artifact(path: Path) -> ArtifactInfo:
    """Read an artifact's manifest.

    Raises:
        InputError: The folder is not an artifact, or its manifest is damaged or of another version.
    """
    manifest = read_manifest(path)
    file = path / MANIFEST_FILE
    if is_foreign(manifest):
        raise InputError(
            f"{file}: was made by `l4convert optimize`, and only the exporter of its model knows inputs and caches",
            "run its model.onnx with ONNX Runtime as you ran the model that it was made of",
        )
    try:
        kv_cache, recipe, target = (_name(manifest[key]) for key in ("kv_cache", "recipe", "target"))
        config = config_from_json(manifest["config"])
        schemes, kv_scheme = _schemes(manifest["recipe"]), _kv_scheme(manifest["recipe"])
        # Artifacts of earlier versions do not say: they compute in float32 and take any call.
        compute, calls = _name(manifest.get("compute", "float32")), _name(manifest.get("calls", "any"))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: damaged manifest: {error!r}", "Convert the checkpoint again.") from error
    if kv_cache not in get_args(KvCache):
        raise InputError(f"{file}: kv_cache is {kv_cache!r}, expected one of {', '.join(get_args(KvCache))}")
    return ArtifactInfo(path, cast("KvCache", kv_cache), recipe, schemes, target, config, compute, calls, kv_scheme)


def is_foreign(manifest: Mapping[str, Any]) -> bool:
    """Whether an artifact was made of somebody else's ONNX model: then the manifest has no decoder's configuration."""
    source = manifest.get("source")
    return isinstance(source, dict) and source.get("format") == "onnx"


def read_json(file: Path) -> dict[str, Any]:
    """Read a small file that must hold one JSON object.

    Raises:
        InputError: It does not, or is no file of its folder.
    """
    return parse_object(read_bytes(file, MAX_CONFIG_BYTES), show(file))


def config_from_json(content: Mapping[str, Any]) -> DecoderConfig:
    """The inverse of ``dataclasses.asdict`` on a :class:`DecoderConfig` that went through JSON.

    Raises:
        TypeError, KeyError, ValueError: A field is missing, unknown, not an object where one is due, or out of range.
    """
    values = {field.name: content[field.name] for field in fields(DecoderConfig)}
    values["layers"] = tuple(LayerConfig(**layer) for layer in values["layers"])
    values["eos_token_ids"] = tuple(values["eos_token_ids"])
    if not all(type(token) is int for token in values["eos_token_ids"]):
        raise TypeError("an end-of-text token is no integer")
    if values["rope_scaling"] is not None:
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    _check_sizes(values)
    return DecoderConfig(**values)


def _check_sizes(values: Mapping[str, Any]) -> None:
    """Every field that is declared as an integer is a positive one, and there are layers."""
    for field in fields(DecoderConfig):
        value = values[field.name]
        if field.type == "int" and (type(value) is not int or value < 1):
            raise ValueError(f"{field.name} is {value!r}")
    if not values["layers"]:
        raise ValueError("there are no layers")


def _name(value: object) -> str:
    """A manifest entry that is a name, or an object with a name."""
    if isinstance(value, Mapping):
        value = value["name"]
    if not isinstance(value, str):
        raise TypeError(f"expected a name, not {value!r}")
    return value


def _kv_scheme(recipe: Any) -> KvScheme | None:
    given = recipe.get("kv_cache") if isinstance(recipe, dict) else None
    return None if given is None else kv_scheme(_name(given["dtype"]), given.get("granularity"), given.get("layers"))


def _schemes(recipe: Any) -> frozenset[str]:
    """The schemes of a recipe's rules, "stored" for codes that are the checkpoint's own; none where only its name is
    known."""
    rules = recipe.get("rule", []) if isinstance(recipe, dict) else []
    if not all(isinstance(rule, Mapping) for rule in rules):
        raise TypeError("a rule of the recipe is no object")
    return frozenset(STORED if _is_exact(rule) else _name(rule["scheme"]) for rule in rules)


def _is_exact(rule: Mapping[str, Any]) -> bool:
    """Whether a rule rounds nothing: neither weights nor their inputs."""
    return rule.get("scale") == STORED and rule.get("activations", "none") == "none"
