"""Cut a decoder at layer boundaries into graphs that run one after the other, each with its own layers' weights.

Between two layers only the residual stream crosses. It is found by following the graph, not by its name: among the
values that depend on all caches of the layers before the cut and on no other, it is the last one through which
everything after the cut passes. What depends on the attention mask alone (positions, masks) is computed again in
every segment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import onnx

from l4convert.engine.network import graphs_of
from l4convert.errors import InputError, UsageError

HIDDEN_INPUT = "hidden_states"
HIDDEN_OUTPUT = "hidden_states.next"
_IDS = "input_ids"


@dataclass(frozen=True)
class Span:
    """Layers ``start`` to ``stop``, ``stop`` not included, of a decoder of ``of`` layers."""

    start: int
    stop: int
    of: int

    @property
    def whole(self) -> bool:
        """Whether these are all layers."""
        return self.start == 0 and self.stop == self.of

    @property
    def name(self) -> str:
        """Of the plan: ``decoder``, or ``layers-00-07`` with the first and the last layer."""
        width = max(2, len(str(self.of - 1)))
        return "decoder" if self.whole else f"layers-{self.start:0{width}}-{self.stop - 1:0{width}}"


def split_layers(layers: int, layers_per_engine: int | None) -> tuple[Span, ...]:
    """Consecutive spans of that many layers; the last one may be shorter.

    Raises:
        UsageError: ``layers_per_engine`` is not above 0.
    """
    if layers_per_engine is None:
        return (Span(0, layers, layers),)
    if layers_per_engine < 1:
        raise UsageError(f"--layers-per-engine {layers_per_engine} is not above 0")
    starts = range(0, layers, layers_per_engine)
    return tuple(Span(start, min(start + layers_per_engine, layers), layers) for start in starts)


def cut(model: onnx.ModelProto, spans: tuple[Span, ...]) -> list[onnx.ModelProto]:
    """One model for each span, in order; ``model`` is the same afterwards.

    The first has the input ``input_ids``, the last the output ``logits``, and between them ``hidden_states`` [batch,
    sequence, hidden]; every one has ``attention_mask`` and the caches of its own layers under their own numbers.

    Raises:
        InputError: The graph has no single value that crosses from a layer to the next.
    """
    if len(spans) == 1:
        return [model]
    graph = _Graph(model)
    crossings: list[str | None] = [None]
    inside: set[int] = set()
    for span in spans[:-1]:
        name, inside = graph.crossing(span.stop, inside, crossings[-1] or _IDS)
        crossings.append(name)
    crossings.append(None)
    return [
        _segment(graph, span, before, after)
        for span, before, after in zip(spans, crossings[:-1], crossings[1:], strict=True)
    ]


class _Graph:
    """A model's main graph with its dependencies, implicit ones of subgraphs included."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.inputs = [_inputs(node) for node in self.nodes]
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.outputs = {value.name for value in model.graph.output}
        self.consumers: dict[str, set[int]] = {}
        for i, (node, inputs) in enumerate(zip(self.nodes, self.inputs, strict=True)):
            for name in [] if _is_shape_of_ids(node) else inputs:
                self.consumers.setdefault(name, set()).add(i)
        self._token_sources = {v.name for v in model.graph.input if v.name == _IDS or v.name.startswith("past_")}
        self.level = self._levels()

    def _levels(self) -> list[int | None]:
        """For each node the highest layer whose cache it depends on; -1: on token ids only; None: on neither."""
        levels: list[int | None] = []
        known: dict[str, int] = {}
        for name in self._token_sources:
            known[name] = _layer(name)
        for node, inputs in zip(self.nodes, self.inputs, strict=True):
            found = [known[name] for name in inputs if name in known]
            level = None if _is_shape_of_ids(node) or not found else max(found)
            levels.append(level)
            if level is not None:
                known.update(dict.fromkeys(node.output, level))
        return levels

    def ancestors(self, node: int, stop: set[int]) -> set[int]:
        """A token-dependent node and those that it depends on, up to the nodes in ``stop``."""
        found, waiting = set(), [node]
        while waiting:
            current = waiting.pop()
            if current in found or current in stop:
                continue
            found.add(current)
            waiting += [self.producer[n] for n in self.inputs[current] if n in self.producer and self._dependent(n)]
        return found

    def _dependent(self, name: str) -> bool:
        return self.level[self.producer[name]] is not None

    def crossing(self, boundary: int, before: set[int], previous: str) -> tuple[str, set[int]]:
        """The value that crosses into layer ``boundary``, and the token-dependent nodes that come before it.

        Args:
            boundary: First layer after the cut.
            before: What came before the previous cut.
            previous: The value that crossed there, or the token ids.
        """
        best: tuple[str, set[int]] | None = None
        for i, level in enumerate(self.level):
            if level != boundary - 1 or i in before:
                continue
            inside = self.ancestors(i, before)
            leaving = self._leaving(inside, previous)
            alone = len(leaving) == 1 and leaving == set(self.nodes[i].output)
            if alone and (best is None or len(inside) > len(best[1])):
                best = (next(iter(leaving)), inside)
        if best is None:
            raise InputError(
                f"model.onnx: cannot be cut before layer {boundary}: more than one value crosses there",
                "build it as one engine, without --layers-per-engine",
            )
        return best[0], before | best[1]

    def _leaving(self, inside: set[int], previous: str) -> set[str]:
        """What something outside needs, of the values made inside and the one that came in; caches leave as outputs."""
        made = [name for i in inside for name in self.nodes[i].output]
        return {
            name
            for name in [previous, *made]
            if self.consumers.get(name, set()) - inside or (name in self.outputs and not name.startswith("present."))
        }

    def hidden(self, name: str, new_name: str) -> onnx.ValueInfoProto:
        """Declaration [batch, sequence, hidden] of a crossing value under another name."""
        inferred = {value.name: value for value in self._inferred.graph.value_info}
        declared = inferred[name].type.tensor_type if name in inferred else onnx.TypeProto.Tensor()
        dims = declared.shape.dim
        width = dims[2].dim_value if len(dims) == 3 else self._embedding_width()
        cache = next(v for v in self.model.graph.input if v.name.startswith("past_")).type.tensor_type
        kind = declared.elem_type or cache.elem_type  # the residual stream has the type of the caches
        return onnx.helper.make_tensor_value_info(new_name, kind, ["batch", "sequence", width])

    @cached_property
    def _inferred(self) -> onnx.ModelProto:
        return onnx.shape_inference.infer_shapes(self.model)

    def _embedding_width(self) -> int:
        tables = {node.input[0] for node in self.nodes if node.op_type == "Gather" and node.input[1] == _IDS}
        return next((int(t.dims[-1]) for t in self.model.graph.initializer if t.name in tables), 0)


def _segment(graph: _Graph, span: Span, before: str | None, after: str | None) -> onnx.ModelProto:
    """The part of the graph between two crossing values (None: from the inputs, to the logits)."""
    source = graph.model.graph
    wanted = {f"present.{i}.{part}" for i in range(span.start, span.stop) for part in ("key", "value")}
    outputs = [value for value in source.output if value.name in wanted or (after is None and value.name == "logits")]
    goals = [value.name for value in outputs] + ([after] if after else [])
    kept, used = _needed(graph, goals, before)
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for field in ("node", "initializer", "input", "output", "value_info", "sparse_initializer"):
        model.graph.ClearField(field)
    model.graph.node.extend(graph.nodes[i] for i in sorted(kept))
    model.graph.initializer.extend(tensor for tensor in source.initializer if tensor.name in used)
    model.graph.input.extend(v for v in source.input if v.name in used or v.name == "attention_mask")
    model.graph.output.extend(outputs)
    if before is not None:
        _enter(graph, model, before)
    if after is not None:
        _leave(graph, model, after)
    return model


def _needed(graph: _Graph, goals: Iterable[str], before: str | None) -> tuple[set[int], set[str]]:
    """Nodes that compute ``goals`` from inputs and ``before``, and all names that they read."""
    kept: set[int] = set()
    used: set[str] = set()
    waiting = list(goals)
    while waiting:
        name = waiting.pop()
        if name in used or name == before:
            continue
        used.add(name)
        node = graph.producer.get(name)
        if node is not None and node not in kept:
            kept.add(node)
            shape_of_ids = before is not None and _is_shape_of_ids(graph.nodes[node])
            waiting += [] if shape_of_ids else graph.inputs[node]
    return kept, used


def _enter(graph: _Graph, model: onnx.ModelProto, before: str) -> None:
    """Let a segment begin with the residual stream, which also stands for the token ids where these give the sizes."""
    _rename(model.graph, before, HIDDEN_INPUT)
    for node in model.graph.node:
        if _is_shape_of_ids(node):  # [batch, sequence] of [batch, sequence, hidden]
            axes = slice(_integer(node, "start"), _integer(node, "end")).indices(2)
            node.input[0] = HIDDEN_INPUT
            del node.attribute[:]
            node.attribute.extend(
                onnx.helper.make_attribute(*axis) for axis in zip(("start", "end"), axes[:2], strict=True)
            )
    model.graph.input.insert(0, graph.hidden(before, HIDDEN_INPUT))


def _leave(graph: _Graph, model: onnx.ModelProto, after: str) -> None:
    _rename(model.graph, after, HIDDEN_OUTPUT)
    for node in model.graph.node:
        node.output[:] = [HIDDEN_OUTPUT if name == after else name for name in node.output]
    model.graph.output.insert(0, graph.hidden(after, HIDDEN_OUTPUT))


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for inner in graphs_of(graph):
        for node in inner.node:
            node.input[:] = [new if name == old else name for name in node.input]


def _inputs(node: onnx.NodeProto) -> list[str]:
    """What a node reads, subgraphs' captured values included."""
    return [name for name in node.input if name] + list(_captured(node))


def _captured(node: onnx.NodeProto) -> Iterator[str]:
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            made = {v.name for v in graph.input} | {t.name for t in graph.initializer}
            made |= {name for inner in graph.node for name in inner.output}
            read = [name for inner in graph.node for name in _inputs(inner)] + [v.name for v in graph.output]
            yield from (name for name in read if name not in made)


def _layer(name: str) -> int:
    """The layer of a cache, -1 for the token ids."""
    return int(name.split(".")[1]) if name.startswith("past_") else -1


def _is_shape_of_ids(node: onnx.NodeProto) -> bool:
    """Sizes of the call: the residual stream has them, too."""
    return node.op_type == "Shape" and node.domain == "" and node.input[0] in {_IDS, HIDDEN_INPUT}


def _integer(node: onnx.NodeProto, name: str) -> int | None:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), None)
