"""What the manifest says of engines: which fits, is it complete, are its files and tensors what they should be."""

from __future__ import annotations

import copy
import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from l4convert.emit import read_manifest
from l4convert.emit.manifest import encode_manifest
from l4convert.errors import InputError, UsageError
from l4convert.gpus import Gpu
from l4convert.runtime.engine_layout import choose_profile, concrete, plan_layout
from l4convert.runtime.engines import (
    Engine,
    Profile,
    Tensor,
    check_engine_files,
    choose_engine,
    named_engines,
    read_engines,
    with_plugins,
)
from l4convert.runtime.manifest import read_artifact
from tests.runtime.fake_device import BATCH, CONTEXT, PREFILL, add_engines


@pytest.fixture
def artifact(artifacts: dict[str, Path], tmp_path: Path) -> Path:
    return add_engines(Path(shutil.copytree(artifacts["static"], tmp_path / "a")), cuts=(2,))


def edit(artifact: Path, index: int, **changes: Any) -> None:
    """Change fields of one entry."""
    manifest = copy.deepcopy(read_manifest(artifact))
    manifest["engines"][index].update(changes)
    (artifact / "l4convert.json").write_bytes(encode_manifest(manifest))


def read(artifact: Path) -> Engine:
    (engine,) = read_engines(artifact)
    return engine


def test_segments_are_one_engine_in_the_order_of_their_layers(artifact: Path) -> None:
    manifest = copy.deepcopy(read_manifest(artifact))
    manifest["engines"].reverse()
    (artifact / "l4convert.json").write_bytes(encode_manifest(manifest))
    engine = read(artifact)
    assert [(plan.first, plan.stop) for plan in engine.files] == [(0, 2), (2, 4)]
    assert (engine.module, engine.max_batch, engine.max_context) == ("tensorrt_rtx", BATCH, CONTEXT)
    assert engine.profiles == (Profile("prefill", 1, PREFILL), Profile("decode", 1, 8))


def test_no_engine(artifacts: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="has no engine") as caught:
        read_engines(artifacts["static"])
    assert "l4convert build" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("changes", "layer"),
    [({"layers": [3, 4]}, 2), ({"layers": [1, 4]}, 2), ({"max_batch": 7}, 2), ({"layers": [2, 3]}, 3)],
)
def test_layers_that_do_not_add_up(artifact: Path, changes: dict[str, Any], layer: int) -> None:
    edit(artifact, 1, **changes)
    with pytest.raises(InputError, match=rf"engines/rtx-4090: no plan begins at layer {layer} of 4"):
        read_engines(artifact)


def test_an_engine_built_in_several_ways(artifact: Path) -> None:
    """One whole, one in halves, one in quarters of which one is missing: those that add up, in the fewest plans."""
    add_engines(artifact, cuts=(1, 2, 3))
    manifest = copy.deepcopy(read_manifest(artifact))
    del manifest["engines"][3]
    (artifact / "l4convert.json").write_bytes(encode_manifest(manifest))
    assert [(plan.first, plan.stop) for plan in read(artifact).files] == [(0, 2), (2, 4)]
    add_engines(artifact)
    assert [(plan.first, plan.stop) for plan in read(artifact).files] == [(0, 4)]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_batch": None},
        {"path": "../elsewhere.plan"},
        {"path": "/etc/passwd"},
        {"bytes": None},
        {"builder": {"name": "os", "version": "1"}},
        {"inputs": [{"name": "input_ids"}]},
        {"profiles": []},
        {"profiles": [{"name": "prefill", "tokens": [4, 8]}]},
    ],
)
def test_damaged_entries(artifact: Path, changes: dict[str, Any]) -> None:
    for index in (0, 1):
        edit(artifact, index, **changes)
    with pytest.raises(InputError, match="damaged entry of an engine"):
        read_engines(artifact)


def test_the_engine_is_chosen_by_name_and_by_gpu(artifact: Path) -> None:
    add_engines(artifact, hardware="rtx-5090", compute_capability="12.0")
    add_engines(artifact, hardware="l4")
    engines = read_engines(artifact)
    assert [engine.hardware for engine in engines] == ["rtx-4090", "rtx-5090", "l4"]
    ada, blackwell = Gpu(0, "Ada", "8.9", 1), Gpu(0, "Blackwell", "12.0", 1)
    assert choose_engine(engines, ada, artifact).hardware == "rtx-4090"
    assert choose_engine(engines, blackwell, artifact).hardware == "rtx-5090"
    assert choose_engine(named_engines(engines, "l4", artifact), ada, artifact).hardware == "l4"
    with pytest.raises(UsageError, match=r"no engine for 'h100'; there is one for: rtx-4090 .*, rtx-5090 .*, l4 "):
        named_engines(engines, "h100", artifact)
    with pytest.raises(InputError, match=r"l4 \(compute capability 8\.9\), and this GPU \(Blackwell\) .* 12\.0$"):
        choose_engine(named_engines(engines, "l4", artifact), blackwell, artifact)


def test_files_are_held_against_the_manifest(artifact: Path) -> None:
    engine = read(artifact)
    check_engine_files(artifact, engine)
    plan = engine.files[1].path
    content = plan.read_bytes()
    plan.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=f"{plan.name}: its SHA-256"):
        check_engine_files(artifact, engine)
    plan.write_bytes(content[:-1])
    with pytest.raises(
        InputError, match=rf"{plan.name}: has {len(content) - 1} bytes, the manifest says {len(content)}"
    ):
        check_engine_files(artifact, engine)
    plan.unlink()
    with pytest.raises(InputError, match=f"{plan.name}: no such file"):
        check_engine_files(artifact, engine)


def test_an_engine_of_another_graph_is_refused(artifact: Path) -> None:
    edit(artifact, 0, source_sha256="0" * 64)
    with pytest.raises(InputError, match=r"built from another model\.onnx"):
        check_engine_files(artifact, read(artifact))


def test_the_layout_shares_what_can_be_shared(artifact: Path) -> None:
    """Bytes by hand: 4 layers of 2 heads of 16, every 4th global; hidden size 64, vocabulary 128, float32."""
    layout = plan_layout(read(artifact), read_artifact(artifact).config)
    assert layout.buffers == {
        "input_ids": BATCH * PREFILL * 8,
        "attention_mask": BATCH * CONTEXT * 8,
        "hidden_states.1": BATCH * PREFILL * 64 * 4,
        "logits": BATCH * PREFILL * 128 * 4,
    }
    assert layout.caches == {
        f"past_key_values.{i}.{kind}": BATCH * 2 * (CONTEXT if i == 3 else 8) * 16 * 4
        for i in range(4)
        for kind in ("key", "value")
    }
    first, second = layout.bindings
    assert first["present.0.key"] == first["past_key_values.0.key"] == "past_key_values.0.key"
    assert first["hidden_states.next"] == second["hidden_states"] == "hidden_states.1"
    assert first["attention_mask"] == second["attention_mask"] == "attention_mask"
    assert layout.nbytes == sum(layout.buffers.values()) + sum(layout.caches.values())


@pytest.mark.parametrize(
    ("plan", "key", "drop", "add", "message"),
    [
        (0, "inputs", "attention_mask", None, "misses input attention_mask"),
        (0, "outputs", "hidden_states.next", None, "misses output hidden_states.next"),
        (1, "inputs", "hidden_states", None, "misses input hidden_states"),
        (1, "outputs", "logits", None, "misses output logits"),
        (1, "inputs", "past_key_values.3.key", None, "misses input past_key_values.3.key"),
        (
            0,
            "inputs",
            None,
            ("past_key_values.3.key", "float32", [-1, 2, 48, 16]),
            "unexpected input past_key_values.3",
        ),
        (0, "inputs", "past_key_values.0.key", ("past_key_values.0.key", "uint8", [-1, 2, 8, 16]), "2 heads of 8"),
        (0, "inputs", "input_ids", ("input_ids", "uint8", [-1, -1]), "tensor input_ids is of type uint8"),
        (0, "inputs", "input_ids", ("input_ids", "int64", [-1]), r"tensor input_ids has shape \[-1\]"),
        (1, "outputs", "logits", ("logits", "float32", [-1, -1, 99]), "the vocabulary has 128 tokens"),
        (0, "inputs", "past_key_values.0.key", ("past_key_values.0.key", "float32", [-1, 2, -1, 16]), "in fixed slots"),
        (0, "inputs", "past_key_values.0.key", ("past_key_values.0.key", "float32", [-1, 4, 8, 16]), "2 heads of 16"),
    ],
)
def test_tensors_that_are_not_the_decoder_s(  # the plan is named, and the tensor
    artifact: Path, plan: int, key: str, drop: str | None, add: tuple[str, str, list[int]] | None, message: str
) -> None:
    entries = [entry for entry in read_manifest(artifact)["engines"][plan][key] if entry["name"] != drop]
    if add is not None:
        entries.append(dict(zip(("name", "dtype", "shape"), add, strict=True)))
    edit(artifact, plan, **{key: entries})
    with pytest.raises(InputError, match=rf"layers-0{2 * plan}-0{2 * plan + 1}\.plan: .*{message}"):
        plan_layout(read(artifact), read_artifact(artifact).config)


def test_profiles() -> None:
    profiles = (Profile("prefill", 1, 512), Profile("decode", 1, 8), Profile("verify", 4, 64))
    assert [choose_profile(profiles, tokens) for tokens in (1, 8, 9, 64, 65, 512)] == [1, 1, 2, 2, 0, 0]
    with pytest.raises(ValueError, match="513"):
        choose_profile(profiles, 513)


def test_shapes_of_a_call() -> None:
    shapes = {
        "attention_mask": ((-1, -1), (2, 100)),
        "input_ids": ((-1, -1), (2, 5)),
        "past_key_values.0.key": ((-1, 8, 64, 128), (2, 8, 64, 128)),
        "logits": ((1, -1, 128), (1, 5, 128)),
    }
    for name, (shape, expected) in shapes.items():
        assert concrete(Tensor(name, "int64", shape), 2, 5, 100) == expected


def test_plugins_are_the_very_ones_of_the_build(artifacts: dict[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(artifacts["static"], tmp_path / "a"))
    library, moved, other = (tmp_path / name for name in ("library.so", "moved.so", "other.so"))
    for path in (library, moved):
        path.write_bytes(b"kernels")
    other.write_bytes(b"more kernels")
    recorded = {"sha256": hashlib.sha256(b"kernels").hexdigest(), "version": "1.2"}
    add_engines(out, plugins=recorded, plugins_path=str(library))
    [engine] = read_engines(out)
    for asked, loaded in ((None, library), (moved, moved)):
        found = with_plugins(engine, asked).plugins
        assert found is not None
        assert found.path == loaded
    with pytest.raises(InputError, match=r"other\.so: is not the plugin library .* \(l4convert 1\.2, SHA-256 "):
        with_plugins(engine, other)
    library.unlink()
    with pytest.raises(InputError, match=r"library\.so: there is no plugin library") as caught:
        with_plugins(engine, None)
    assert "--plugins" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="the engine for rtx-4090 has no plugins"):
        with_plugins(replace(engine, plugins=None), moved)
