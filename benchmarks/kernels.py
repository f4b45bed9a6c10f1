"""Speed of quantization: BF16 weights in memory to the bytes that an artifact stores.

    python benchmarks/kernels.py [--threads 1 2] [--rows K] [--columns N] [--repeat 5] [--only TEXT] [--json OUT.json]

Each thread works on a matrix of its own. Rates are 10^9 parameters a second: the best and the median of the repeats by
the clock, and the best by processor time, for one core, which other work on the machine disturbs less. "of copy" is the
best rate over that of copying the same BF16 matrices in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from l4convert.checkpoint.combiners import InterleavedHalves, transposed
from l4convert.checkpoint.lazy import Constant, LazyTensor
from l4convert.plugins.moe.layout import GROUP, K_ORDER
from l4convert.quantization import layouts, native
from l4convert.quantization.fp8 import quantize_fp8
from l4convert.quantization.int4 import BLOCK_SIZES, SCALE_RULES, int4_blocks, quantize_int4

Work = Callable[[int], None]


@dataclass(frozen=True)
class Row:
    """One measurement; rates in 10^9 parameters a second."""

    what: str
    threads: int
    best: float
    median: float
    per_core_second: float
    of_copy: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=5120, help="K, the contracted axis (a multiple of 128)")
    parser.add_argument("--columns", type=int, default=4096, help="N")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", default="", metavar="TEXT", help="only what has this in its name")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (max(options.threads), options.rows, options.columns)
    weights = (rng.standard_normal(shape, np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    print(f"{platform.machine()}, {os.cpu_count()} cores, compiled kernels: {native.AVAILABLE}\n")
    print("| what | threads | best | median | per core-second | of copy |")
    print("|---|---|---|---|---|---|")
    rows = []
    for threads in options.threads:
        copy = measure("copy BF16", copier(weights), threads, weights[0].size, options.repeat, None)
        chosen = [(what, work) for what, work in workloads(weights) if options.only in what]
        for what, work in (("copy BF16", None), *chosen):
            row = measure(what, work, threads, weights[0].size, options.repeat, copy.best) if work else copy
            rows.append(row)
            rates = " | ".join(f"{rate:.3f}" for rate in (row.best, row.median, row.per_core_second))
            print(f"| {row.what} | {row.threads} | {rates} | {row.of_copy:.1%} |", flush=True)
    if options.json:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "compiled": native.AVAILABLE}
        result = {"schema": "l4convert.kernels/1", **machine, "shape": shape, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(what: str, work: Work, threads: int, size: int, repeat: int, copy: float | None) -> Row:
    """Run ``work(i)`` in each of the threads i, a few times."""
    walls, cores = [], []
    for _ in range(repeat):
        pool = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
        wall, core = time.perf_counter(), time.process_time()
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
        walls.append(time.perf_counter() - wall)
        cores.append(time.process_time() - core)
    total = threads * size / 1e9
    best = total / min(walls)
    return Row(what, threads, best, total / statistics.median(walls), total / min(cores), best / (copy or best))


def workloads(weights: np.ndarray) -> Iterator[tuple[str, Work]]:
    """Name and work of everything that is measured; thread i works on ``weights[i]``, [K, N] or read as [N, K]."""
    stored = [Constant(weight[np.newaxis]) for weight in weights]
    linear = [Constant(weight.reshape(weight.shape[::-1])) for weight in weights]
    for rule in SCALE_RULES:
        for size in BLOCK_SIZES:
            int4 = IntScheme(size, rule)
            label = f"int4 {rule}, block {size}:"
            yield f"{label} QMoE from [E,K,N]", writer([int4.qmoe(weight) for weight in stored])
            yield f"{label} DequantizeLinear from [E,K,N]", writer([int4.plain(weight) for weight in stored])
            yield f"{label} MatMulNBits from [N,K]", writer([int4.nbits(weight) for weight in linear])
            yield f"{label} words of the MoE plugin from [E,K,N]", writer([int4.words(weight) for weight in stored])
    yield "fp8: DequantizeLinear from [E,K,N]", writer([[transposed(quantize_fp8(transposed(w))[0])] for w in stored])
    yield "fp8: [N,K]", writer([[quantize_fp8(w)[0]] for w in linear])
    fp8_words = [layouts.long_words(quantize_fp8(transposed(w))[0]) for w in stored]
    yield "fp8: words of the MoE plugin from [E,K,N]", writer([[words] for words in fp8_words])
    for rule in SCALE_RULES:
        yield f"int4 {rule}, block 128: the NumPy definition", definition(weights, rule)
    ort = onnxruntime_quantizer(weights)
    if ort:
        yield "ONNX Runtime quantize_matmul_4bits, block 128, from float32", ort


@dataclass(frozen=True)
class IntScheme:
    """The tensors that are stored for a weight: the values first, then the scales from the same computation."""

    block_size: int
    rule: str

    def qmoe(self, weight: LazyTensor) -> list[LazyTensor]:
        values, scales = quantize_int4(transposed(weight), self.block_size, self.rule)
        return [layouts.qmoe(InterleavedHalves(values)), InterleavedHalves(scales)]

    def plain(self, weight: LazyTensor) -> list[LazyTensor]:
        return [transposed(quantize_int4(transposed(weight), self.block_size, self.rule)[0])]

    def words(self, weight: LazyTensor) -> list[LazyTensor]:
        values, scales = quantize_int4(transposed(weight), self.block_size, self.rule)
        return [layouts.ordered_words(values, GROUP, K_ORDER), scales]

    def nbits(self, weight: LazyTensor) -> list[LazyTensor]:
        values, scales = quantize_int4(weight, self.block_size, self.rule)
        return [layouts.matmul_nbits(values, self.block_size), scales]


def writer(tensors: list[list[LazyTensor]]) -> Work:
    """Compute the stored bytes of the tensors in step, as they are written to a file."""

    def work(i: int) -> None:
        rows = max(1, (1 << 22) // tensors[i][0].parts[0].matrix[2])  # type: ignore[attr-defined]
        for _ in zip(*(tensor.chunks(rows * tensor.matrix[2]) for tensor in tensors[i]), strict=True):
            pass

    return work


def copier(weights: np.ndarray) -> Work:
    targets = np.zeros_like(weights)
    return lambda i: np.copyto(targets[i], weights[i])


def definition(weights: np.ndarray, rule: str) -> Work:
    """The arithmetic alone, without layouts, where there is no compiler."""

    def work(i: int) -> None:
        for part in weights[i].reshape(-1, 1, 512, 128):
            int4_blocks(part.astype(np.float32), rule)

    return work


def onnxruntime_quantizer(weights: np.ndarray) -> Work | None:
    """The kernel behind onnxruntime.quantization's 4-bit MatMul quantizer, or None where it cannot be imported."""
    try:
        from onnxruntime.capi._pybind_state import quantize_matmul_4bits
    except ImportError:
        return None
    depth, width = weights[0].shape
    floats = [weight.astype(np.float32) for weight in weights]

    def work(i: int) -> None:
        packed = np.zeros((width, depth // 128, 64), np.uint8)
        scales, zero_points = np.zeros(width * depth // 128, np.float32), np.zeros(width * depth // 256, np.uint8)
        quantize_matmul_4bits(packed, floats[i], scales, zero_points, 128, width, depth, True)

    return work


if __name__ == "__main__":
    main()
