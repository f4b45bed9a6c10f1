"""Checking how the nodes of a model hang together: scopes, order, functions, opsets.

ONNX wants nodes in topological order and every name given once (onnx/docs/IR.md). What follows relies on it, so a model
that breaks it is refused, not repaired: runtimes would refuse it, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import onnx

from l4convert.checkpoint.text import quote, show
from l4convert.errors import InputError
from l4convert.onnx_in.tensors import Tensors, attribute_tensors, is_external

#: Nodes after every call of a function is replaced by its body; a real decoder has some ten thousand.
MAX_EXPANDED_NODES = 2_000_000
#: Of the squares of the numbers of a node's inputs: onnx_ir takes that long to remove a node. Concatenations of the 128
#: matrices of Maverick's experts have 16,384 each.
MAX_SQUARED_INPUTS = 20_000_000
_Identifier = tuple[str, str, str]
# Names by graph, from the outermost to the one that is checked.
_Scopes = tuple[set[str], ...]


def check_model(model: onnx.ModelProto, tensors: Tensors) -> None:
    """Refuse a model that is not well-formed.

    Args:
        model: As parsed.
        tensors: Checks the tensors on the way.

    Raises:
        InputError: Names the file, and the tensor, value or node.
    """
    where = show(tensors.path)
    _check_opsets(where, model.opset_import)
    _check_inputs(where, model)
    _check_functions(where, model)
    for function in model.functions:
        _check_opsets(where, function.opset_import)
        scopes = (set(function.input),)
        _check_nodes(tensors, function.node, scopes)
        _require_known(where, function.output, scopes, f"function {show(function.name)}")
    _check_graph(tensors, model.graph, ())
    tensors.check_overlaps()


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the graphs in its nodes' attributes, at every depth."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in _inner_graphs(attribute):
                yield from graphs_of(inner)


def _check_opsets(where: str, imports: Iterable[onnx.OperatorSetIdProto]) -> None:
    versions: dict[str, int] = {}
    for entry in imports:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if domain in versions:
            raise InputError(f"{where}: operator set {show(domain or 'ai.onnx')} is imported twice")
        versions[domain] = entry.version
    newest = onnx.defs.onnx_opset_version()
    version = versions.get("")
    if version is None:
        raise InputError(f"{where}: imports no version of ONNX's own operators, so it is not a model that can be read")
    if not 1 <= version <= newest:
        hint = "update onnx, or export for an older opset"
        raise InputError(f"{where}: opset {version} is not known; this version of onnx has 1 to {newest}", hint)


def _check_inputs(where: str, model: onnx.ModelProto) -> None:
    nodes = [*_all_nodes(model.graph.node), *(node for body in model.functions for node in _all_nodes(body.node))]
    if sum(len(node.input) ** 2 for node in nodes) > MAX_SQUARED_INPUTS:
        most = max(nodes, key=lambda node: len(node.input))
        what = f"node '{show(most.name or most.op_type)}' takes {len(most.input):,} values"
        raise InputError(f"{where}: {what}, more than a decoder needs")


def _check_functions(where: str, model: onnx.ModelProto) -> None:
    """No function is there twice, calls itself through others, or unfolds into more nodes than memory holds."""
    functions: dict[_Identifier, onnx.FunctionProto] = {}
    for function in model.functions:
        identifier = (function.domain, function.name, function.overload)
        if identifier in functions:
            raise InputError(f"{where}: function {show(function.name)} is defined twice")
        functions[identifier] = function
    sizes: dict[_Identifier, int] = {}
    for identifier in functions:
        _expanded(where, functions, identifier, sizes)
    total = sum(sizes.get(call, 1) for call in _calls(model.graph.node))
    if total > MAX_EXPANDED_NODES:
        raise InputError(f"{where}: its functions unfold into more than {MAX_EXPANDED_NODES:,} nodes")


def _expanded(
    where: str, functions: Mapping[_Identifier, onnx.FunctionProto], first: _Identifier, sizes: dict[_Identifier, int]
) -> None:
    """Fill ``sizes`` for a function and those it calls, without recursion: the depth is the file's to choose."""
    stack: list[_Identifier] = [first]
    active: list[_Identifier] = []
    while stack:
        identifier = stack[-1]
        if identifier in sizes:
            stack.pop()
            continue
        calls = [call for call in _calls(functions[identifier].node) if call in functions]
        waiting = [call for call in calls if call not in sizes]
        if not waiting:
            size = sum(sizes.get(call, 1) for call in _calls(functions[identifier].node))
            sizes[identifier] = min(size, MAX_EXPANDED_NODES + 1)
            stack.pop()
            if active and active[-1] == identifier:
                active.pop()
            continue
        if identifier not in active:
            active.append(identifier)
        if waiting[0] in active:
            raise InputError(f"{where}: function {show(waiting[0][1])} calls itself")
        stack.append(waiting[0])


def _calls(nodes: Iterable[onnx.NodeProto]) -> Iterator[_Identifier]:
    return ((node.domain, node.op_type, node.overload) for node in _all_nodes(nodes))


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those of the graphs in their attributes."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for inner in _inner_graphs(attribute):
                yield from _all_nodes(inner.node)


def _check_graph(tensors: Tensors, graph: onnx.GraphProto, outer: _Scopes) -> None:
    where = show(tensors.path)
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise InputError(f"{where}: tensor '{show(name)}': sparse tensors are not supported", "export it dense")
    known: set[str] = set()
    for value in graph.input:
        if not value.name or value.name in known or _seen(value.name, outer):
            raise InputError(f"{where}: graph input '{show(value.name)}' has no name, or one that another value has")
        known.add(value.name)
    stored: set[str] = set()
    for tensor in graph.initializer:
        what = f"tensor '{show(tensor.name)}'"
        if not tensor.name or tensor.name in stored or _seen(tensor.name, outer):
            raise tensors.refuse(what, "has no name, or one that another value has")
        stored.add(tensor.name)
        tensors.check(tensor, what)
    known |= stored  # a file of IR version 3 lists initializers as inputs, too
    _check_nodes(tensors, graph.node, (*outer, known))
    _require_known(where, (value.name for value in graph.output), (*outer, known), "the graph")


def _check_nodes(tensors: Tensors, nodes: Iterable[onnx.NodeProto], scopes: _Scopes) -> None:
    """A node may take what is in any scope already; what it gives is added to the innermost one."""
    where: str = show(tensors.path)
    for node in nodes:
        label = f"node '{show(node.name or node.op_type)}'"
        if not node.op_type:
            raise InputError(f"{where}: {label} has no operator")
        for name in node.input:
            if name and not _seen(name, scopes):
                raise InputError(f"{where}: {label} takes '{show(name)}' before anything gives it")
        _check_attributes(tensors, node, label, scopes)
        for name in node.output:
            if name and _seen(name, scopes):
                raise InputError(f"{where}: {label} gives '{show(name)}', which is there already")
            if name:
                scopes[-1].add(name)


def _check_attributes(tensors: Tensors, node: onnx.NodeProto, label: str, scopes: _Scopes) -> None:
    where: str = show(tensors.path)
    names = [attribute.name for attribute in node.attribute]
    if len(set(names)) != len(names):
        raise InputError(f"{where}: {label} has an attribute twice")
    for attribute, tensor in attribute_tensors(node):
        what = f"tensor '{show(tensor.name or attribute)}' of {label}"
        if is_external(tensor):
            raise tensors.refuse(what, "only initializers may be outside of the model", "export it again")
        tensors.check(tensor, what)
    for item in node.attribute:
        if item.HasField("sparse_tensor") or item.sparse_tensors:
            raise InputError(f"{where}: {label}: sparse tensors are not supported", "export it dense")
        for inner in _inner_graphs(item):
            _check_graph(tensors, inner, scopes)


def _seen(name: str, scopes: _Scopes) -> bool:
    return any(name in scope for scope in scopes)


def _inner_graphs(attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def _require_known(where: str, names: Iterable[str], scopes: _Scopes, what: str) -> None:
    for name in names:
        if not _seen(name, scopes):
            raise InputError(f"{where}: {what} puts out {quote(name)}, which nothing gives")
