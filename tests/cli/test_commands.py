"""The commands from end to end on a small random checkpoint: what they print, write and exit with."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import onnx
import pytest

from l4convert import cli
from l4convert.cli import doctor


def run_json(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> dict[str, Any]:
    """Run a command with ``--json``; its exit code must be ``code`` and its stdout one JSON object of its schema."""
    assert cli.run([*map(str, args), "--json"]) == code
    content = json.loads(capsys.readouterr().out)
    assert isinstance(content, dict)
    assert content["schema"].startswith("l4convert.")
    assert content["schema"].endswith("/1")
    return content


@pytest.fixture(scope="session")
def checkpoint(scout_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``scout_layout`` with a tokenizer: one token for each printable ASCII character."""
    from tokenizers import Tokenizer, decoders, models

    path = tmp_path_factory.mktemp("cli") / "scout"
    shutil.copytree(scout_layout, path)
    tokenizer = Tokenizer(models.BPE(vocab={chr(code): code for code in range(32, 127)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="session")
def artifact(checkpoint: Path) -> Path:
    """Converted to INT4 for the CPU by the command, in a process of its own."""
    out = checkpoint.parent / "out"
    command = [sys.executable, "-m", "l4convert", "convert", str(checkpoint), "-o", str(out), "--recipe", "int4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress where stderr is no terminal
    assert f"Next: l4convert validate {out} --reference {checkpoint}" in done.stdout
    return out


def test_targets_and_passes_are_the_tables(capsys):
    from l4convert.graph_passes import PASSES
    from l4convert.targets import TARGETS

    assert [row["name"] for row in run_json(capsys, "targets")["targets"]] == list(TARGETS)
    assert [row["name"] for row in run_json(capsys, "passes")["passes"]] == [row.name for row in PASSES]
    assert cli.run(["targets"]) == 0
    assert cli.run(["passes"]) == 0
    text = capsys.readouterr().out
    for row in (*TARGETS.values(), *PASSES):
        assert row.name in text
        assert row.summary in text


def test_inspect_counts_a_checkpoints_parameters_as_transformers_does(capsys, scout_layout):
    from transformers import Llama4ForCausalLM

    content = run_json(capsys, "inspect", scout_layout)
    model = Llama4ForCausalLM.from_pretrained(scout_layout)
    assert content["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert content["active_parameters"] == content["parameters"] - experts * 3 // 4  # one of four experts works
    assert content["bytes_by_dtype"] == {"BFLOAT16": 2 * content["parameters"]}
    assert "tensors" not in content


def test_inspect_describes_the_layers(capsys, maverick_layout):
    assert cli.run(["inspect", str(maverick_layout)]) == 0
    text = capsys.readouterr().out
    rows = dict(line.strip().split("  ", 1) for line in text.splitlines() if "  " in line.strip())
    assert rows["mixture of experts"].strip() == "2: 1, 3"
    assert rows["dense (width 96)"].strip() == "2: 0, 2"
    assert rows["global"].strip() == "1: 3"
    assert "no QK norm" in text
    assert "unscaled" in text


def test_inspect_lists_tensors(capsys, scout_layout):
    content = run_json(capsys, "inspect", scout_layout, "--tensors")
    by_name = {row["name"]: row for row in content["tensors"]}
    assert by_name["model.embed_tokens.weight"]["shape"] == [128, 64]
    assert sum(row["bytes"] for row in by_name.values()) == content["bytes"]


def test_active_parameters_of_full_size_scout():
    """Meta's model card says 17 B active, 109 B in all (with vision)."""
    from types import SimpleNamespace

    from l4convert.checkpoint.names import expected_tensors
    from l4convert.checkpoint.parameters import parameter_counts
    from tests.shapes import SCOUT

    tensors = {
        name: SimpleNamespace(size=math.prod(shape)) for name, shape in expected_tensors(SCOUT, "stacked").items()
    }
    total, active = parameter_counts(SCOUT, tensors)
    assert round(total / 1e9) == 108
    assert round(active / 1e9) == 17


def test_inspect_of_neither_is_exit_3(capsys, tmp_path):
    assert cli.run(["inspect", str(tmp_path / "nothing")]) == 3
    assert capsys.readouterr().err.startswith("error: ")


def test_convert_writes_what_the_dry_run_said(capsys, checkpoint, artifact, tmp_path):
    plan = run_json(capsys, "convert", checkpoint, "--output", tmp_path / "none", "--dry-run")
    assert not (tmp_path / "none").exists()
    assert plan["schema"] == "l4convert.plan/1"
    for name, nbytes in plan["files"].items():
        assert (artifact / name).stat().st_size == nbytes, name
    assert [row["name"] for row in plan["passes"]][:3] == ["outline_attention", "fuse_experts", "quantize_weights"]
    assert {row["name"]: row["fired"] for row in plan["passes"]}["outline_attention"] == 4


def test_convert_reports_and_refuses_to_overwrite(capsys, checkpoint, tmp_path):
    out = tmp_path / "out"
    args = ["convert", checkpoint, "--output", out, "--recipe", "fp8", "--target", "portable", "--kv-cache", "windowed"]
    content = run_json(capsys, *args)
    assert (content["recipe"], content["target"], content["kv_cache"]) == ("fp8", "portable", "windowed")
    assert content["dry_run"] is False
    assert content["bytes"] > 0
    assert cli.run([*map(str, args)]) == 2
    assert str(out) in capsys.readouterr().err
    assert cli.run([*map(str, args), "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("option", [("--target", "tpu"), ("--recipe", "int3"), ("--block-size", "48")])
def test_convert_with_an_unknown_name_is_exit_2(capsys, checkpoint, tmp_path, option):
    assert cli.run(["convert", str(checkpoint), "--output", str(tmp_path / "out"), *option]) == 2
    assert option[1] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inspect_describes_an_artifact(capsys, artifact):
    content = run_json(capsys, "inspect", artifact, "--tensors")
    assert (content["kind"], content["recipe"], content["target"]) == ("artifact", "int4", "cpu")
    assert content["operators"]["com.microsoft::QMoE"] == 4
    assert content["inputs"][0] == {"name": "input_ids", "dtype": "INT64", "shape": content["inputs"][0]["shape"]}
    assert len(content["inputs"]) == 2 + 2 * 4
    assert sum(content["bytes_by_dtype"].values()) == sum(row["bytes"] for row in content["tensors"])
    # Everything but embedding, head (128 x 64 each), routers (4 x 64 a layer) and norms is 4-bit.
    plain = 2 * 128 * 64 + 4 * 4 * 64 + (2 * 4 + 1) * 64
    whole = run_json(capsys, "inspect", artifact.parent / "scout")["parameters"]
    assert content["quantized_share"] == pytest.approx(1 - plain / whole, abs=0.01)
    assert cli.run(["inspect", str(artifact)]) == 0
    text = capsys.readouterr().out
    assert "com.microsoft::QMoE" in text
    assert "... and 6 more caches" in text


def _unknown_type(model: Any) -> None:
    model.graph.initializer[0].data_type = 99


def _name_for_a_terminal(model: Any) -> None:
    model.graph.input[0].name = "\x1b[2Jx"


@pytest.mark.parametrize(
    ("file", "change", "code", "said"),
    [
        ("l4convert.json", lambda content: content.update(tool=1), 3, "tool must be an object"),
        ("l4convert.json", lambda content: content.update(files=[]), 3, "files must be an object"),
        ("l4convert.json", lambda content: content["files"].update({"config.json": {}}), 3, "bytes is missing"),
        ("model.onnx", _unknown_type, 3, "data type 99"),
        ("model.onnx", _name_for_a_terminal, 0, "\\x1b[2Jx"),
    ],
)
def test_inspect_trusts_nothing_of_an_artifact(capsys, artifact, tmp_path, file, change, code, said):
    shutil.copytree(artifact, tmp_path / "out")
    path = tmp_path / "out" / file
    content: Any = json.loads(path.read_text()) if file.endswith("json") else onnx.load(path, load_external_data=False)
    change(content)
    path.write_bytes(json.dumps(content).encode() if file.endswith("json") else content.SerializeToString())
    assert cli.run(["inspect", str(tmp_path / "out")]) == code
    assert said in "".join(capsys.readouterr())


def test_convert_help_describes_every_recipe_and_cache(capsys):
    from l4convert.quantization.recipe import bundled_recipes
    from l4convert.runtime.manifest import KvCache

    assert cli.run(["convert", "--help"]) == 0
    described = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")}
    assert described >= {*bundled_recipes(), *get_args(KvCache)}


def test_verify_passes_then_fails_on_a_flipped_bit(capsys, artifact, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    assert run_json(capsys, "verify", copy)["ok"] is True
    weights = copy / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-100, io.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, io.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    content = run_json(capsys, "verify", copy, code=4)
    assert content["ok"] is False
    assert any("model.safetensors" in problem for problem in content["problems"])
    assert cli.run(["verify", str(copy), "--quiet"]) == 4
    out, err = capsys.readouterr()
    assert "model.safetensors" in out
    assert err.startswith(f"error: {copy}: ")


def test_verify_of_no_artifact_is_exit_3(tmp_path):
    assert cli.run(["verify", str(tmp_path)]) == 3


def test_generate_streams_what_json_says(capsys, artifact, monkeypatch):
    args = ["generate", str(artifact), "--max-new-tokens", "12"]
    content = run_json(capsys, *args, "--prompt", "def main")
    assert content["prompt_tokens"] == 8
    assert len(content["token_ids"]) <= 12
    assert content["text"] == "".join(chr(token) for token in content["token_ids"] if 32 <= token < 127)
    assert cli.run([*args, "--prompt", "def main"]) == 0
    assert capsys.readouterr() == (content["text"] + "\n", "")
    monkeypatch.setattr("sys.stdin", io.StringIO("def main"))
    assert cli.run([*args, "--prompt", "-"]) == 0
    assert capsys.readouterr().out == content["text"] + "\n"


def test_generate_samples_by_seed(capsys, artifact):
    args = ["generate", artifact, "--prompt", "a", "--max-new-tokens", 30, "--temperature", 5.0]
    first, again = (run_json(capsys, *args, "--seed", 1)["token_ids"] for _ in range(2))
    other = run_json(capsys, *args, "--seed", 2)["token_ids"]
    assert first == again
    assert first != other


def test_generate_continues_a_file(capsys, artifact, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfdef main " * 9)
    text = file.read_bytes()[3:].decode()
    given, read = (
        run_json(capsys, "generate", artifact, *options, "--max-new-tokens", 5)
        for options in (("--prompt", text), ("--prompt-file", file))
    )
    assert read["token_ids"] == given["token_ids"]
    assert (read["prompt"], read["prompt_file"]) == (None, str(file))
    assert (given["prompt"], given["prompt_file"]) == (text, None)
    assert read["prompt_tokens_per_second"] == pytest.approx(read["prompt_tokens"] / read["prompt_seconds"], rel=0.1)
    assert read["generation_tokens_per_second"] == pytest.approx(4 / read["generation_seconds"], rel=0.5)
    assert read["seconds"] == pytest.approx(read["prompt_seconds"] + read["generation_seconds"], abs=0.002)


def test_generate_says_what_is_wrong_with_a_prompt(capsys, artifact, tmp_path):
    (tmp_path / "latin").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "long").write_text("x" * 5000)
    cases = [
        ([], 2, "--prompt TEXT or by --prompt-file FILE"),
        (["--prompt", "a", "--prompt-file", "b"], 2, "one of the two"),
        (["--prompt-file", tmp_path / "absent"], 3, "absent: No such file"),
        (["--prompt-file", tmp_path], 3, "Is a directory"),
        (["--prompt-file", tmp_path / "latin"], 3, "not UTF-8 text: byte 3"),
        (["--prompt-file", tmp_path / "long"], 2, "5000 tokens and the model 4096 positions"),
    ]
    for options, code, message in cases:
        assert cli.run(["generate", str(artifact), *map(str, options)]) == code
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [("--temperature", "-1"), ("--top-p", "0"), ("--seed", "-1"), ("--max-new-tokens", "0")]
)
def test_generate_with_a_value_out_of_range_is_exit_2(artifact, option):
    assert cli.run(["generate", str(artifact), "--prompt", "a", *option]) == 2


def test_validate_passes_and_leaves_its_reports(capsys, checkpoint, tmp_path):
    out = tmp_path / "out"
    assert cli.run(["convert", str(checkpoint), "-o", str(out), "--recipe", "none", "-q"]) == 0
    (tmp_path / "text").write_text("def main(): return 1 + 2\n" * 6)
    files = ["--junit", tmp_path / "parity.xml", "--html", tmp_path / "parity.html"]
    common = ["validate", out, "--reference", checkpoint, "--text", tmp_path / "text", "--window", 40]
    content = run_json(capsys, *common, *files)
    assert content["passed"] is True
    assert json.loads((out / "parity.json").read_text()) == content
    suites = ElementTree.parse(tmp_path / "parity.xml").getroot()
    assert suites.get("failures") == "0"
    assert (tmp_path / "parity.html").read_text().startswith("<!doctype html>")
    assert cli.run([*map(str, common)]) == 0
    assert "Parity passed" in capsys.readouterr().out
    assert cli.run(["verify", str(out)]) == 0  # the report is no damage


def test_validate_fails_with_exit_4_and_says_why(capsys, checkpoint, artifact, tmp_path):
    policy = tmp_path / "strict.toml"
    policy.write_text('schema = "l4convert.policy/1"\n[reference]\nmean_kl = 1e-12\n')
    args = ["validate", artifact, "--reference", checkpoint, "--tokens", 40, "--window", 40, "--policy", policy]
    content = run_json(capsys, *args, code=4)
    assert content["passed"] is False
    assert any("mean_kl" in reason for reason in content["failures"])
    assert cli.run([*map(str, args)]) == 4
    out, err = capsys.readouterr()
    assert "FAIL" in out
    assert err.startswith("error: Parity FAILED")


def test_validate_with_a_text_that_is_not_there_is_exit_3(capsys, checkpoint, artifact):
    args = ["validate", str(artifact), "--reference", str(checkpoint), "--text", "nothing.txt"]
    assert cli.run(args) == 3
    assert "nothing.txt" in capsys.readouterr().err


def test_doctor_knows_this_machine(capsys):
    content = run_json(capsys, "doctor")
    assert content["ok"] is True
    assert content["system"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert content["system"]["memory_bytes"] >= content["system"]["memory_available_bytes"] > 0
    assert all(row["version"] for row in content["core"])
    assert "CPUExecutionProvider" in content["onnxruntime"]["providers"]


@pytest.mark.parametrize("compiled", [True, False])
def test_doctor_says_what_quantizes(capsys, monkeypatch, compiled):
    monkeypatch.setattr("l4convert.quantization.native.AVAILABLE", compiled)
    assert run_json(capsys, "doctor")["system"]["compiled_kernels"] is compiled


def test_doctor_without_extras_gives_the_commands_and_is_content(capsys, monkeypatch):
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: installed(name) if name in doctor.CORE else None)
    content = run_json(capsys, "doctor")
    assert content["ok"] is True
    assert {row["name"]: row["install"] for row in content["extras"]} == {
        name: f"pip install {' '.join(extra['packages'])}" for name, extra in doctor.EXTRAS.items()
    }


def test_doctor_never_advises_a_second_build_of_onnxruntime(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: "1.0" if name == "onnxruntime-gpu" else None)
    extras = {row["name"]: row["install"] for row in run_json(capsys, "doctor")["extras"]}
    assert extras["gpu"] is None
    assert extras["cpu"] is None


def test_doctor_reports_two_builds_of_onnxruntime(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda _name: "1.0")
    (problem,) = run_json(capsys, "doctor")["problems"]
    assert "onnxruntime and onnxruntime-gpu" in problem
    assert "pip uninstall" in problem


def test_doctor_fails_on_a_broken_core_package(capsys, monkeypatch):
    monkeypatch.setitem(doctor.CORE, "safetensors", "a_module_that_is_not_there")
    content = run_json(capsys, "doctor", code=5)
    assert content["ok"] is False
    assert cli.run(["doctor"]) == 5
    assert "pip install --force-reinstall safetensors" in capsys.readouterr().err
