"""Which places of external data ONNX Runtime and onnx take: the evidence of docs/adr/0011-zero-copy.md."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from l4convert.checkpoint.safetensors_file import Stored, open_safetensors
from tests.emit.shards import array, product, raw_shard, run


def _refer(folder: Path, location: str, stored: Stored) -> Path:
    """A model in ``folder`` whose weight is ``stored``, said to be at ``location``."""
    folder.mkdir(parents=True, exist_ok=True)
    model = product(stored)
    held = model.graph.initializers["layer.weight"]
    held.const_value = ir.ExternalTensor(
        location, stored.offset, stored.nbytes, stored.dtype, shape=stored.shape, name="w"
    )
    (folder / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    return folder


def _loads(load: Callable[[], object]) -> bool:
    try:
        load()
    except Exception:  # each loader has its own kinds
        return False
    return True


@pytest.mark.parametrize(
    ("form", "runtime", "library"),
    [
        ("beside", True, True),
        ("below", True, True),
        ("above", False, False),
        ("symbolic link", False, False),
        ("hard link", True, False),
        ("hard link that is left alone", True, True),
    ],
)
@pytest.mark.parametrize("pad", [8, 2, 1])
def test_what_loaders_take(tmp_path: Path, form: str, runtime: bool, library: bool, pad: int) -> None:
    source = raw_shard(tmp_path / "ckpt.safetensors", pad, array(64, 64))
    stored = open_safetensors(source)["w"]
    folder, location = tmp_path / "sub", "w.safetensors"
    if form == "below":
        folder, location = tmp_path, "ckpt.safetensors"
        (tmp_path / "sub").mkdir()
        source.rename(tmp_path / "sub" / "ckpt.safetensors")
        location = "sub/ckpt.safetensors"
    elif form == "above":
        location = "../ckpt.safetensors"
    _refer(folder, location, stored)
    if form == "beside":
        shutil.copy(source, folder / location)
    elif form == "symbolic link":
        (folder / location).symlink_to("../ckpt.safetensors")
    elif form.startswith("hard link"):
        os.link(source, folder / location)
        if form.endswith("alone"):
            source.unlink()
    assert _loads(lambda: run(folder)) is runtime
    assert _loads(lambda: onnx.load(folder / "model.onnx")) is library
    if runtime:  # the same numbers wherever the weight begins
        x = np.arange(128, dtype=np.float32).reshape(2, 64)
        np.testing.assert_allclose(run(folder), x @ array(64, 64).astype(np.float32), rtol=1e-5, atol=1e-3)


def test_onnxruntime_maps_a_weight_that_is_not_on_a_page(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    source = raw_shard(tmp_path / "w.safetensors", 2, array(64, 2048))
    folder = _refer(tmp_path, "w.safetensors", open_safetensors(source)["w"])
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the Cast would be folded
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert str(source) in maps.read_text()
    del session
