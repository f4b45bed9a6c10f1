"""Models that somebody else wrote are read as they are, and refused where they are not whole or not honest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from l4convert.checkpoint.lazy import LazyTensor
from l4convert.errors import InputError
from l4convert.onnx_in import open_onnx
from tests.exports import FOLDER

WEIGHT = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)


def tiny() -> onnx.ModelProto:
    """y = x @ weight + bias"""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6])
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["p"]), helper.make_node("Add", ["p", "bias"], ["y"])]
    weights = [numpy_helper.from_array(WEIGHT, "weight"), numpy_helper.from_array(WEIGHT[0], "bias")]
    graph = helper.make_graph(nodes, "tiny", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def external(model: onnx.ModelProto, location: str = "w.bin", **fields: str) -> None:
    """Let the weight be in another file."""
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **fields}.items():
        weight.external_data.add(key=key, value=value)


def save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    (folder / "w.bin").write_bytes(WEIGHT.tobytes())
    return path


def test_weights_are_lazy_and_small_constants_are_not():
    model = open_onnx(FOLDER / "eager.onnx").model
    reference = onnx.load(FOLDER / "eager.onnx")
    lazy = 0
    for tensor in reference.graph.initializer:
        stored = model.graph.initializers[tensor.name].const_value
        assert stored is not None
        array = numpy_helper.to_array(tensor)
        assert np.array_equal(stored.numpy(), array)
        assert stored.tobytes() == np.ascontiguousarray(array).tobytes()
        lazy += isinstance(stored, LazyTensor)
        assert isinstance(stored, LazyTensor) == (array.ndim > 1 and array.dtype == np.float32)
    assert lazy > 15


@pytest.mark.parametrize("fields", [{}, {"offset": "0", "length": "192"}, {"offset": "0"}])
def test_a_file_beside_the_model_is_mapped(tmp_path, fields):
    model = tiny()
    external(model, **fields)
    found = open_onnx(save(model, tmp_path))
    assert np.array_equal(found.model.graph.initializers["weight"].const_value.numpy(), WEIGHT)
    assert [file.name for file in found.files] == ["model.onnx", "w.bin"]
    assert found.nbytes == (tmp_path / "model.onnx").stat().st_size + 192


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.INT4])
def test_values_in_fields_of_their_own_are_read(tmp_path, dtype):
    model = tiny()
    values = np.arange(48) % 7
    tensor = helper.make_tensor("other", dtype, [8, 6], values.astype(np.float32))
    assert not tensor.raw_data
    model.graph.initializer.append(tensor)
    found = open_onnx(save(model, tmp_path)).model.graph.initializers["other"].const_value
    assert np.array_equal(found.numpy().astype(np.float32), values.reshape(8, 6))
    assert found.tobytes() == numpy_helper.to_array(tensor).tobytes() or dtype == TensorProto.INT4


def test_a_file_that_changes_after_it_was_opened_is_told(tmp_path):
    model = tiny()
    external(model)
    found = open_onnx(save(model, tmp_path))
    (tmp_path / "w.bin").write_bytes(b"x" * 300)
    with pytest.raises(InputError, match="changed since it was opened"):
        found.model.graph.initializers["weight"].const_value.numpy()


def _function(name: str, *calls: str) -> onnx.FunctionProto:
    nodes = [helper.make_node(call, ["a"], [f"b{i}"], domain="f") for i, call in enumerate(calls)]
    nodes.append(helper.make_node("Relu", ["a"], ["b"]))
    return helper.make_function("f", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 20)])


def _call(model, *functions):
    model.functions.extend(functions)
    model.opset_import.append(helper.make_opsetid("f", 1))
    model.graph.node.append(helper.make_node("f0", ["x"], ["z"], domain="f"))


def _laughs(model):
    _call(model, *(_function(f"f{i}", *[f"f{i + 1}"] * 10) for i in range(12)), _function("f12"))


def _sparse(model):
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def _subgraph_takes_unknown(model):
    inner = helper.make_graph(
        [helper.make_node("Identity", ["nowhere"], ["o"])],
        "inner",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(True), "c"))
    model.graph.node.append(helper.make_node("If", ["c"], ["i"], then_branch=inner, else_branch=inner))


def _external_attribute(model):
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.bin")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=tensor))


def _overlap(model):
    external(model, offset="0")
    other = model.graph.initializer.add()
    other.CopyFrom(model.graph.initializer[0])
    other.name = "other"
    other.dims[:] = [2, 6]
    next(e for e in other.external_data if e.key == "offset").value = "96"


def _set(name: str, value: object) -> Callable[[onnx.ModelProto], None]:
    return lambda model: setattr(model.graph.initializer[0], name, value)


def _dims(*dims: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[:] = dims

    return change


def _at(location: str, **fields: str) -> Callable[[onnx.ModelProto], None]:
    return lambda model: external(model, location, **fields)


def _opset(version: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return change


def _edit(function: Callable[[onnx.GraphProto], object]) -> Callable[[onnx.ModelProto], None]:
    return lambda model: function(model.graph) and None


HOSTILE: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "absolute": (_at("/etc/passwd"), "tensor 'weight'.*is absolute"),
    "drive": (_at("C:\\w.bin"), "is absolute"),
    "up": (_at("../w.bin"), "leads out"),
    "up in the middle": (_at("a/../../w.bin"), "leads out"),
    "up with backslashes": (_at("..\\w.bin"), "leads out"),
    "nul": (_at("w\0.bin"), "not a file's name"),
    "no name": (_at(""), "not a file's name"),
    "absent": (_at("v.bin"), "tensor 'weight': v.bin: No such file"),
    "folder": (_at("."), "is not a file"),
    "link out": (_at("link.bin"), "link that leads out"),
    "through a linked folder": (_at("linked/w.bin"), "link that leads out"),
    "negative offset": (_at("w.bin", offset="-8"), "offset.*is not a number"),
    "offset behind the end": (_at("w.bin", offset="4"), "ends 4 bytes behind the end"),
    "huge offset": (_at("w.bin", offset="9" * 18), "behind the end"),
    "offset of many digits": (_at("w.bin", offset="9" * 5000), "is not a number"),
    "negative length": (_at("w.bin", length="-1"), "length.*is not a number"),
    "other length": (_at("w.bin", length="100"), "takes 192 bytes, its external_data gives 100"),
    "unknown key": (_at("w.bin", scheme="http"), "not known"),
    "overlap": (_overlap, "overlaps tensor 'weight' in w.bin"),
    "external attribute": (_external_attribute, "only initializers may be outside"),
    "too few bytes": (_set("raw_data", b"1234"), r"FLOAT \[8, 6\] takes 192 bytes, it has 4"),
    "no bytes": (lambda m: m.graph.initializer[0].ClearField("raw_data"), "in no field"),
    "two fields": (lambda m: m.graph.initializer[0].float_data.append(1.0), "raw_data and float_data"),
    "huge shape": (_dims(2**40, 2**40), "takes"),
    "negative shape": (_dims(-8, -6), "is not a list"),
    "many axes": (_dims(*[1] * 40), "at most 16 sizes"),
    "unknown type": (_set("data_type", 99), "data type 99"),
    "undefined type": (_set("data_type", 0), "data type 0"),
    "strings": (lambda m: m.graph.initializer.add(name="s", data_type=8, dims=[3]), "does not have 0 strings"),
    "sparse": (_sparse, "sparse tensors"),
    "twice": (_edit(lambda g: g.initializer.append(g.initializer[0])), "one that another value has"),
    "cycle": (_edit(lambda g: g.node[0].input.__setitem__(0, "y")), "before anything gives it"),
    "unsorted": (_edit(lambda g: g.node.insert(0, g.node[1])), "before anything gives it"),
    "given twice": (_edit(lambda g: g.node.append(g.node[1])), "which is there already"),
    "unknown input": (_edit(lambda g: g.node[1].input.__setitem__(1, "zzz")), "takes 'zzz'"),
    "unknown output": (_edit(lambda g: setattr(g.output[0], "name", "zzz")), "puts out 'zzz'"),
    "subgraph": (_subgraph_takes_unknown, "takes 'nowhere'"),
    "no operator": (_edit(lambda g: setattr(g.node[0], "op_type", "")), "has no operator"),
    "unknown operator": (_edit(lambda g: setattr(g.node[0], "op_type", "Frobnicate")), "Frobnicate"),
    "opset 0": (_opset(0), "opset 0 is not known"),
    "opset 99": (_opset(99), "opset 99 is not known"),
    "negative opset": (_opset(-1), "opset -1 is not known"),
    "no opset": (lambda m: m.ClearField("opset_import"), "imports no version"),
    "recursion": (lambda m: _call(m, _function("f0", "f1"), _function("f1", "f0")), "calls itself"),
    "a function twice": (lambda m: _call(m, _function("f0"), _function("f0")), "defined twice"),
    "a thousand laughs": (_laughs, "unfold into more than"),
    "no graph": (lambda m: m.ClearField("graph"), "no graph"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_model_is_refused_in_one_line_that_names_the_file(tmp_path, case):
    change, reason = HOSTILE[case]
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    (folder / "linked").symlink_to(tmp_path)
    model = tiny()
    change(model)
    with pytest.raises(InputError, match=reason) as caught:
        open_onnx(save(model, folder))
    assert "model.onnx" in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("data", [b"", b"\x08", b"not a model at all", bytes(1000), b"\x3a\xff\xff\xff\xff\x0f"])
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"model\.onnx"):
        open_onnx(path)


def test_a_name_that_is_no_text_is_refused(tmp_path):
    path = save(tiny(), tmp_path)
    path.write_bytes(path.read_bytes().replace(b"bias", b"b\xb8as"))
    with pytest.raises(InputError, match="is not UTF-8"):
        open_onnx(path)


def _field(number: int, data: bytes) -> bytes:
    """A message in a message, as protobuf writes it."""
    length, prefix = len(data), bytearray([number << 3 | 2])
    while length > 127:
        prefix.append(length & 127 | 128)
        length >>= 7
    return bytes([*prefix, length]) + data


def test_deep_subgraphs_are_refused(tmp_path):
    graph = b""
    for _ in range(60):
        graph = _field(1, _field(5, _field(6, graph)))  # GraphProto.node, NodeProto.attribute, AttributeProto.g
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x0a" + _field(7, graph))
    with pytest.raises(InputError, match="is not an ONNX model"):
        open_onnx(path)


def test_a_link_inside_the_folder_is_followed(tmp_path):
    model = tiny()
    external(model, "link.bin")
    path = save(model, tmp_path)
    (tmp_path / "link.bin").symlink_to("w.bin")
    assert np.array_equal(open_onnx(path).model.graph.initializers["weight"].const_value.numpy(), WEIGHT)
