"""bfloat16 graphs on ONNX Runtime's CPU provider: every operator rounds to bfloat16, and nothing else is changed."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from l4convert.errors import InputError
from l4convert.runtime.cpu_form import cpu_form_of, to_cpu_form
from l4convert.runtime.ort_values import as_float32, ort_value

BF16 = ml_dtypes.bfloat16
B, F, INT, BOOL = TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
OPSET = [helper.make_opsetid("", 24), helper.make_opsetid("test", 1)]


def info(name, dtype=B, shape=(None, None)):
    return helper.make_tensor_value_info(name, dtype, shape)


def initializer(name, array):
    tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
    assert tensor.data_type in {B, F, INT}
    return tensor


def model_of(nodes, inputs, outputs, initializers=(), functions=()):
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(initializers))
    return helper.make_model(graph, opset_imports=OPSET, ir_version=11, functions=list(functions))


def session_of(content: bytes):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    """Outputs of the rewritten model; those that are bfloat16 as such."""
    changed = ir.from_proto(model)
    to_cpu_form(changed)
    proto = ir.to_proto(changed)
    onnx.checker.check_model(proto)  # names are not used twice, say
    session = session_of(proto.SerializeToString())
    declared = [output.type.tensor_type.elem_type for output in model.graph.output]
    values = session.run_with_ort_values(None, {name: ort_value(array) for name, array in feeds.items()})
    assert [value.element_type() for value in values] == declared
    return [as_float32(v).astype(BF16) if v.element_type() == B else v.numpy() for v in values]


def noise(*shape: int) -> np.ndarray:
    """Numbers that need all 8 bits of bfloat16 and are exact in it."""
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(BF16)


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


X, Y, W = noise(3, 4), noise(3, 1), noise(4, 5)


def test_the_cpu_provider_has_no_such_arithmetic():
    """What the rewriting is for; where it loads, the rewriting may go."""
    model = model_of([helper.make_node("Add", ["x", "x"], ["y"])], [info("x")], [info("y")])
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        session_of(model.SerializeToString())


def test_a_chain_rounds_after_every_operator():
    """Sums that a single rounding at the end would get wrong."""
    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"]),
        helper.make_node("Mul", ["sum", "x"], ["product"]),
        helper.make_node("Sub", ["product", "y"], ["z"]),
    ]
    model = model_of(nodes, [info("x"), info("y")], [info("z"), info("sum")])
    z, total = run(model, x=X, y=Y)
    step = (X + Y).astype(BF16)  # ml_dtypes' own arithmetic: in float32, rounded
    expected = ((step * X).astype(BF16) - Y).astype(BF16)
    assert np.array_equal(total, step)
    assert np.array_equal(z, expected)
    once = ((wide(X) + wide(Y)) * wide(X) - wide(Y)).astype(BF16)
    assert not np.array_equal(z, once)


def test_products_and_norms_with_stored_weights():
    weight, scale = noise(4, 5), noise(5)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("RMSNormalization", ["h", "scale"], ["n"], axis=-1, epsilon=1e-5),
    ]
    stored = [initializer("w", weight), initializer("scale", scale)]
    h, n = run(model_of(nodes, [info("x")], [info("h"), info("n")], stored), x=X)
    product = X.astype(np.float64) @ weight.astype(np.float64)
    assert np.array_equal(h, product.astype(BF16))
    rms = np.sqrt(np.mean(h.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-5)
    assert np.array_equal(n, (h.astype(np.float64) / rms * scale.astype(np.float64)).astype(BF16))


def test_where_and_comparisons():
    nodes = [
        helper.make_node("Less", ["x", "y"], ["less"]),
        helper.make_node("Where", ["less", "x", "y"], ["z"]),
        helper.make_node("Cast", ["z"], ["wide"], to=F),
        helper.make_node("Shape", ["z"], ["shape"]),
    ]
    outputs = [info("less", BOOL), info("z"), info("wide", F), info("shape", INT, [2])]
    less, z, widened, shape = run(model_of(nodes, [info("x"), info("y")], outputs), x=X, y=Y)
    assert np.array_equal(less, Y > X)
    assert np.array_equal(z, np.minimum(X, Y))
    assert np.array_equal(widened, wide(z))
    assert shape.tolist() == [3, 4]


def test_moves_stay_as_they_are_and_casts_round():
    nodes = [
        helper.make_node("Cast", ["f"], ["x"], to=B),
        helper.make_node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2),
        helper.make_node("Concat", ["b", "a"], ["joined"], axis=1),
        helper.make_node("Gather", ["joined", "index"], ["row"], axis=0),
        helper.make_node("Transpose", ["row"], ["y"], perm=[1, 0]),
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Cast", ["joined"], ["wide"], to=F),
    ]
    outputs = [info("y"), info("sum"), info("wide", F)]
    model = model_of(nodes, [info("f", F, [3, 4])], outputs, [initializer("index", np.array([2, 0]))])
    changed = ir.from_proto(model)
    to_cpu_form(changed)
    casts = [node for node in changed.graph if node.op_type == "Cast"]
    assert len(casts) == 2 + 2 + 1  # the given ones, two operands of Add, its result
    f = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    x = f.astype(BF16)
    y, total, widened = run(model, f=f)
    assert np.array_equal(widened, wide(np.concatenate([x[:, 2:], x[:, :2]], axis=1)))
    assert np.array_equal(y, np.concatenate([x[:, 2:], x[:, :2]], axis=1)[[2, 0]].T)
    assert np.array_equal(total, (x[:, :2] + x[:, 2:]).astype(BF16))


def test_an_operand_that_several_nodes_use_is_widened_once():
    nodes = [helper.make_node("Mul", ["x", "x"], ["a"]), helper.make_node("Add", ["x", "a"], ["y"])]
    changed = ir.from_proto(model_of(nodes, [info("x")], [info("y")]))
    to_cpu_form(changed)
    assert [node.op_type for node in changed.graph] == ["Cast", "Mul", "Cast", "Cast", "Add", "Cast"]


def test_only_the_first_of_several_results_is_a_number():
    nodes = [helper.make_node("TopK", ["x", "k"], ["best", "index"], axis=-1)]
    model = model_of(nodes, [info("x")], [info("best"), info("index", INT)], [initializer("k", np.array([1]))])
    best, index = run(model, x=X)
    assert np.array_equal(best[:, 0], X.max(axis=1))
    assert np.array_equal(index[:, 0], np.argmax(wide(X), axis=1))


def test_dequantized_weights_have_the_type_of_their_scales():
    codes = np.random.default_rng(0).integers(-8, 8, (4, 5)).astype(ml_dtypes.int4)
    scale = noise(2, 5)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=2),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    quantized = ir.serde.serialize_tensor(ir.Tensor(codes, dtype=ir.DataType.INT4, name="q"))
    (y,) = run(model_of(nodes, [info("x")], [info("y")], [quantized, initializer("s", scale)]), x=X)
    weight = (wide(codes) * np.repeat(wide(scale), 2, axis=0)).astype(BF16)
    assert np.array_equal(y, (X.astype(np.float64) @ weight.astype(np.float64)).astype(BF16))


def loop(body_nodes, outer_used=()):
    """``for i in range(n): h = body(h)``; the body may read values of the outer graph."""
    body = helper.make_graph(
        [*body_nodes, helper.make_node("Identity", ["go"], ["again"])],
        "body",
        [info("i", INT, []), info("go", BOOL, []), info("h", B, [3, 4])],
        [info("again", BOOL, []), info("h_next", B, [3, 4])],
    )
    return helper.make_node("Loop", ["n", "", "start"], ["end"], body=body)


def test_loops_carry_bfloat16_and_see_the_outer_graph():
    """``start`` and ``x`` are widened outside and inside: no name may be there twice."""
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["start"]),
        helper.make_node("Add", ["start", "x"], ["other"]),
        loop([helper.make_node("Mul", ["h", "x"], ["p"]), helper.make_node("Add", ["p", "start"], ["h_next"])]),
        helper.make_node("Add", ["end", "other"], ["y"]),
    ]
    model = model_of(nodes, [info("x", B, [3, 4]), info("n", INT, [])], [info("end", B, [3, 4]), info("y", B, [3, 4])])
    end, y = run(model, x=X, n=np.array(3))
    start = h = (X * X).astype(BF16)
    for _ in range(3):
        h = ((h * X).astype(BF16) + start).astype(BF16)
    assert np.array_equal(end, h)
    assert np.array_equal(y, (h + (start + X).astype(BF16)).astype(BF16))


def branch(name, nodes, output):
    return helper.make_graph(nodes, name, [], [info(output, B, [3, 4])])


@pytest.mark.parametrize("condition", [True, False])
def test_branches_round_what_they_compute_and_hand_on_what_they_do_not(condition):
    """Both widen the same outer value; one gives back the outer value itself."""
    then = branch("then", [helper.make_node("Mul", ["x", "x"], ["t"]), helper.make_node("Add", ["t", "x"], ["u"])], "u")
    other = branch("else", [helper.make_node("Identity", ["x"], ["e"])], "e")
    nodes = [
        helper.make_node("If", ["c"], ["chosen"], then_branch=then, else_branch=other),
        helper.make_node("Mul", ["chosen", "x"], ["y"]),
    ]
    model = model_of(nodes, [info("x", B, [3, 4]), info("c", BOOL, [])], [info("y", B, [3, 4])])
    (y,) = run(model, x=X, c=np.array(condition))
    chosen = ((X * X).astype(BF16) + X).astype(BF16) if condition else X
    assert np.array_equal(y, (chosen * X).astype(BF16))


def test_constants_in_bodies():
    two = numpy_helper.from_array(np.full((1, 1), 1.0078125, BF16), "two")
    constant = helper.make_node("Constant", [], ["two"], value=two)
    model = model_of(
        [loop([constant, helper.make_node("Mul", ["h", "two"], ["h_next"])])],
        [info("start", B, [3, 4]), info("n", INT, [])],
        [info("end", B, [3, 4])],
    )
    (end,) = run(model, start=X, n=np.array(2))
    assert np.array_equal(end, ((X * BF16(1.0078125)).astype(BF16) * BF16(1.0078125)).astype(BF16))


def test_functions_are_inlined_first():
    twice = helper.make_function("test", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], OPSET)
    nodes = [helper.make_node("Twice", ["x"], ["h"], domain="test"), helper.make_node("Mul", ["h", "x"], ["y"])]
    model = model_of(nodes, [info("x")], [info("y")], functions=[twice])
    (y,) = run(model, x=X)
    assert np.array_equal(y, ((X + X).astype(BF16) * X).astype(BF16))
    changed = ir.from_proto(model)
    to_cpu_form(changed)
    assert not changed.functions


@pytest.mark.parametrize(("dtype", "numpy_type"), [(F, np.float32), (TensorProto.FLOAT16, np.float16)])
def test_other_types_are_left_alone(dtype, numpy_type):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Where", ["c", "h", "h"], ["y"]),
        helper.make_node("Cast", ["y"], ["z"], to=F),
    ]
    stored = numpy_helper.from_array(np.ones((4, 5), numpy_type), "w")
    model = ir.from_proto(model_of(nodes, [info("x", dtype), info("c", BOOL)], [info("z", F)], [stored]))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    to_cpu_form(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_file_is_read_with_its_weights_left_beside_it(tmp_path: Path):
    weight = noise(4, 5)
    stored = initializer("w", weight)
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [info("x")], [info("y")], [stored])
    file = tmp_path / "model.onnx"
    onnx.save(model, file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = file.read_bytes()
    content = cpu_form_of(file)
    assert file.read_bytes() == before
    (value,) = onnx.load_from_string(content).graph.initializer
    assert {entry.key: entry.value for entry in value.external_data}["location"] == "weights.bin"


@pytest.mark.parametrize("content", [b"not ONNX", b"\xff" * 40])
def test_what_is_no_model_is_an_input_error(tmp_path: Path, content: bytes):
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(InputError, match="not an ONNX model") as caught:
        cpu_form_of(file)
    assert caught.value.message.startswith(str(file))
    assert "\n" not in caught.value.message
