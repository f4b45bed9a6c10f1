"""The benchmark of conversions measures what it says, and says what it did not measure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from tests.benchmarks.scripts import load, make_small, run_script

table = load("table")
workloads = load("workloads")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("made") / "small")


def test_every_row_is_there_or_says_why(tmp_path: Path, checkpoint: Path) -> None:
    scratch = tmp_path / "scratch"
    installed = load("llama_environment").ready()  # made on demand, which takes minutes
    peers = [] if installed else ["--skip", "llama.cpp"]
    done = run_script(
        "convert.py", "--checkpoint", checkpoint, "--scratch", scratch, "--repeat", 2, "--scales", "absmax",
        "--block-sizes", 32, "--json", tmp_path / "out.json", *peers,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["what"], row["cache"]): row for row in result["rows"]}
    ours = rows["l4convert int4 absmax, block 32", "warm"]
    assert len(ours["seconds"]) == 2
    assert ours["bytes_in"] == sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert ours["parameters"] == result["checkpoint"]["parameters"] == pytest.approx(ours["bytes_in"] / 2, rel=0.05)
    assert ours["parameters_per_second"] == pytest.approx(ours["parameters"] / min(ours["seconds"]), rel=0.01)
    assert ours["ratios"]["cp"] == pytest.approx(ours["parameters_per_second"] / rate(rows["cp", "warm"]))
    assert ours["bytes_out"] > 0
    assert rows["cp", "warm"]["bytes_out"] == ours["bytes_in"]
    assert rows["ONNX Runtime quantizer, block 32", "warm"]["parameters"] < ours["parameters"]
    assert rate(rows["read", "cold"]) > 0 or "stays in memory" in rows["read", "cold"]["missing"]
    if installed:
        check_llama(rows)
    else:
        assert rows["llama.cpp", "warm"]["missing"] == "skipped (--skip llama.cpp)"
        assert "not measured: skipped (--skip llama.cpp)" in done.stdout
    assert not list(scratch.iterdir())


def rate(row: dict[str, float]) -> float:
    return row.get("parameters_per_second", 0.0)


def check_llama(rows: dict[tuple[str, str], dict[str, float]]) -> None:
    """A BF16 file as large as the checkpoint, then most of it in 4.5 bits a weight."""
    convert, both = (rows[f"llama.cpp convert{step}", "warm"] for step in ("", " + quantize Q4_0"))
    assert convert["bytes_out"] == pytest.approx(convert["bytes_in"], rel=0.1)
    assert 0.25 < both["bytes_out"] / convert["bytes_out"] < 0.6
    assert rate(both) < rate(convert)


def test_what_is_no_checkpoint_is_an_error_of_one_line(tmp_path: Path) -> None:
    done = run_script("convert.py", "--checkpoint", tmp_path, "--scratch", tmp_path / "scratch")
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_conversion_that_fails_fails_the_benchmark(tmp_path: Path, checkpoint: Path) -> None:
    skips = [part for what in ("copy", "llama.cpp", "onnxruntime", "cold") for part in ("--skip", what)]
    options = ["--convert-options=--kv-cache nonsense", "--repeat", 1, "--scales", "lse", "--block-sizes", 32]
    done = run_script("convert.py", "--checkpoint", checkpoint, "--scratch", tmp_path, *skips, *options)
    assert done.returncode == 1
    assert "not measured: " in done.stdout
    assert "nonsense" in done.stdout


def test_a_peer_that_cannot_be_installed_has_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_compiler() -> None:
        raise workloads.Unavailable("pip install of llama-cpp-python failed: no compiler")

    monkeypatch.setattr(workloads, "llama", no_compiler)
    source = workloads.Source(tmp_path, (), 1, 2)
    (job,) = workloads.llama_steps(argparse.Namespace(llama_types=["Q4_0"], threads=1), source, tmp_path)
    row = table.Row(job.what, job.group, job.cache, job.missing)
    assert "| llama.cpp | warm | not measured: pip install of llama-cpp-python failed: no compiler |" in table.markdown(
        [row]
    )


def test_two_steps_are_added_and_compared_with_the_fastest() -> None:
    def row(what: str, group: str, *seconds: float) -> object:
        return table.Row(what, group, "warm", "", 1000, 2000, 500, seconds, 10, 5)

    rows = table.with_sums([
        row("l4convert", "l4convert", 2.0, 1.0),
        row("llama.cpp convert", "llama.cpp", 6.0, 7.0),
        row("llama.cpp quantize Q4_0", "llama.cpp", 4.0, 4.0),
        row("llama.cpp quantize Q4_K_S", "llama.cpp", 40.0, 40.0),
    ])  # fmt: skip
    sums = {row.what: row.seconds for row in rows if "convert + quantize" in row.what}
    assert sums == {
        "llama.cpp convert + quantize Q4_0": (10.0, 11.0),
        "llama.cpp convert + quantize Q4_K_S": (46.0, 47.0),
    }
    assert table.as_json(rows[0], rows)["ratios"] == {
        "read": None, "cp": None, "llama.cpp": pytest.approx(10.0), "onnxruntime": None,
    }  # fmt: skip
