"""``l4convert bench``: what it prints and draws, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from l4convert import cli
from l4convert.bench import run as bench_run
from l4convert.bench.results import KINDS, BenchOptions
from l4convert.errors import InputError, UsageError
from l4convert.runtime import read_artifact
from tests.artifacts import write_canonical_artifact
from tests.runtime.fake_device import add_engines


@pytest.fixture(scope="module")
def artifact(scout_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_canonical_artifact(scout_layout, tmp_path_factory.mktemp("bench") / "scout", "static")


def bench(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "l4convert", "bench", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_beside_transformers_as_json_and_as_a_plot(artifact: Path, scout_layout: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    lengths = ["--context", "16,64", "--decode-tokens", 4, "--threads", 1]
    done = bench(artifact, "--reference", scout_layout, *lengths, "--plot", plot, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads(done.stdout)
    assert content["schema"] == "l4convert.bench/1"
    assert (content["recipe"], content["kv_cache"], content["threads"]) == ("none", "static", 1)
    assert content["model"] == {"layers": 4, "global_layers": 1, "chunk": 8, "positions": 4096}
    ours, reference = content["ours"], content["reference"]
    assert reference["name"].startswith("transformers ")
    assert (reference["dtype"], reference["caches"]) == ("float32", "DynamicCache")
    for curve in (ours, reference):
        assert [point["context"] for point in curve["points"]] == [16, 64]
        assert [point["prefill"]["tokens"] for point in curve["points"]] == [12, 56]
        assert all(len(point["decode"]["ms"]) == 3 for point in curve["points"])
        assert all(point["decode"]["median_ms"] > 0 and point["peak_rss_bytes"] > 0 for point in curve["points"])
    # One slot less: as the last step finds them. Transformers keeps a chunk less one token.
    assert [point["cache_bytes"] for point in ours["points"]] == [{"global": 64 * 256, "chunked": 3 * 8 * 256}] * 2
    assert [point["cache_used_bytes"]["global"] for point in ours["points"]] == [15 * 256, 63 * 256]
    assert reference["points"][1]["cache_bytes"] == {"global": 63 * 256, "chunked": 3 * 7 * 256}
    for point in ours["points"]:
        parts = point["breakdown"]["parts_ms"]
        assert tuple(parts) == KINDS
        assert sum(parts.values()) == pytest.approx(point["breakdown"]["total_ms"])
    grown = content["growth"]
    assert (grown["shortest"], grown["longest"], tuple(grown["parts_ms"])) == (16, 64, KINDS)
    assert plot.read_text().startswith("<?xml")


def test_synthetic_as_text(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", str(artifact), "--synthetic", "--context", "16,1k", "--decode-tokens", "2", "--no-breakdown"]
    assert cli.run(command) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "caches filled with random numbers" in printed.out
    rows = [line.split() for line in printed.out.splitlines() if line.strip().startswith(("16 ", "1k "))]
    assert [row[:3] for row in rows] == [["16", "-", "-"], ["1k", "-", "-"]]
    assert "profiler" not in printed.out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--context", "8k"], 2, "a context of 8192 tokens is more than the model's 4096 positions"),
        (["--context", "1k,1k"], 2, "between 1024 and 1024 tokens there is no room for 32 decoded tokens"),
        (["--context", "32"], 2, "up to 32 tokens there is no room for 32 decoded tokens"),
        (["--context", "1x"], 2, "'1x' is not a number of tokens"),
        (["--plot", "plot.gif"], 2, "plot.gif: a plot with the ending .gif"),
        (["--plot", "nowhere/plot.svg"], 3, "nowhere: no such folder"),
        (["--reference", "nowhere"], 3, "nowhere"),
        (["--engine", "l4", "--provider", "cuda"], 2, "--engine and --provider exclude each other"),
    ],
)
def test_refusals_are_one_line(artifact: Path, options: list[str], code: int, message: str, capsys: Any) -> None:
    assert cli.run(["bench", str(artifact), *options]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    error, *hints = printed.err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert len(hints) <= 1


def test_another_model_s_checkpoint_is_refused(artifact: Path, maverick_layout: Path) -> None:
    with pytest.raises(InputError, match=r"not the model that .* was made from"):
        bench_run.bench(BenchOptions(artifact, contexts=(64,), reference=maverick_layout))


def test_caches_that_do_not_fit_are_refused_before_anything_runs(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("l4convert.bench.caches.available_bytes", lambda: 1_000_000)
    monkeypatch.setattr(bench_run, "apart", lambda *_: pytest.fail("something ran"))
    with pytest.raises(UsageError, match=r"scout: caches \(static\) for 4k tokens takes 1\.1 MB of memory"):
        bench_run.bench(BenchOptions(artifact, contexts=(4096,)))


def test_the_usual_lengths_are_those_that_the_model_has(artifact: Path) -> None:
    info = read_artifact(artifact)
    assert bench_run.plan_sweep(info, BenchOptions(artifact)).contexts == (1024, 4096)


def test_an_engine_without_a_gpu(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from l4convert.gpus import find_gpus

    if find_gpus().devices:
        pytest.skip("this machine has a GPU")
    copied = add_engines(Path(shutil.copytree(artifact, tmp_path / "scout")))
    assert cli.run(["bench", str(copied), "--engine", "rtx-4090", "--context", "40", "--decode-tokens", "2"]) == 5
    assert "an engine runs on an NVIDIA GPU only" in capsys.readouterr().err


def test_lengths_from_the_environment_and_from_a_file(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("L4CONVERT_BENCH_CONTEXT", "6k")
    assert cli.run(["bench", str(artifact)]) == 2
    monkeypatch.delenv("L4CONVERT_BENCH_CONTEXT")
    (tmp_path / "options.toml").write_text('[bench]\ncontext = "7k"\n')
    assert cli.run(["--config", str(tmp_path / "options.toml"), "bench", str(artifact)]) == 2
    errors = capsys.readouterr().err
    assert "a context of 6144 tokens" in errors
    assert "a context of 7168 tokens" in errors
