"""Speed of carrying INT4 codes over, beside quantizing the same weights from BF16.

    python benchmarks/carry_over.py [--target cpu ...] [--experts 4] [--json OUT.json]

A layer of Scout's widths with a few of its experts, one by one as llm-compressor stores them: once as INT4 in groups of
128 (recipe keep), once in BF16 (recipe int4, blocks of 128). Every job of the weights file is computed on one thread;
nothing is read from a disk or written to one. Best of ``--repeat`` rounds, in CPU time. "copy" is a plain copy of what
the carried-over file would hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint import Checkpoint
from l4convert.checkpoint.config import DecoderConfig
from l4convert.checkpoint.lazy import TILE_ELEMENTS, LazyTensor
from l4convert.checkpoint.names import expected_tensors
from l4convert.checkpoint.prequantized import Prequantized
from l4convert.checkpoint.presets import PRESETS
from l4convert.checkpoint.quantized.packed import Unpacked
from l4convert.emit.jobs import plan_jobs
from l4convert.emit.plan import WeightsPlan, plan_weights
from l4convert.frontend.decoder import build_decoder
from l4convert.graph_passes import CANONICAL_PASSES
from l4convert.planning.estimate import Noise, noise_tensors
from l4convert.quantization.carry_over import resolve
from l4convert.quantization.recipe import load_recipe
from l4convert.targets import TARGETS

GROUP = 128
CASES = (("carried over", "keep"), ("from BF16", "int4"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = dataclasses.replace(
        PRESETS["scout"], layers=PRESETS["scout"].layers[:1], num_local_experts=options.experts, vocab_size=1024
    )
    rows = [row for name in options.target or TARGETS for row in measure(config, name, options.repeat)]
    print("| target | weights | G parameters/s | GB/s of codes | of a copy |\n|---|---|---|---|---|")
    for row in rows:
        cells = (row["parameters_per_second"] / 1e9, row["bytes_per_second"] / 1e9, row["of_copy"])
        print(f"| {row['target']} | {row['case']} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(config: DecoderConfig, target: str, repeat: int) -> list[dict[str, Any]]:
    """A row for each case."""
    rows = []
    for case, recipe in CASES:
        plan = planned(config, target, recipe)
        nbytes = sum(p.nbytes for p in plan.tensors if p.tensor.dtype.bitwidth < 16 or "packed" in p.name)
        parameters = 2 * nbytes
        seconds = min(compute(plan) for _ in range(repeat))
        copied = min(copy(nbytes) for _ in range(repeat))
        rows.append(
            {
                "target": target,
                "case": case,
                "seconds": seconds,
                "parameters_per_second": parameters / seconds,
                "bytes_per_second": nbytes / seconds,
                "of_copy": copied / seconds,
            }
        )
    return rows


def planned(config: DecoderConfig, target: str, recipe: str) -> WeightsPlan:
    """What would be written, from random weights in memory."""
    row = TARGETS[target]
    tensors = weights(config, packed=recipe == "keep")
    checkpoint = Checkpoint(Path(), "hf", config, tensors, "unfused", (), (), "made up" if recipe == "keep" else None)
    compute_type: Any = row.compute[0]
    form: Any = row.kv_caches[0]
    model = build_decoder(config, tensors, "unfused", form, compute_type)
    resolved = resolve(load_recipe(recipe, None if recipe == "keep" else GROUP), checkpoint)
    for graph_pass in (*CANONICAL_PASSES, *row.lowering):
        graph_pass(model, resolved)
    return plan_weights(model)


def weights(config: DecoderConfig, packed: bool) -> Mapping[str, LazyTensor]:
    """Noise by canonical name; packed: matrices of layers but the router as INT4."""
    plain = noise_tensors(expected_tensors(config, "unfused"), ir.DataType.BFLOAT16)
    words = np.random.default_rng(0).integers(-(2**31), 2**31, TILE_ELEMENTS, np.int64).astype(np.int32)
    scales = np.full(TILE_ELEMENTS, 0.01, ir.DataType.BFLOAT16.numpy())
    return {
        name: quantized(tensor, words, scales) if packed and name.endswith("_proj.weight") else tensor
        for name, tensor in plain.items()
    }


def quantized(tensor: LazyTensor, words: np.ndarray, scales: np.ndarray) -> Prequantized:
    rows, depth = tensor.dims
    codes = Unpacked(Noise(f"{tensor.name}_packed", (rows, depth // 8), words), 4, depth)
    return Prequantized(codes, Noise(f"{tensor.name}_scale", (rows, depth // GROUP), scales), GROUP)


def compute(plan: WeightsPlan) -> float:
    """CPU seconds of computing every job."""
    start = time.thread_time()
    for job in plan_jobs(plan):
        for piece in job.pieces:
            piece.compute()
    return time.thread_time() - start


def copy(nbytes: int) -> float:
    """CPU seconds of copying as many bytes, a tile at a time, from more than a cache holds."""
    source = np.ones(nbytes, np.uint8)
    start = time.thread_time()
    for begin in range(0, nbytes, TILE_ELEMENTS):
        source[begin : begin + TILE_ELEMENTS].tobytes()
    return time.thread_time() - start


if __name__ == "__main__":
    main()
