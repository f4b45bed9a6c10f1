"""The plugin library of an engine: refused before anything is built, loaded before the graph is read, recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from l4convert.emit import read_manifest, verify_artifact
from l4convert.emit.digest import file_digest
from l4convert.engine import BuildOptions, build_engines, plan_build
from l4convert.errors import InputError, UsageError
from l4convert.plugins.library import native
from l4convert.plugins.library.native import DEFAULT_LIBRARY
from tests.engine.conftest import retarget

ATTENTION = {
    "num_heads": 4,
    "kv_num_heads": 2,
    "head_dim": 16,
    "chunk_size": 8,
    "rope": 1,
    "qk_norm_eps": 1e-5,
    "floor_scale": 1.0,
    "attn_scale": 0.0,
    "kv_cache": "static",
    "compute": "bfloat16",
    "kv_dtype": "none",
}


@pytest.fixture
def with_node(stubbed: Callable[[str], Path]) -> Callable[..., Path]:
    """An artifact whose graph asks for a plugin of these attributes; the stub of TensorRT reads no further."""

    def make(mode: str = "", **changes: Any) -> Path:
        out = stubbed(mode)
        model = onnx.load(out / "model.onnx", load_external_data=False)
        attributes = ATTENTION | changes
        node = onnx.helper.make_node(
            "LongContextAttention", ["input_ids"], ["z"], "here", domain="l4convert", **attributes
        )
        model.graph.node.append(node)
        (out / "model.onnx").write_bytes(model.SerializeToString())
        files = read_manifest(out)["files"]
        files["model.onnx"] = dict(zip(("bytes", "sha256"), file_digest(out / "model.onnx"), strict=True))
        return retarget(out, files=files)

    return make


def _options(out: Path, plugins: Path | None, target: str = "h100") -> BuildOptions:
    return BuildOptions(out, (target,), max_context=64, prefill_tokens=8, plugins=plugins)


def test_it_is_loaded_recorded_and_part_of_what_was_built(
    with_node: Callable[..., Path], interpreted_library: native.Library, tmp_path: Path
) -> None:
    out, library = with_node(), tmp_path / "library.so"
    shutil.copy(interpreted_library.path, library)
    [engine] = build_engines(_options(out, library)).engines
    built = json.loads((out / "engines/h100/decoder.plan").read_text().removeprefix("half of it "))
    assert built["network"]["plugins"] == [str(library)]  # before the graph was parsed
    assert built["preview"] == ["ALIASED_PLUGIN_IO_10_03"]
    recorded = {"sha256": file_digest(library)[1], "version": interpreted_library.version}
    assert (engine.entry["plugins"], engine.entry["plugins_path"]) == (recorded, str(library))
    assert verify_artifact(out).ok
    [moved] = build_engines(_options(out, Path(shutil.copy(library, tmp_path / "moved.so")))).engines
    assert moved.skipped
    with library.open("ab") as file:
        file.write(b"\0")  # another library, as far as anyone can tell
    [other] = build_engines(_options(out, library)).engines
    assert not other.skipped


def test_without_a_library_it_says_what_builds_one(
    with_node: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = with_node()
    monkeypatch.chdir(tmp_path)
    for given in (None, tmp_path / "absent.so"):
        with pytest.raises(InputError, match=rf"^{given or DEFAULT_LIBRARY}: there is no plugin library") as caught:
            plan_build(_options(out, given))
        assert "l4convert plugins build" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head_dim": 256}, r"^h100: .* cannot compute here: .*d256 for SM 90.*--head-dim 256"),
        ({"compute": "float32"}, r'cannot compute here: field "compute" is "float32"'),
    ],
)
def test_what_the_library_lacks_is_refused_before_building(
    with_node: Callable[..., Path], interpreted_library: native.Library, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        plan_build(_options(with_node(**changes), interpreted_library.path))


def test_what_tensorrt_says_of_a_library_is_told(
    with_node: Callable[..., Path], interpreted_library: native.Library
) -> None:
    with pytest.raises(InputError, match="TensorRT does not load it: plugin is registered already"):
        build_engines(_options(with_node("plugins"), interpreted_library.path))


def test_other_engines_take_none(artifact: Path, stubbed: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--plugins: the artifact is for tensorrt-rtx, whose engines have no plugins"):
        plan_build(_options(artifact, tmp_path / "library.so", "l4"))
    [job] = plan_build(_options(stubbed(""), None)).jobs  # no node asks for a plugin
    assert job.plugins is None
    assert "plugins" not in job.inputs
