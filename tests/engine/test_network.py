"""What is read off a graph before it is built, and the two changes that are made to it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from l4convert.engine.network import Capacity, graph_facts, load_graph, set_capacity, with_plugin_nodes
from l4convert.engine.shapes import input_shapes, token_profiles
from l4convert.errors import InputError


def _external(name: str, kind: int, dims: list[int]) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="model.safetensors")
    return tensor


def _cache(name: str, length: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", 2, length, 4])


def _model() -> onnx.ModelProto:
    quantize = helper.make_node("QuantizeLinear", ["x", "one"], ["q"], output_dtype=TensorProto.FLOAT8E4M3FN)
    branch = helper.make_graph([quantize], "branch", [], [], [_external("one", TensorProto.BFLOAT16, [])])
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wide"], block_size=32),
        helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
        helper.make_node("MoE", ["x"], ["z"], domain="l4convert", activations=""),
    ]
    inputs = [_cache("past_key_values.0.key", "max_sequence"), _cache("past_key_values.1.key", "chunked_max_sequence")]
    outputs = [_cache("present.0.key", "max_sequence")]
    weights = [
        _external("w", TensorProto.INT4, [64, 3]),
        _external("s", TensorProto.FLOAT16, [2, 3]),
        _external("experts_int4_packed", TensorProto.INT32, [2, 4, 5]),
        _external("experts_int4_packed_scale", TensorProto.FLOAT16, [2, 1, 5]),
        _external("experts_fp8_packed", TensorProto.INT64, [2, 5, 3]),
        _external("norm", TensorProto.FLOAT, [7]),
    ]
    functions = [helper.make_function(domain, "MoE", ["x"], ["z"], [], []) for domain in ("l4convert", "other")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    return helper.make_model(graph, functions=functions)


def test_weights_are_counted_by_kind() -> None:
    facts = graph_facts(_model())
    assert facts.quantized_weights == 64 * 3 + 2 * 4 * 5 * 8 + 2 * 5 * 3 * 8
    assert facts.packed_bytes == 64 * 3 // 2 + 2 * 4 * 5 * 4 + 2 * 5 * 3 * 8
    assert facts.unquantized_bytes == 7 * 4 + 2 * 2  # the norm, and the scalar in both branches
    assert facts.weights_bytes == 96 + 12 + 160 + 20 + 240 + 28 + 4
    assert facts.precisions == {"int4", "fp16", "fp32", "bf16", "fp8"}


@pytest.mark.parametrize(("activations", "needed"), [("", set()), ("fp8", {"fp8"})])
def test_a_plugin_that_rounds_activations_to_fp8_needs_hardware_for_it(activations: str, needed: set[str]) -> None:
    call = helper.make_node("MoE", ["x", "experts_fp8_packed"], ["z"], domain="l4convert", activations=activations)
    words = _external("experts_fp8_packed", TensorProto.INT64, [2, 5, 3])
    assert graph_facts(helper.make_model(helper.make_graph([call], "g", [], [], [words]))).precisions == needed


def test_only_the_lengths_of_caches_become_numbers() -> None:
    model, before = _model(), _model()
    set_capacity(model, Capacity(64, 8))
    lengths = [value.type.tensor_type.shape.dim[2].dim_value for value in (*model.graph.input, *model.graph.output)]
    assert lengths == [64, 8, 64]
    for value in (*model.graph.input, *model.graph.output):
        old = next(v for v in (*before.graph.input, *before.graph.output) if v.name == value.name)
        value.type.tensor_type.shape.dim[2].CopyFrom(old.type.tensor_type.shape.dim[2])
    assert model == before


def test_a_cache_of_another_length_is_refused() -> None:
    model = _model()
    model.graph.input[1].type.tensor_type.shape.dim[2].dim_param = "past_sequence"
    with pytest.raises(InputError, match=r"the length of past_key_values\.1\.key is neither"):
        set_capacity(model, Capacity(64, 8))


def test_only_our_own_functions_are_removed_for_plugins() -> None:
    model = _model()
    bare = with_plugin_nodes(model)
    assert [function.domain for function in bare.functions] == ["other"]
    assert bare.graph == model.graph
    assert model == _model()


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="is not an ONNX model"):
        load_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("prefill", "capacity", "expected"),
    [
        (512, Capacity(8192, 8192), [(1, 512, 512), (1, 1, 1)]),
        (512, Capacity(8192, 128), [(1, 128, 128), (1, 1, 1)]),  # a call lies in one chunk
        (4, Capacity(6, 6), [(1, 4, 4), (1, 1, 1)]),
    ],
)
def test_profiles_stay_within_a_chunk(prefill: int, capacity: Capacity, expected: list[tuple[int, ...]]) -> None:
    assert [(p.least, p.usual, p.most) for p in token_profiles(prefill, capacity)] == expected


def test_an_input_that_no_engine_knows_is_refused() -> None:
    profile = token_profiles(8, Capacity(64, 8))[0]
    image = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", "height"])
    with pytest.raises(InputError, match="input pixels has a dimension 'height'"):
        input_shapes([image], profile, 1, Capacity(64, 8))
