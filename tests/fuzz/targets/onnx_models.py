"""ONNX models that somebody else made, with weights in the model and beside it."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from l4convert.checkpoint.lazy import LazyTensor
from l4convert.onnx_in import open_onnx
from tests.fuzz.target import OneFile, Target

READ_BYTES = 1 << 16
_model = OneFile("model.onnx")
(_model.path.parent / "weights.bin").write_bytes(bytes(4096))


def parse(data: bytes) -> None:
    """Read a model, and every weight of it."""
    found = open_onnx(_model(data)).model
    for value in found.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, LazyTensor) and tensor.nbytes < READ_BYTES:
            assert len(tensor.tobytes()) == tensor.nbytes


def external(name: str, shape: list[int], offset: int, length: int, location: str = "weights.bin") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def models() -> list[bytes]:
    """A product with weights of both kinds, and a graph with a subgraph and a function."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    inline = numpy_helper.from_array(np.eye(4, dtype=np.float32), "a")
    outer = external("b", [4, 4], 64, 64)
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
    plain = helper.make_graph(nodes, "plain", [x], [y], [inline, outer])
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "branch", [], [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, None)], [external("c", [2], 0, 8)])  # fmt: skip
    true = numpy_helper.from_array(np.array(True), "t")
    choice = helper.make_node("If", ["t"], ["y"], then_branch=branch, else_branch=branch)
    body = [helper.make_node("Identity", ["p"], ["q"])]
    function = helper.make_function("own", "F", ["p"], ["q"], body, [helper.make_opsetid("", 21)])
    nested = helper.make_graph([choice], "nested", [x], [y], [true])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    made = [helper.make_model(plain, opset_imports=opsets[:1])]
    made.append(helper.make_model(nested, opset_imports=opsets, functions=[function]))
    return [model.SerializeToString() for model in made] + [onnx.ModelProto().SerializeToString()]


MODEL = Target(
    parse,
    models,
    ("weights.bin", "location", "offset", "length", "../", "/etc/passwd", "MatMul", "If", "Identity"),
    longest=4096,
)
