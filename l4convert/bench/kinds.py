"""Which kind of work each node of an artifact's graph is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from l4convert.bench.results import KINDS
from l4convert.checkpoint.config import DecoderConfig
from l4convert.emit.write import MODEL_FILE
from l4convert.runtime.manifest import ArtifactInfo

GLOBAL, CHUNKED, POSITIONS, PROJECTIONS, FEED_FORWARD, HEAD, OTHER = KINDS

# The names that the frontend gives (l4convert/frontend/decoder.py); what fuses or lowers nodes keeps the beginning.
_LAYER = re.compile(r"layers\.(\d+)/(.*)")
_PROJECTION = re.compile(r"self_attn/([qkvo]_proj|qkv_proj|.*[qkvo]_proj\.weight)")
_WEIGHT = re.compile(r"model\.layers\.(\d+)\.(self_attn|feed_forward)\.")
_BLOCK = re.compile(r"(layers\.\d+/(?:self_attn|feed_forward)/)(?!residual)")
_HEAD = ("lm_head", "norm", "logits")


class _From(IntEnum):
    """What a value depends on."""

    WEIGHTS = 0
    MASK = 1  # the attention mask, and shapes: which positions there are
    TEXT = 2  # the tokens


@dataclass(frozen=True)
class NodeKinds:
    """Kinds by node name.

    Attributes:
        config: Says which layers are chunked.
        on_mask: Names of nodes that compute positions and masks only: nothing of tokens or of caches goes into them.
        blocks: Beginning of the name that nodes without one should have: inlined functions have nodes like that, which
            stand behind those of the block that they are of.
    """

    config: DecoderConfig
    on_mask: frozenset[str]
    blocks: Mapping[str, str]

    @classmethod
    def of(cls, info: ArtifactInfo) -> NodeKinds:
        """Read an artifact's graph, without its weights."""
        from l4convert.emit.graph_refs import read_model

        model = read_model(info.path / MODEL_FILE)
        return cls(info.config, frozenset(mask_nodes(model)), dict(_inherited(model.graph)))

    def of_node(self, name: str) -> str:
        """The kind of a node; of one that a runtime made, by the beginning of its name."""
        if name in self.on_mask:
            return POSITIONS
        name = self.blocks.get(name, "") + name
        match = _LAYER.match(_WEIGHT.sub(r"layers.\1/\2/", name))
        if match is None:
            return HEAD if name.startswith(_HEAD) else OTHER
        layer, part = int(match[1]), match[2]
        if _PROJECTION.match(part):
            return PROJECTIONS
        if part.endswith("residual"):
            return OTHER
        if part.startswith("self_attn/"):
            return CHUNKED if self.config.layers[layer].chunked else GLOBAL
        return FEED_FORWARD if part.startswith("feed_forward/") else OTHER


def _inherited(graph: Any) -> Iterator[tuple[str, str]]:
    """Nodes of the main graph that are named after no part of the model, with the beginning of a name before them."""
    block = ""
    for node in graph.node:
        if _LAYER.match(node.name) or node.name.startswith(_HEAD):
            found = _BLOCK.match(node.name)
            block = found[1] if found else ""
        elif block and not _WEIGHT.match(node.name):
            yield node.name, block


def mask_nodes(model: Any) -> Iterator[str]:
    """Names of the nodes of an ``onnx.ModelProto`` that depend on the attention mask or on shapes, but on no token."""
    values = {value.name: _From.TEXT for value in model.graph.input}
    values["attention_mask"] = _From.MASK
    return iter(_walk(model.graph, values))


def _walk(graph: Any, values: dict[str, _From]) -> list[str]:
    """Follow a graph's nodes, which are in order; ``values`` has what is known outside and gets what is made."""
    found = []
    for node in graph.node:
        known = [values.get(name, _From.WEIGHTS) for name in node.input]
        source = max(known, default=_From.WEIGHTS)
        for body in _bodies(node):
            inside = dict(values)
            inside |= {value.name: source for value in body.input}
            found += _walk(body, inside)
            source = max([source, *(inside.get(value.name, _From.WEIGHTS) for value in body.output)])
        if node.op_type in {"Shape", "Size"}:
            source = min(source, _From.MASK)
        values |= dict.fromkeys(node.output, source)
        if source is _From.MASK and node.name:
            found.append(node.name)
    return found


def _bodies(node: Any) -> Iterable[Any]:
    return (attribute.g for attribute in node.attribute if attribute.HasField("g"))


def divide(times: Mapping[str, float], kinds: NodeKinds) -> dict[str, float]:
    """Add up times by node name to times by kind; every kind is there."""
    parts = dict.fromkeys(KINDS, 0.0)
    for name, time in times.items():
        parts[kinds.of_node(name)] += time
    return parts
