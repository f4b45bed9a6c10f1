"""Manifests: canonical text, clear refusals, source digests."""

from __future__ import annotations

import hashlib
import json
import string
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from l4convert import __version__
from l4convert.emit import manifest as subject
from l4convert.emit import read_manifest, source_digests, write_artifact
from l4convert.emit.manifest import build_manifest, encode_manifest, is_canonical
from l4convert.errors import InputError
from tests.emit.models import two_layer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_manifest_describes_tensors_and_files(tmp_path: Path) -> None:
    out = write_artifact(two_layer(), tmp_path / "out", manifest={"recipe": "none", "config": {"layers": (1, 2)}})
    manifest = read_manifest(out)
    assert manifest["schema"] == "l4convert.manifest/1"
    assert manifest["tool"] == {"name": "l4convert", "version": __version__}
    assert manifest["libraries"]["onnx"] == version("onnx")
    assert manifest["recipe"] == "none"
    assert manifest["config"] == {"layers": [1, 2]}
    weight = two_layer().graph.initializers["weight"].const_value
    assert weight is not None
    expected = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
    assert manifest["tensors"]["weight"] == {"dtype": "FLOAT", "shape": [64, 64], "nbytes": 16384, "sha256": expected}
    for name, entry in manifest["files"].items():
        content = (out / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert set(manifest["files"]) == {"model.onnx", "model.safetensors"}


@given(st.dictionaries(st.text(string.ascii_letters, min_size=1), JSON, max_size=4))
def test_any_json_fields_round_trip(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]) -> None:
    fields = {f"x_{key}": value for key, value in fields.items()}
    manifest = build_manifest(fields, {"w": {"nbytes": 1}}, {"f": {"bytes": 1}})
    encoded = encode_manifest(manifest)
    read = json.loads(encoded)
    assert {key: value for key, value in read.items() if key != "sha256"} == manifest
    path = tmp_path_factory.mktemp("manifest") / "l4convert.json"
    path.write_bytes(encoded)
    assert is_canonical(path, read)
    assert encode_manifest(read) == encoded


def test_callers_cannot_take_the_manifests_own_fields() -> None:
    with pytest.raises(ValueError, match="tensors"):
        build_manifest({"tensors": {}}, {}, {})


def test_fields_that_are_not_json_are_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_manifest({"a": float("nan")})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "a JSON object was expected"),
        (b"{}", "its schema is None"),
        (b'{"schema": 7}', "its schema is 7"),
        (b'{"schema": {"a": 1}}', "its schema is"),
        (b'{"schema": "l4convert.manifest/2"}', "its schema is 'l4convert.manifest/2'"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"schema": "a", "schema": "b"}', "occurs twice"),
    ],
)
def test_damaged_manifests_are_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "l4convert.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_manifest(tmp_path)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500


def test_other_folders_are_not_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"is not an l4convert artifact \(no l4convert.json\)"):
            read_manifest(path)
    monkeypatch.setattr(subject, "MAX_MANIFEST_BYTES", 10)
    (tmp_path / "l4convert.json").write_bytes(b" " * 11)
    with pytest.raises(InputError, match="more than the 10"):
        read_manifest(tmp_path)


def test_small_source_files_are_hashed_whole(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub" / "tokenizer.json").write_text("[]")
    digests = source_digests([tmp_path / "sub" / "tokenizer.json", tmp_path / "config.json"])
    assert digests == {
        "config.json": {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()},
        "sub/tokenizer.json": {"bytes": 2, "sha256": hashlib.sha256(b"[]").hexdigest()},
    }
    assert source_digests([]) == {}


def test_large_shards_are_identified_by_header_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(subject, "_TAIL_BYTES", 100)
    save_file({"a": np.zeros(1000, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "consolidated.pth").write_bytes(bytes(2000) + b"end")

    def digests() -> dict[str, dict[str, Any]]:
        return source_digests([tmp_path / "model.safetensors", tmp_path / "consolidated.pth"])

    before = digests()
    data = (tmp_path / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    shard = {"bytes": len(data), "header_sha256": hashlib.sha256(data[:length]).hexdigest()}
    assert before["model.safetensors"] == shard
    assert before["consolidated.pth"]["tail_sha256"] == hashlib.sha256(bytes(97) + b"end").hexdigest()
    save_file({"b": np.zeros(1000, np.float32)}, tmp_path / "model.safetensors")
    assert digests()["model.safetensors"] != before["model.safetensors"]


def test_a_hostile_header_length_reads_no_more_than_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "WHOLE_BYTES", 1000)
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 8 + bytes(3000))
    entry = source_digests([tmp_path / "x.safetensors"])["x.safetensors"]
    assert entry["header_sha256"] == hashlib.sha256(b"\xff" * 8 + bytes(1000)).hexdigest()


def test_an_unreadable_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.json: cannot be read"):
        source_digests([tmp_path / "gone.json"])
