"""``l4convert plan`` and ``convert --dry-run``: one plan, shown for people and as JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from l4convert import cli
from l4convert.checkpoint.presets import PRESETS
from l4convert.cli._plan import duration

REPO = Path(__file__).resolve().parents[2]


def plan_json(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> dict[str, Any]:
    assert cli.run([*map(str, args), "--json"]) == code
    content = json.loads(capsys.readouterr().out)
    assert content["schema"] == "l4convert.plan/1"
    return content  # type: ignore[no-any-return]


# The schema: name -> type, nested. A change here is a new version of it.
SCHEMA: dict[str, Any] = {
    "schema": str,
    "source": str,
    "adapters": list,
    "parameters": int,
    "active_parameters": int,
    "source_bytes": int,
    "output": str,
    "target": str,
    "recipe": str,
    "kv_cache": str,
    "compute": str,
    "bytes": int,
    "tensor_count": int,
    "kinds": [{"kind": str, "tensors": int, "bytes": int}],
    "files": dict,
    "network": type(None),
    "shared": type(None),
    "disk": {"needed_bytes": int, "folder": str, "free_bytes": int, "missing_bytes": int},
    "memory": {
        "peak_bytes": int,
        "process_bytes": int,
        "tile_bytes": int,
        "pages_bytes": int,
        "jobs": int,
        "largest_tile": {"tensor": str, "rows": int},
        "method": str,
    },
    "time": {
        "estimate": bool,
        "seconds": float,
        "schemes": [{"scheme": str, "elements": int, "elements_per_second": int}],
        "jobs": int,
        "digest": {"bytes": int, "bytes_per_second": int},
    },
    "serving": type(None),
    "passes": [{"name": str, "fired": int, "skipped": list, "notes": list}],
    "tensors": [
        {
            "name": str,
            "kind": str,
            "scheme": str,
            "dtype": str,
            "shape": list,
            "bytes": int,
            "file": str,
            "offset": int,
            "sources": list,
        }
    ],
}


# Of "serving", on a GPU and for a context.
SERVING: dict[str, Any] = {
    "machine": str,
    "memory_bytes": int,
    "bandwidth_bytes_per_second": int,
    "batch": int,
    "prefill_tokens": int,
    "context": int,
    "caches": [
        {
            "dtype": str,
            "chosen": bool,
            "bytes_per_token": int,
            "largest_context": dict,
            "context": int,
            "cache_bytes": int,
            "gpus": {"gpus": int, "by_heads": int, "by_tokens": int},
            "used_bytes": int,
            "reason": str,
            "gpus_by_bytes": int,
            "fewest": type(None),
            "decode_tokens_per_second": float,
        }
    ],
    "arithmetic": dict,
    "notes": list,
}


def conforms(value: Any, schema: Any, where: str = "plan") -> None:
    if isinstance(schema, dict):
        assert value.keys() == schema.keys(), where
        for key, part in schema.items():
            conforms(value[key], part, f"{where}.{key}")
    elif isinstance(schema, list):
        assert value, where
        for item in value:
            conforms(item, schema[0], where)
    else:
        assert type(value) is schema or (where.endswith(".offset") and value is None), where


def test_the_json_has_its_schema(capsys, nano, tmp_path):
    conforms(plan_json(capsys, "plan", nano, "--output", tmp_path / "out", "--tensors"), SCHEMA)


def test_the_use_of_an_artifact_has_its_schema(capsys, nano):
    plan = plan_json(capsys, "plan", nano, "--no-measure", "--target", "h100", "--context", "2k", "--batch", 3)
    conforms(plan["serving"], SERVING, "serving")
    assert (plan["target"], plan["serving"]["machine"], plan["serving"]["context"]) == ("tensorrt", "h100", 2048)
    assert list(plan["serving"]["arithmetic"]) == ["hardware", "memory", "largest context", "GPUs", "decode", "prefill"]
    for lines in plan["serving"]["arithmetic"].values():
        conforms(lines[:0] or [{key: str(line[key]) for key in line} for line in lines],
                 [dict.fromkeys(("name", "value", "unit", "arithmetic", "source"), str)])  # fmt: skip
    assert [row["chosen"] for row in plan["serving"]["caches"]] == [True, False, False, False]


def test_the_use_of_an_artifact_as_text(capsys, nano, tmp_path):
    args = ["plan", str(nano), "--no-measure", "--context", "1k"]
    assert cli.run([*args, "--target", "h100"]) == 0
    text = capsys.readouterr().out
    for part in ("in use on  h100: 80.0 GB", "1k = 1,024 tokens", "bfloat16 *", "one holds all of it", "free  "):
        assert part in text, part
    assert "x 1,024 tokens" not in text
    assert cli.run([*args, "--target", "h100", "--explain"]) == 0
    text = capsys.readouterr().out
    for part in (
        "x 1,024 tokens",
        "bandwidth: 3,350,000,000,000 B/s",
        "[https://",
        "decode bound: ",
        "memory: what this",
    ):
        assert part in text, part
    profile = tmp_path / "mine.toml"
    profile.write_text(
        'summary = "small"\ncompute_capability = "8.9"\nmemory_bytes = 900_000_000\nrecipe = "int4"\n'
        'bandwidth_bytes_per_second = 1_000\nprecisions = ["bf16"]\nruntimes = ["tensorrt-rtx"]\n'
    )
    assert cli.run([*args, "--target", str(profile), "--batch", "4096"]) == 0
    text = capsys.readouterr().out
    for part in (
        "in use on  mine: 900.0 MB, 1.0 kB/s (small)",
        "tensorrt-rtx",
        "does not fit: ",
        "(layers would have to be",
    ):
        assert part in text, part
    assert cli.run([*args, "--target", "portable"]) == 0
    text = capsys.readouterr().out
    assert "in use on  this machine: " in text
    assert "largest context" in text


def test_a_dry_run_prints_the_same_plan(capsys, nano, tmp_path):
    options = [nano, "--output", tmp_path / "out", "--recipe", "fp8", "--target", "portable", "--kv-cache", "static"]
    plans = [plan_json(capsys, "plan", *options), plan_json(capsys, "convert", *options, "--dry-run")]
    assert list(tmp_path.iterdir()) == []
    for plan in plans:  # what is measured differs from run to run
        assert plan.pop("time")["seconds"] > 0
        assert plan["disk"].pop("free_bytes") > 0
        memory = plan["memory"]
        assert (
            memory.pop("peak_bytes")
            == memory.pop("process_bytes") + memory["jobs"] * memory["tile_bytes"] + memory["pages_bytes"]
        )
    assert plans[0] == plans[1]
    assert (plans[0]["recipe"], plans[0]["target"], plans[0]["kv_cache"]) == ("fp8", "portable", "static")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_need_no_checkpoint(capsys, preset):
    plan = plan_json(capsys, "plan", "--preset", preset, "--block-size", 128, "--no-measure")
    assert plan["source"] == f"preset {preset}"
    assert plan["time"] is None
    assert plan["output"] is plan["disk"]["folder"] is plan["disk"]["free_bytes"] is None
    assert sum(kind["bytes"] for kind in plan["kinds"]) == plan["bytes"] <= plan["files"]["model.safetensors"]
    # 4 bits a weight, a float32 scale for 128 of them, and the BF16 embedding and head.
    vocabulary = 2 * PRESETS[preset].vocab_size * PRESETS[preset].hidden_size
    estimate = (plan["parameters"] - vocabulary) * (0.5 + 4 / 128) + 2 * vocabulary
    assert plan["bytes"] == pytest.approx(estimate, rel=0.001)
    assert sum(tensor["bytes"] for tensor in plan["tensors"] if tensor["offset"] is not None) == plan["bytes"]


def test_text_for_people(capsys, nano, tmp_path):
    assert cli.run(["plan", str(nano), "-o", str(tmp_path / "out"), "--tensors", "-v"]) == 0
    text = capsys.readouterr().out
    for part in (
        "1.6 M (986 k active per token)",
        "an estimate, measured here",
        f"free in {tmp_path}",
        "of mapped source",
        "pages of the source files",
        "quantize_weights skipped 5: the recipe keeps it",
        "model.layers.0.feed_forward.experts.gate_up_proj_int4_packed ",
        "model.safetensors",
        "rotary tables",
    ):
        assert part in text, part
    assert cli.run(["plan", str(nano), "--no-measure"]) == 0
    text = capsys.readouterr().out
    assert "not measured" in text
    assert "(no --output)" in text
    assert "gate_up_proj_int4_packed" not in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("command", [["plan"], ["convert", "--dry-run"]])
def test_too_little_disk_is_exit_3_after_the_plan(capsys, nano, tmp_path, monkeypatch, command):
    name, *flags = command
    args = [name, str(nano), "--output", str(tmp_path / "out"), *flags]
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    plan = plan_json(capsys, *args, code=3)
    missing = plan["disk"]["needed_bytes"] - 1000
    assert plan["disk"]["missing_bytes"] == missing > 0
    assert cli.run(args) == 3
    out, err = capsys.readouterr()
    assert "TOO FEW" in out
    assert err.startswith(f"error: {tmp_path}: ")
    assert f": {missing} too few" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "neither was given"),
        (["CKPT", "--preset", "scout"], "both were given"),
        (["--preset", "scuot"], "no preset 'scuot'"),
        (["--preset", "scout", "--target", "tpu"], "unknown target 'tpu'"),
        (["--preset", "scout", "--recipe", "int3"], "no recipe 'int3'"),
        (["--preset", "scout", "--recipe", "fp8", "--block-size", "32"], "has no int4 rule"),
        (["--preset", "scout", "--block-size", "48"], "48"),
        (["CKPT", "--context", "1G"], "not a number of tokens"),
        (["CKPT", "--context", "11M"], "more than the model's 10,485,760 positions"),
        (["CKPT", "--target", "h100", "--tensor-parallel", "7"], "does not divide the"),
        (["CKPT", "--target", "h101"], "unknown target 'h101'"),
    ],
)
def test_bad_combinations_are_exit_2(capsys, nano, args, message):
    assert cli.run(["plan", *(str(nano) if arg == "CKPT" else arg for arg in args)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err


def test_an_output_in_use_is_exit_2_unless_it_will_be_replaced(capsys, nano, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert cli.run(["plan", str(nano), "-o", str(out), "--no-measure"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.run(["plan", str(nano), "-o", str(out), "--no-measure", "--overwrite"]) == 0


def process(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("L4CONVERT_")}
    env["PYTHONPATH"] = str(REPO)
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, check=False)


def test_from_plan_to_artifact_as_a_user_goes(nano, tmp_path):
    planned = process("-m", "l4convert", "plan", nano, "-o", "out", "--json", "--no-measure", cwd=tmp_path)
    assert (planned.returncode, planned.stderr) == (0, "")
    assert process("-m", "l4convert", "convert", nano, "-o", "out", cwd=tmp_path).returncode == 0
    files = json.loads(planned.stdout)["files"]
    assert {"model.onnx", "model.safetensors"} <= files.keys()
    assert {path.name for path in (tmp_path / "out").iterdir()} == files.keys() | {"l4convert.json"}
    for name, nbytes in files.items():
        assert (tmp_path / "out" / name).stat().st_size == nbytes, name
    refused = process("-m", "l4convert", "plan", nano, "--preset", "scout", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "Traceback" not in refused.stderr


def test_the_largest_model_in_a_process_of_its_own(tmp_path):
    """Less than a gigabyte, as what the process ever held."""
    code = (
        "import sys\n"
        "from l4convert import cli\n"
        "from l4convert.emit.memory import peak_resident_bytes\n"
        "code = cli.run(['plan', '--preset', 'behemoth', '--no-measure', '--json', '--tensors'])\n"
        "print(peak_resident_bytes(), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = process("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["tensor_count"] <= len(plan["tensors"])
    assert int(done.stderr) < 1e9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (12.4, "12 s"), (280, "5 min"), (4260, "71 min"), (7190, "2 h 0 min"), (82400, "23 h")],
)
def test_durations_have_the_precision_of_an_estimate(seconds, text):
    assert duration(seconds) == text
