"""The released CUDA provider takes the graphs of target cuda: its own code decides, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.pipeline import ConvertOptions, convert
from tests.benchmarks.scripts import load
from tests.caches import quantized
from tests.checkpoints import write_random_checkpoint
from tests.targets import cuda_stand_in

pytestmark = pytest.mark.skipif(cuda_stand_in.missing() is not None, reason=str(cuda_stand_in.missing()))

# Operators on the sizes of tensors, of int64 and bool, which the CPU computes faster; and one in the plain definition.
ON_CPU = {
    *("Add", "ArgMax", "Cast", "Concat", "Div", "Equal", "Gather", "Max", "Min", "Neg", "Or", "Squeeze", "Sub"),
    "Unsqueeze",
}
# recipe -> kernels, and how many of each: 4 layers of 7 products and 4 experts with 2.
KERNELS = {
    "none": {"MoE": 4},
    "int4": {"QMoE": 4, "MatMulNBits": 28},
    "fp8": {"MatMulBlockQuantizedFp8Weight": 60},
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    cuda_stand_in.make(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), head_dim=64)


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4"])
def test_its_attention_takes_quantized_caches(checkpoint, stand_ins, tmp_path, dtype):
    model = quantized(open_checkpoint(checkpoint), dtype, "static", "cuda", compute="bfloat16")
    ir.save(model, tmp_path / "model.onnx", external_data="weights.bin")
    placed = cuda_stand_in.placements(tmp_path / "model.onnx", stand_ins)
    assert placed["CUDAExecutionProvider"]["GroupQueryAttention"] == 4
    # Integers are gathered by the CPU; only the plain definition of a static cache does it.
    assert placed["CPUExecutionProvider"].keys() - ON_CPU <= {"GatherND"}


@pytest.mark.parametrize(
    ("recipe", "kv_cache", "compute"),
    [
        ("int4", "static", "bfloat16"),
        ("int4", "growing", "float16"),
        ("fp8", "static", "bfloat16"),
        ("none", "growing", "bfloat16"),
    ],
)
def test_it_takes_every_node_that_computes(checkpoint, stand_ins, tmp_path, recipe, kv_cache, compute):
    options = ConvertOptions(
        checkpoint=checkpoint, output=tmp_path / "out", target="cuda", recipe=recipe, kv_cache=kv_cache, compute=compute
    )
    convert(options)
    placed = cuda_stand_in.placements(tmp_path / "out" / "model.onnx", stand_ins)
    on_cuda = placed["CUDAExecutionProvider"]
    assert on_cuda["GroupQueryAttention"] == on_cuda["If"] == on_cuda["Attention"] == 4
    for kernel, count in KERNELS[recipe].items():
        assert on_cuda[kernel] == count
    assert placed["CPUExecutionProvider"].keys() - ON_CPU == set()


@pytest.mark.parametrize("op", ["QMoE", "GroupQueryAttention"])
def test_it_takes_the_peers_of_the_gpu_benchmark(stand_ins, tmp_path, op):
    peers, roofline = load("gpu_onnxruntime"), load("roofline")
    if op == "QMoE":
        model = peers.qmoe_model(roofline.Experts(4, 128, 256, 1, "int4", 128))
    else:
        model = peers.gqa_model(roofline.Attention(40, 8, 128, 8192, "fp8"))
    ir.save(model, tmp_path / "peer.onnx")
    assert cuda_stand_in.placements(tmp_path / "peer.onnx", stand_ins) == {"CUDAExecutionProvider": {op: 1}}
