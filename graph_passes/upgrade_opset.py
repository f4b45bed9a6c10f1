"""Upgrade opset: a model for older standard operators is declared one for those that the other passes write.

Where an operator's schema is the same in both versions, or has only gained optional inputs and attributes with default
values, the same node means the same in both (onnx/docs/Versioning.md). Where one differs otherwise nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx import defs

from l4convert.frontend.decoder import IR_VERSION, OPSET
from l4convert.graph_passes.base import Outcome
from l4convert.quantization.recipe import Recipe


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Raise the version of the graph and of every function, or say which operators stand against it."""
    outcome = Outcome()
    version = model.graph.opset_imports.get("", 0)
    scopes = [model.graph.opset_imports, *(f.opset_imports for f in model.functions.values())]
    if version >= OPSET:
        return outcome
    for op_type in sorted({node.op_type for node in _standard_nodes(model)}):
        if (reason := _difference(op_type, version)) is not None:
            outcome.skip(op_type, reason)
    if outcome.skipped:
        return outcome
    for imports in scopes:
        if "" in imports:
            imports[""] = OPSET
    model.ir_version = max(model.ir_version, IR_VERSION)
    outcome.fired = 1
    return outcome


def _standard_nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        for node in ir.traversal.RecursiveGraphIterator(graph):
            if node.domain in ("", "ai.onnx"):
                yield node


def _difference(op_type: str, version: int) -> str | None:
    """Why a node of this type would mean something else; None where it means the same."""
    if not defs.has(op_type):
        return f"no operator of opset {OPSET}"
    old, new = defs.get_schema(op_type, version), defs.get_schema(op_type, OPSET)
    if old.since_version == new.since_version:
        return None
    between = f"opsets {version} and {OPSET} differ in"
    if [x.name for x in old.outputs] != [x.name for x in new.outputs][: len(old.outputs)]:
        return f"{between} its outputs"
    inputs = [x.name for x in old.inputs]
    added = new.inputs[len(inputs) :]
    optional = all(x.option != defs.OpSchema.FormalParameterOption.Single for x in added)
    if inputs != [x.name for x in new.inputs][: len(inputs)] or not optional:
        return f"{between} its inputs"
    for name, attribute in old.attributes.items():
        known = new.attributes.get(name)
        if known is None or known.type != attribute.type or known.default_value != attribute.default_value:
            return f"{between} attribute {name}"
    missing = [name for name in new.attributes.keys() - old.attributes.keys() if new.attributes[name].required]
    return f"{between} attribute {missing[0]}" if missing else None
