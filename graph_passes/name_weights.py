"""Name weights: stored weights get the names that recipes know, those of transformers' ``Llama4ForCausalLM``.

Exporters keep the names of most parameters, behind a wrapper's prefix perhaps, and give a number to a matrix that they
transposed on the way. Which module such a matrix belongs to is then said by the node that takes it: torch.onnx writes
the module's path into the node's metadata, older exporters into its name.
"""

from __future__ import annotations

import re

import onnx_ir as ir

from l4convert.checkpoint.lazy import LazyTensor
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.reading import stored_matrix
from l4convert.quantization.recipe import Recipe

# torch/onnx/_internal/exporter/_core.py: the path of modules from the root, as a printed Python list.
_SCOPES = "pkg.torch.onnx.name_scopes"
_PATH = re.compile(r"(?:^|\.)((?:model\.)?(?:layers\.\d+|embed_tokens|norm)|lm_head)(?=\.|$)")
_MOST_CHARACTERS = 4096


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Rename in place; a weight whose name would be taken by two keeps its own."""
    outcome = Outcome()
    graph = model.graph
    for value in list(graph.initializers.values()):
        if not isinstance(value.const_value, LazyTensor):
            continue
        wanted = _wanted(value)
        if wanted is None or wanted == value.name:
            continue
        if wanted in graph.initializers or any(x.name == wanted for x in graph.inputs):
            outcome.skip(value.name, f"another tensor is called {wanted}")
            continue
        _rename(graph, value, wanted)
        outcome.fired += 1
    return outcome


def _wanted(value: ir.Value) -> str | None:
    """The canonical name; None where nothing tells it."""
    name = value.name or ""
    if (match := _PATH.search(name)) is not None:
        return _canonical(name[match.start(1) :])
    scopes = {scope for node, _ in value.uses() if stored_matrix(value) is not None and (scope := _scope(node))}
    if len(scopes) != 1:
        return None
    (scope,) = scopes
    match = _PATH.search(scope)
    return None if match is None else _canonical(f"{scope[match.start(1) :]}.weight")


def _canonical(name: str) -> str:
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


def _scope(node: ir.Node) -> str:
    """The path of the module that a product was exported from, "" where that is not known."""
    if node.op_type in ("Transpose", "Cast") and len(node.outputs[0].uses()) == 1:
        node = next(user for user, _ in node.outputs[0].uses())
    if node.op_type not in ("MatMul", "Gemm"):
        return ""
    text = node.metadata_props.get(_SCOPES, "")
    if text:
        paths = re.findall(r"'([^']*)'", text[-_MOST_CHARACTERS:])
        return paths[-2] if len(paths) > 1 else ""
    path = (node.name or "")[:_MOST_CHARACTERS].strip("/").split("/")
    return ".".join(path[:-1])


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    del graph.initializers[value.name or ""]
    value.name = name
    assert value.const_value is not None  # only weights are renamed
    value.const_value.name = name
    graph.initializers[name] = value
