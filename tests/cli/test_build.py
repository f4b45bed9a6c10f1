"""``l4convert build``: what it prints and exits with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from l4convert import cli
from l4convert.cli.build import parse_segments
from l4convert.errors import UsageError
from l4convert.pipeline import ConvertOptions, convert
from tests.checkpoints import write_random_checkpoint

SMALL = ("--max-context", "32", "--prefill-tokens", "8")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli-build")
    checkpoint = write_random_checkpoint(folder / "c", num_hidden_layers=1, interleave_moe_layer_step=9)
    convert(ConvertOptions(checkpoint, folder / "out", target="tensorrt-rtx", recipe="int4", kv_cache="static"))
    return folder / "out"


def test_engines_for_two_gpus_as_json_then_kept(dense: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(dense, tmp_path / "out")
    command = ["build", str(out), "--target", "l4", "--target", "rtx-5090", *SMALL]
    assert cli.run([*command, "--json"]) == 0
    stdout, stderr = capfd.readouterr()
    assert stderr == ""
    result = json.loads(stdout)
    assert result["schema"] == "l4convert.build/1"
    assert result["builder"]["name"] == "tensorrt_rtx"
    assert result["segments_checked"] is None
    assert [(e["hardware"], e["compute_capability"], e["skipped"]) for e in result["engines"]] == [
        ("l4", "8.9", False),
        ("rtx-5090", "12.0", False),
    ]
    assert all(e["bytes"] == (out / e["path"]).stat().st_size for e in result["engines"])
    assert cli.run(command) == 0
    stdout, stderr = capfd.readouterr()
    assert stdout.count("built already") == 2
    assert cli.run(["verify", str(out)]) == 0


def test_a_dry_run_writes_nothing(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["build", str(dense), "--target", "l4", *SMALL, "--dry-run", "--json"]) == 0
    [engine] = json.loads(capsys.readouterr().out)["engines"]
    assert engine["path"] == "engines/l4/decoder.plan"
    assert engine["caches_bytes"] == 2 * 2 * 8 * 16 * 2  # key and value, 2 heads, 8 slots, 16 numbers of 2 bytes
    assert engine["build_memory_bytes"] > engine["weights_bytes"] > 0
    assert cli.run(["build", str(dense), "--target", "l4", *SMALL, "--dry-run"]) == 0
    assert "memory to build" in capsys.readouterr().out
    assert not (dense / "engines").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target", "h100"], 2, "h100: tensorrt-rtx has no engines for compute capability 9.0"),
        (["--target", "l4", "--segments", "0"], 2, "--segments needs --layers-per-engine"),
        (["--target", "l4", "--layers-per-engine", "1", "--segments", "2-1"], 2, "is not a list of numbers"),
        (["--target", "l4", "--memory-limit", "1M"], 3, "building needs about"),
        ([], 2, "Missing option '--target'"),
    ],
)
def test_refusals(
    dense: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert cli.run(["build", str(dense), *arguments]) == code
    assert message in capsys.readouterr().err


def test_segments_are_parsed() -> None:
    assert parse_segments("0-2, 5") == (0, 1, 2, 5)
    for wrong in ("", "a", "1-", "-1", "3-1", "0,,1"):
        with pytest.raises(UsageError):
            parse_segments(wrong)


def test_targets_lists_the_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["targets", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)["hardware"]}
    assert listed["rtx-5090"]["memory_bytes"] == 32 * 10**9
    assert cli.run(["targets"]) == 0
    assert "rtx-pro-6000" in capsys.readouterr().out


def test_the_shell_completes_hardware() -> None:
    from l4convert.cli._complete import hardware_names

    assert [item.value for item in hardware_names(None, None, "rtx-p")] == ["rtx-pro-6000"]  # type: ignore[arg-type]
    assert [item.type for item in hardware_names(None, None, "./m")] == ["file"]  # type: ignore[arg-type]
