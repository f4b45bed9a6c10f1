"""Inline functions: calls of the ``l4convert`` domain become their bodies, and what those repeat is computed once."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import clean_up
from l4convert.quantization.recipe import Recipe

# Constants up to this many elements are compared and shared (a head's vector of ones is one of them).
SHARED_CONSTANT_ELEMENTS = 4096


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Afterwards no function is left, so any runtime that knows the remaining ops can load the model."""
    outcome = Outcome(fired=sum(1 for node in model.graph if node.op_identifier() in model.functions))
    common.InlinePass()(model)
    common.CommonSubexpressionEliminationPass(size_limit=SHARED_CONSTANT_ELEMENTS)(model)
    clean_up(model)
    return outcome
