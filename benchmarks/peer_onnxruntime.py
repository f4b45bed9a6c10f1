"""ONNX Runtime's own weight quantizer, to be timed on a sample of a checkpoint's matrices.

    python benchmarks/peer_onnxruntime.py CKPT --block-size 32

The sample: every matrix of the first layer, of its experts the first. Each becomes the constant of a MatMul in a model
of its own, in float32, in which a CPU computes, and goes through ``MatMulNBitsQuantizer`` (4 bits, symmetric). Only
that is timed: not reading, not the conversion to float32, not writing. Prints one JSON object: seconds and parameters.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--block-size", type=int, default=32)
    options = parser.parse_args()
    try:
        import onnxruntime.quantization.matmul_nbits_quantizer  # noqa: F401
    except ImportError as error:
        sys.exit(f"onnxruntime's quantizer is not installed: {error}")
    logging.disable(logging.INFO)
    seconds, parameters = 0.0, 0
    for weight in matrices(options.checkpoint):
        seconds += quantize(weight, options.block_size)
        parameters += weight.size
    print(json.dumps({"seconds": seconds, "parameters": parameters}))


def matrices(path: Path) -> Iterator[np.ndarray]:
    """Weights [K, N] in float32, the order in which MatMul multiplies."""
    from l4convert.checkpoint import open_checkpoint

    for name, tensor in open_checkpoint(path).tensors.items():
        in_first_layer = name.startswith("model.layers.0.") and "_proj" in name and ".experts." not in name
        first_expert = ".layers.0.feed_forward.experts." in name and (len(tensor.dims) == 3 or ".experts.0." in name)
        if in_first_layer or first_expert:
            rows, columns = tensor.dims[-2:]
            weight = tensor.tile(0, slice(0, rows), slice(0, columns))
            stacked = len(tensor.dims) == 3  # [in, out] already; linear layers are [out, in]
            yield np.ascontiguousarray((weight if stacked else weight.T).astype(np.float32))


def quantize(weight: np.ndarray, block_size: int) -> float:
    """Seconds to quantize a weight [K, N]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    depth, width = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", width])],
        [numpy_helper.from_array(weight, "w")],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    quantizer = MatMulNBitsQuantizer(model, block_size=block_size, is_symmetric=True)
    start = time.perf_counter()
    quantizer.process()
    seconds = time.perf_counter() - start
    if [node.op_type for node in quantizer.model.graph().node] != ["MatMulNBits"]:
        sys.exit("MatMulNBitsQuantizer left a MatMul as it was")
    return seconds


if __name__ == "__main__":
    main()
