"""Sessions of artifacts with quantized caches: what they start with, carry along, and refuse."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.emit import write_artifact
from l4convert.errors import InputError
from l4convert.runtime import OrtSession
from l4convert.runtime.cache_elements import CacheElements, cache_elements
from l4convert.runtime.ort_values import as_float32, ort_value
from tests.artifacts import LENGTH
from tests.caches import quantized

# (form, format, which layers, target)
CASES = [
    ("static", "int4", "all", "cpu"),
    ("static", "int8", "global", "cpu"),
    ("windowed", "fp8", "all", "portable"),
    ("growing", "int4", "global", "cpu"),
]


@pytest.fixture(scope="module")
def quantized_artifacts(scout_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    made, source = {}, open_checkpoint(scout_layout)
    for case in CASES:
        kv_cache, dtype, layers, target = case
        model = quantized(source, dtype, kv_cache, target, layers=layers)  # type: ignore[arg-type]
        fields = {"kv_cache": kv_cache, "target": target, "recipe": "none", "config": asdict(source.config)}
        out = tmp_path_factory.mktemp("quantized") / "-".join(case)
        made[case] = write_artifact(model, out, sidecars=source.sidecars, manifest=fields)
    return made


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_any_split_gives_the_same_logits(case, quantized_artifacts, ids, expected):
    with OrtSession.open(quantized_artifacts[case], max_length=LENGTH, threads=1) as session:
        whole = session.start(1).step(ids[None])[0]
        for cuts in ([8, 16, 24, 32], [1, 2, 3, 9, 30], range(1, LENGTH)):
            stream = session.start(1)
            logits = np.concatenate([stream.step(part[None])[0] for part in np.split(ids, cuts)])
            assert np.abs(logits - whole).max() < 1e-3 * np.abs(whole).max()
        batch = session.start(2).step(np.stack([ids, ids[::-1]]))[0]
        assert np.abs(batch - whole).max() < 1e-3 * np.abs(whole).max()
    # Rounded, and still the model.
    assert 1e-4 < np.abs(whole - expected).max() / np.abs(expected).max() < 0.6


@pytest.mark.parametrize(
    ("type_name", "dtype", "width", "zero"),
    [
        ("tensor(float)", np.float32, 16, 0),
        ("tensor(bfloat16)", ml_dtypes.bfloat16, 16, 0),
        ("tensor(float8e4m3fn)", ml_dtypes.float8_e4m3fn, 16, 0),
        ("tensor(int8)", np.int8, 16, 0),
        ("tensor(uint8)", np.uint8, 8, 0x88),
    ],
)
def test_empty_caches_hold_zeros_of_their_type(type_name, dtype, width, zero):
    elements = cache_elements(type_name, 16)
    assert elements == CacheElements(np.dtype(dtype), width, zero)
    made = elements.zeros(2, 3, 5)
    assert (made.shape, made.dtype) == ((2, 3, 5, width), dtype)
    value = ort_value(made)
    assert value.shape() == [2, 3, 5, width]
    assert (as_float32(value) == zero).all()


def test_types_that_no_cache_has_are_unknown():
    assert cache_elements("tensor(int64)", 16) is None


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("past_key_values.1.key", onnx.TensorProto.INT64, r"caches of type tensor\(int64\), tensor\(uint8\), expected"),
        ("past_key_values.1.key", onnx.TensorProto.INT8, r"caches of type tensor\(int8\), tensor\(uint8\), expected"),
    ],
)
def test_caches_of_other_types_are_refused(quantized_artifacts, tmp_path, name, to, message):
    """What a client makes of a cache follows from its type, so one of another type is no cache of ours."""
    artifact = tmp_path / "artifact"
    shutil.copytree(quantized_artifacts[CASES[0]], artifact)
    _rewrite(artifact, lambda cache: setattr(cache.type.tensor_type, "elem_type", to), name)
    with pytest.raises(InputError, match=message):
        OrtSession.open(artifact)


def test_packed_caches_of_another_width_are_refused(quantized_artifacts, tmp_path):
    artifact = tmp_path / "artifact"
    shutil.copytree(quantized_artifacts[CASES[0]], artifact)
    _rewrite(
        artifact, lambda cache: setattr(cache.type.tensor_type.shape.dim[3], "dim_value", 16), "past_key_values.0.key"
    )
    with pytest.raises(InputError, match=r"input past_key_values.0.key has shape .*, the manifest says 2 heads of 8"):
        OrtSession.open(artifact)


def _rewrite(artifact: Path, change, name: str) -> None:
    """Change one input of a graph, of which only the declarations are kept: past -> present, and logits of nothing."""
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    (cache,) = (value for value in model.graph.input if value.name == name)
    change(cache)
    nodes = [
        onnx.helper.make_node("Identity", [value.name], [value.name.replace("past_key_values", "present")])
        for value in model.graph.input
        if value.name.startswith("past")
    ]
    nodes.append(onnx.helper.make_node("Cast", ["input_ids"], ["logits"], to=onnx.TensorProto.FLOAT))
    graph = onnx.helper.make_graph(
        nodes, "declarations", model.graph.input,
        [onnx.helper.make_empty_tensor_value_info(output) for node in nodes for output in node.output],
    )  # fmt: skip
    onnx.save(onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=11), artifact / "model.onnx")
