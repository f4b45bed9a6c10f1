"""Safetensors files that pose as a checkpoint's, and a model that multiplies with one of their tensors."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
from safetensors.numpy import save_file

from l4convert.checkpoint.combiners import transposed
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.safetensors_file import open_safetensors
from l4convert.emit import write_artifact
from tests.emit.models import initializer

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def array(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal values in BF16."""
    return np.random.default_rng(seed).standard_normal(shape).astype(BFLOAT16)


def raw_shard(path: Path, pad: int, content: np.ndarray) -> Path:
    """A valid file whose tensor "w" begins ``pad`` bytes after a multiple of eight."""
    end = pad + content.nbytes
    header = {
        "pad": {"dtype": "U8", "shape": [pad], "data_offsets": [0, pad]},
        "w": {"dtype": "BF16", "shape": list(content.shape), "data_offsets": [pad, end]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(pad) + content.tobytes())
    return path


def product(weight: LazyTensor, *others: LazyTensor) -> ir.Model:
    """y = x @ float32(weight); the others are stored only."""
    held = initializer("layer.weight", weight)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, weight.dims[0]]))
    wide = ir.node("Cast", [held], {"to": int(ir.DataType.FLOAT)})
    matmul = ir.node("MatMul", [x, wide.outputs[0]])
    y = matmul.outputs[0]
    y.name, y.type, y.shape = "y", x.type, ir.Shape([2, weight.dims[1]])
    initializers = [held, *(initializer(f"other.{number}", other) for number, other in enumerate(others))]
    graph = ir.Graph([x], [y], nodes=[wide, matmul], initializers=initializers, opset_imports={"": 23}, name="main")
    return ir.Model(graph, ir_version=11)


def run(out: Path) -> np.ndarray:
    """What ONNX Runtime computes with a model of :func:`product` whose weight has 64 rows."""
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": np.arange(128, dtype=np.float32).reshape(2, 64)})[0])


def write_shard(folder: Path) -> Path:
    """``first`` and ``second`` [64, 64], and ``third`` [16, 64]."""
    folder.mkdir()
    path = folder / "model-00001-of-00002.safetensors"
    save_file({"first": array(64, 64), "second": array(64, 64, seed=1), "third": array(16, 64, seed=2)}, path)
    return path


def shared_artifact(shard: Path, out: Path) -> Path:
    """Shares ``first`` (as "layer.weight") and ``second`` of :func:`write_shard`, and writes ``third``, transposed."""
    stored = open_safetensors(shard)
    model = product(stored["first"], stored["second"], transposed(stored["third"]))
    return write_artifact(model, out, share_weights=True, sources=[shard])
