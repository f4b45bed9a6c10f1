"""The plugin library that an engine is built with: found, asked for kernels, and loaded before the graph is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from l4convert.emit.digest import file_digest
from l4convert.emit.staging import reported
from l4convert.engine.network import FUNCTION_DOMAIN, graphs_of
from l4convert.errors import InputError, UsageError
from l4convert.plugins.library.native import DEFAULT_LIBRARY, load
from l4convert.plugins.library.support import Attribute, missing_support
from l4convert.targets.hardware import Hardware


@dataclass(frozen=True)
class PluginLibrary:
    """A library that is there.

    Attributes:
        path: Absolute.
        sha256: Of the file.
        version: Of the l4convert that built it.
    """

    path: Path
    sha256: str
    version: str

    def as_dict(self) -> dict[str, str]:
        """What a manifest says of it; where it lies is said apart, for it may be moved."""
        return {"sha256": self.sha256, "version": self.version}


def find_library(asked: Path | None, models: Sequence[onnx.ModelProto]) -> PluginLibrary | None:
    """The library for graphs; None where they have no node that needs one.

    Args:
        asked: Its path; None: where it is built.
        models: The graphs that TensorRT will read.

    Raises:
        InputError: There is none, or it is none of ours.
    """
    if not any(_nodes(model) for model in models):
        return None
    path = (asked or DEFAULT_LIBRARY).resolve()
    if not path.is_file():
        where = asked or DEFAULT_LIBRARY
        raise InputError(
            f"{where}: there is no plugin library, which engines of this artifact need",
            "l4convert plugins build makes it (--sm 90 for H100 only); --plugins FILE names it",
        )
    version = load(path).version
    with reported(f"{path}: cannot be read"):
        return PluginLibrary(path, file_digest(path)[1], version)


def require_kernels(library: PluginLibrary, hardware: Hardware, models: Sequence[onnx.ModelProto]) -> None:
    """Refuse a library that lacks what a graph needs on a GPU: a head size, a number format, the GPU's generation.

    Raises:
        UsageError: Something is missing.
        InputError: It has no TensorRT plugins.
    """
    asked: set[tuple[object, ...]] = set()
    for node in (node for model in models for node in _nodes(model)):
        attributes = _attributes(node)
        key = (node.op_type, *sorted(attributes.items()))
        if key in asked:
            continue
        asked.add(key)
        why = missing_support(library.path, node.op_type, attributes, hardware.sm)
        if why is not None:
            raise UsageError(f"{hardware.name}: {library.path} cannot compute {node.name or node.op_type}: {why}")


def load_library(builder: Any, path: str) -> bool:
    """Give a builder the plugins of a library; for the process that builds. False where TensorRT refuses it."""
    return builder.get_plugin_registry().load_library(path) is not None


def allow_aliases(module: Any, config: Any) -> None:
    """Let plugins write caches in place. TensorRT older than 10.3 does not know it; there they copy."""
    feature = getattr(getattr(module, "PreviewFeature", None), "ALIASED_PLUGIN_IO_10_03", None)
    if feature is not None:
        config.set_preview_feature(feature, True)


def _nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for graph in graphs_of(model.graph) for node in graph.node if node.domain == FUNCTION_DOMAIN]


def _attributes(node: onnx.NodeProto) -> dict[str, Attribute]:
    return dict(_attribute(attribute) for attribute in node.attribute)


def _attribute(attribute: onnx.AttributeProto) -> tuple[str, Attribute]:
    value = onnx.helper.get_attribute_value(attribute)
    return attribute.name, value.decode() if isinstance(value, bytes) else value
