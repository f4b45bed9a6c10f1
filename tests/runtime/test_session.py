from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l4convert.errors import BackendMissing, InputError, UsageError
from l4convert.runtime import OrtSession
from tests.artifacts import KV_CACHES, LENGTH


def assert_close(logits: np.ndarray, expected: np.ndarray) -> None:
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def sessions(artifacts: dict[str, Path]) -> dict[str, OrtSession]:
    return {form: OrtSession.open(path, max_length=LENGTH + 8, threads=1) for form, path in artifacts.items()}


@pytest.mark.parametrize("form", KV_CACHES)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, LENGTH - 1), max_size=8))
def test_any_split_of_a_text_gives_the_logits_of_transformers(
    form: str, cuts: set[int], sessions: dict[str, OrtSession], ids: np.ndarray, expected: np.ndarray
) -> None:
    stream = sessions[form].start(1)
    logits = [stream.step(part[None])[0] for part in np.split(ids, sorted(cuts))]
    assert_close(np.concatenate(logits), expected)


@pytest.mark.parametrize("form", KV_CACHES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_get_what_they_would_get_alone(
    form: str, side: str, sessions: dict[str, OrtSession], ids: np.ndarray, expected: np.ndarray
) -> None:
    mask = np.ones((2, 20), np.int64)
    mask[1, :7] = 0
    batch = np.stack([ids[:20], np.concatenate([np.zeros(7, np.int64), ids[:13]])])
    if side == "right":
        mask[1], batch[1] = np.roll(mask[1], -7), np.roll(batch[1], -7)
    stream = sessions[form].start(2)
    logits = stream.step(batch, mask)
    assert_close(logits[0], expected[:20])
    assert_close(logits[1][mask[1] == 1], expected[:13])
    following = stream.step(np.array([[ids[20]], [ids[13]]]))
    assert_close(following[0], expected[20:21])
    assert_close(following[1], expected[13:14])


@pytest.mark.parametrize("form", KV_CACHES)
def test_streams_do_not_share_their_caches(
    form: str, sessions: dict[str, OrtSession], ids: np.ndarray, expected: np.ndarray
) -> None:
    first, second = sessions[form].start(1), sessions[form].start(1)
    first.step(ids[None, :9])
    assert_close(second.step(ids[None, :12])[0], expected[:12])
    assert_close(first.step(ids[None, 9:12])[0], expected[9:12])


def test_static_buffers_are_allocated_once_and_as_long_as_each_layer_needs(sessions: dict[str, OrtSession]) -> None:
    stream = sessions["static"].start(2)
    buffers = stream._cache._buffers  # type: ignore[attr-defined]
    before = [buffer.data_ptr() for buffer in buffers]
    stream.step(np.full((2, 3), 5))
    assert [buffer.data_ptr() for buffer in buffers] == before
    assert all(np.abs(buffer.numpy()).sum() > 0 for buffer in buffers)
    # Layers 0 to 2 are chunked (C = 8), layer 3 is global; a key and a value each.
    assert [buffer.shape()[2] for buffer in buffers] == [8] * 6 + [LENGTH + 8] * 2


@pytest.mark.parametrize("form", KV_CACHES)
def test_a_stream_that_is_full_says_how_much_it_has(form: str, artifacts: dict[str, Path]) -> None:
    stream = OrtSession.open(artifacts[form], max_length=10).start(1)
    stream.step(np.full((1, 8), 5))
    with pytest.raises(UsageError, match="needs 11 positions and the session has 10"):
        stream.step(np.full((1, 3), 5))
    stream.step(np.full((1, 2), 5))  # a refused call left no trace


def test_the_models_own_positions_are_the_last_limit(artifacts: dict[str, Path]) -> None:
    assert OrtSession.open(artifacts["growing"]).max_length == 4096
    assert OrtSession.open(artifacts["static"]).max_length == 4096
    for length in (0, 4097):
        with pytest.raises(UsageError, match=f"maximum length of {length}"):
            OrtSession.open(artifacts["growing"], max_length=length)


@pytest.mark.parametrize("token", [-1, 128])
def test_tokens_outside_the_vocabulary_are_refused(token: int, sessions: dict[str, OrtSession]) -> None:
    with pytest.raises(InputError, match=f"token {token} is outside the model's vocabulary of 128"):
        sessions["growing"].start(1).step(np.array([[5, token]]))


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        (np.zeros((2, 3), np.int64), None),
        (np.zeros((1, 0), np.int64), None),
        (np.zeros(3, np.int64), None),
        (np.zeros((1, 3), np.int64), np.ones((1, 2), np.int64)),
        (np.zeros((1, 3), np.int64), np.full((1, 3), 2)),
    ],
)
def test_shapes_that_do_not_fit_are_programming_errors(
    ids: np.ndarray, mask: np.ndarray | None, sessions: dict[str, OrtSession]
) -> None:
    with pytest.raises(ValueError, match=r"input_ids|mask"):
        sessions["growing"].start(1).step(ids, mask)


def rename_cache_input(model: onnx.ModelProto) -> None:
    next(value for value in model.graph.input if value.name == "past_key_values.0.key").name = "past.0.key"


def drop_cache_output(model: onnx.ModelProto) -> None:
    del model.graph.output[-1]


def change_heads(model: onnx.ModelProto) -> None:
    shape = next(v for v in model.graph.input if v.name == "past_key_values.0.key").type.tensor_type.shape
    shape.dim[1].dim_value = 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename_cache_input, "misses input past_key_values.0.key|ONNX Runtime cannot load"),
        (drop_cache_output, "misses output present.3.value"),
        (change_heads, "the manifest says 2 heads of 16|ONNX Runtime cannot load"),
    ],
)
def test_a_graph_that_breaks_the_contract_is_refused(
    damage: Callable[[onnx.ModelProto], None], message: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(artifacts["growing"], tmp_path / "copy")
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    damage(model)
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=message) as caught:
        OrtSession.open(copy)
    assert "model.onnx" in caught.value.message
    assert "\n" not in caught.value.message


def edit_manifest(folder: Path, **changes: Any) -> None:
    file = folder / "l4convert.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache": "elastic"}, "kv_cache is 'elastic'"),
        ({"kv_cache": None}, "damaged manifest"),
        ({"config": {"vocab_size": 3}}, "damaged manifest"),
        ({"config": 7}, "damaged manifest"),
        ({"recipe": 3}, "damaged manifest"),
        ({"schema": "l4convert.manifest/99"}, "schema"),
    ],
)
def test_a_damaged_manifest_is_refused(
    changes: dict[str, Any], message: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(artifacts["growing"], tmp_path / "copy")
    edit_manifest(copy, **changes)
    with pytest.raises(InputError, match=message):
        OrtSession.open(copy)


@pytest.mark.parametrize(
    "change", [{"num_key_value_heads": -1}, {"attention_chunk_size": 0}, {"head_dim": "8"}], ids=str
)
def test_a_manifest_with_impossible_sizes_is_refused(
    change: dict[str, Any], artifacts: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(artifacts["growing"], tmp_path / "copy")
    config = json.loads((copy / "l4convert.json").read_text())["config"]
    edit_manifest(copy, config=config | change)
    with pytest.raises(InputError, match=f"damaged manifest: .*{next(iter(change))}"):
        OrtSession.open(copy)


def test_a_manifest_without_a_config_is_refused(artifacts: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(artifacts["growing"], tmp_path / "copy")
    manifest = json.loads((copy / "l4convert.json").read_text())
    del manifest["config"]
    (copy / "l4convert.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="damaged manifest: KeyError"):
        OrtSession.open(copy)


def test_what_is_no_artifact_is_refused(artifacts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"l4convert\.json"):
        OrtSession.open(tmp_path)
    copy = shutil.copytree(artifacts["growing"], tmp_path / "copy")
    (copy / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        OrtSession.open(copy)
    (copy / "model.onnx").unlink()
    with pytest.raises(InputError, match=r"model\.onnx: no such file"):
        OrtSession.open(copy)


def test_without_onnxruntime_the_message_is_the_install_command(
    artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendMissing, match="pip install onnxruntime-gpu"):
        OrtSession.open(artifacts["growing"])
