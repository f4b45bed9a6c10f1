"""From the pass to the kernels: calls of MoE as ``convert --target tensorrt`` stores them, on the interpreter's GPU."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.frontend.builder import Builder
from l4convert.graph_passes.editing import attributes_of, spec_of
from l4convert.plugins.moe import packed
from l4convert.plugins.moe.packed import PackedMoESpec
from l4convert.quantization.recipe import load_recipe
from tests.graphs import lowered
from tests.in_place import session_of
from tests.plugins.moe import BF16
from tests.plugins.stand_in import StandIn
from tests.plugins.test_conformance import LARGEST_ERROR, relative_error, run_plugin

TOKENS = 9


def body_of(spec: PackedMoESpec, stored: list[ir.Value], width: int) -> ir.Model:
    """The function of a call as a model of its own, between casts."""
    b = Builder()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([TOKENS, width]))
    logits = ir.Value(name="logits", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([TOKENS, spec.num_experts]))
    inputs = packed.Inputs(b.op("Cast", x, to=int(ir.DataType.BFLOAT16)), logits, *stored)
    y = b.op("Cast", packed.build(b, spec, inputs), to=int(ir.DataType.FLOAT))
    y.dtype, y.shape = ir.DataType.FLOAT, x.shape
    graph = ir.Graph([x, logits], [y], nodes=b.nodes, initializers=stored, opset_imports={"": 23}, name="body")
    return ir.Model(graph, ir_version=11)


@pytest.mark.parametrize(("recipe", "bound"), [("int4", LARGEST_ERROR), ("fp8", 3 * LARGEST_ERROR)])
def test_stored_words_give_what_the_function_gives(gpu: StandIn, scout_layout, recipe: str, bound: float) -> None:
    model = lowered(open_checkpoint(scout_layout), "tensorrt", "static", load_recipe(recipe), "bfloat16")
    call = next(node for node in model.graph if node.op_type == "MoE")
    spec = spec_of(PackedMoESpec, call)
    stored = [value for value in call.inputs[2:] if value is not None]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, spec.hidden_size)).astype(BF16)
    logits = rng.standard_normal((TOKENS, spec.num_experts)).astype(np.float32)
    arrays = [np.asarray(value.const_value) for value in stored]
    [y] = run_plugin(gpu, "MoE", attributes_of(spec), [x, logits, *arrays], in_place=True)
    copies = [
        ir.Value(name=v.name, type=v.type, shape=v.shape, const_value=ir.tensor(a))
        for v, a in zip(stored, arrays, strict=True)
    ]
    session = session_of(body_of(spec, copies, spec.hidden_size))
    expected = session.run(None, {"x": x.astype(np.float32), "logits": logits})[0]
    assert relative_error(y, expected) < bound
