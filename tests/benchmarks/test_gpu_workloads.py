"""Bytes and FLOPs of the rows against counts made in other ways, and what ``--dry-run`` and the rooflines print."""

from __future__ import annotations

import numpy as np
import pytest

from l4convert.targets.hardware import load_hardware
from tests.benchmarks.scripts import load

roofline = load("roofline")
workloads = load("gpu_workloads")

H100 = roofline.limits_of(load_hardware("h100"))


@pytest.mark.parametrize(
    ("weights", "block", "scales"), [("int4", 32, 6), ("int4", 64, 3), ("int4", 128, 2), ("fp8", 0, None)]
)
def test_bytes_of_an_expert_are_those_of_its_arrays(weights: str, block: int, scales: int | None) -> None:
    hidden, width = (192, 320) if block != 128 else (256, 384)
    experts = roofline.Experts(4, hidden, width, 1, weights, block)
    found = 0
    for inner, columns in ((hidden, 2 * width), (width, hidden)):
        words = np.zeros((columns, inner // 8), np.int32 if weights == "int4" else np.int64)
        found += words.nbytes + np.zeros((inner // block if block else 1, columns), np.float16).nbytes
    assert experts.expert_bytes == found
    if scales:
        assert hidden // block == scales


def test_an_expert_in_16_bits() -> None:
    assert roofline.Experts(16, 5120, 8192, 1, "plain").expert_bytes == 3 * 5120 * 8192 * 2


def test_flops_of_experts_are_those_of_their_products() -> None:
    tokens, hidden, width = 7, 64, 96
    products = 2 * tokens * hidden * (2 * width) + 2 * tokens * width * hidden  # x @ gate_up, h @ down
    assert roofline.Experts(4, hidden, width, 2, "plain").work(tokens, 4).flops == 2 * products


@pytest.mark.parametrize("chunk", [0, 8, 12])
@pytest.mark.parametrize(("new", "context"), [(1, 1), (1, 8), (1, 9), (5, 5), (5, 10), (17, 40), (24, 24), (8, 16)])
def test_attention_against_a_mask(chunk: int, new: int, context: int) -> None:
    position = np.arange(context)
    mask = position[None] <= position[:, None]
    if chunk:
        mask &= position[None] // chunk == position[:, None] // chunk
    visible = mask[context - new :]
    layer = roofline.Attention(10, 2, 16, chunk, "none")
    batch = 3
    work = layer.work(batch, new, context)
    assert work.flops == batch * visible.sum() * 10 * 16 * 2 * 2  # a product with keys, one with values
    cached = visible.any(axis=0)[: context - new].sum()
    kept = sum(not chunk or p // chunk == (context - 1) // chunk for p in position[-new:])
    token, inputs = 2 * 2 * 16 * 2, new * (10 + 2 + 2) * 16 * 2 + new * 8
    tables = min(new, chunk) * 8 * 4 * 2
    assert work.read == batch * (cached * token + inputs) + tables
    assert work.written == batch * (kept * token + new * 10 * 16 * 2)


def test_quantized_caches_are_read_in_bytes() -> None:
    plain, fp8 = (roofline.Attention(40, 8, 128, 0, kv).work(1, 1, 1 << 20) for kv in ("none", "fp8"))
    assert plain.read / fp8.read == pytest.approx(2, rel=1e-4)
    assert plain.flops == fp8.flops


def test_the_least_time_is_the_longer_one() -> None:
    limits = roofline.Limits(100.0, {"bf16": 1000.0})
    memory, matrix = roofline.Work(150, 50, 1000), roofline.Work(50, 50, 5000)
    assert (memory.seconds(limits), memory.bound(limits)) == (2.0, "memory")
    assert (matrix.seconds(limits), matrix.bound(limits)) == (5.0, "matrix")
    assert roofline.Work(50, 50, 5000, "fp8").seconds(limits) == 1.0  # a rate that is not known


def test_the_rows_are_those_of_the_issue() -> None:
    names = [row.name for row in workloads.ROWS]
    assert len(set(names)) == len(names)
    for model in ("scout", "maverick"):
        for weights in ("int4", "fp8"):
            for what in ("decode 1", "decode 8", "decode 64", "prefill 8k"):
                assert f"{model} MoE {weights}, {what}" in names
    for kind in ("chunked", "global"):
        for cache in ("bf16", "fp8"):
            for batch in (1, 8, 64):
                for context in ("8k", "128k", "1M"):
                    assert f"{kind} attention, {cache} cache, decode {batch} at {context}" in names
            assert f"{kind} attention, {cache} cache, prefill 8k" in names


def test_real_sizes_and_times() -> None:
    by_name = {row.name: row for row in workloads.ROWS}
    # 16 experts of 3 x 5120 x 8192 half bytes, and two bytes for the scale of every 32 of them.
    row = by_name["scout MoE int4, decode 64"]
    assert row.work.read == pytest.approx(16 * 3 * 5120 * 8192 * (0.5 + 2 / 32), rel=1e-3)
    assert row.work.seconds(H100) == pytest.approx(row.work.read / 3.35e12, rel=1e-3)
    one = by_name["scout MoE int4, decode 64 to one expert"]
    assert one.work.read == pytest.approx(row.work.read / 16, rel=2e-2)
    # A chunked layer sees at most one chunk, however long the context is.
    at = {label: by_name[f"chunked attention, bf16 cache, decode 8 at {label}"].work for label in ("8k", "1M")}
    assert at["8k"] == at["1M"]
    million = by_name["global attention, bf16 cache, decode 1 at 1M"]
    assert million.work.read == pytest.approx(2 * 8 * 128 * 2 * 1048576, rel=1e-4)
    assert by_name["global attention, bf16 cache, decode 64 at 1M"].memory > 274e9
    longest = by_name["global attention, bf16 cache, decode 1 at 10M"]
    assert longest.slots * 8 * 128 > 1 << 31
    assert longest.memory < 80e9
    prefill = by_name["chunked attention, bf16 cache, prefill 8k"].work
    assert prefill.bound(H100) == "matrix"
    assert prefill.flops == pytest.approx(4 * 40 * 128 * 8192**2 / 2, rel=1e-3)


def test_random_tokens_reach_every_expert_and_rows_are_the_same_every_time() -> None:
    row = next(row for row in workloads.MOE if row.name == "maverick MoE int4, prefill 8k")
    chosen = row.chosen()
    assert len(np.unique(chosen)) == 128
    assert np.array_equal(chosen, row.chosen())
    assert set(next(row for row in workloads.MOE if "to one expert" in row.name).chosen()) == {8}


def test_a_dry_run_prints_every_row_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("gpu_kernels").main(["--dry-run", "--hardware", "h100"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(workloads.ROWS)
    assert len({line.count("|") for line in lines}) == 1
    (row,) = [line for line in lines if line.startswith("| scout MoE int4, decode 64 |")]
    assert row.split(" | ")[1:6] == ["1.1338", "0.01611", "338.44", "memory", "1.1372"]
    unfit = [line for line in lines if line.endswith("| does not fit |")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in unfit] == [
        "global attention, bf16 cache, decode 64 at 1M",
        "global attention, fp8 cache, decode 64 at 1M",
    ]


def test_the_readmes_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["moe", "--hardware", "l4"]) == 0
    printed = capsys.readouterr().out
    assert "0.3 TB/s, as published" in printed
    assert printed.count("| scout MoE") == sum(row.name.startswith("scout") for row in workloads.MOE)
    with pytest.raises(SystemExit, match="2"):
        roofline.main(["--hardware", "no such"])
    assert "is not a hardware profile" in capsys.readouterr().err
