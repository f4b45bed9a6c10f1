"""The command line as a user runs it: processes of their own, files on disk, exit codes, what goes to which stream."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import MAVERICK, write_random_checkpoint
from tests.warm import run_command

REPO = Path(__file__).resolve().parent.parent
TEXT = "def main():\n    for index in range(10):\n        print(index, 'is the number')\n" * 8


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "l4convert", *map(str, args)]


def run(*args: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one command; its exit code must be ``code``. Its working directory is not the repository."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("L4CONVERT_")}
    env |= {"PYTHONPATH": str(REPO), **environment}
    if environment:
        done = subprocess.run(command(*args), capture_output=True, text=True, env=env, cwd="/", check=False)
    else:
        done = run_command([str(arg) for arg in args], cwd=Path("/"), environment=env)
    assert done.returncode == code, (args, done.stdout, done.stderr)
    assert "Traceback" not in done.stdout + done.stderr
    if code:
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) <= 3
    return done


def run_json(*args: object, code: int = 0) -> dict[str, Any]:
    """The one JSON object that the command prints; stderr is empty, or explains a failure."""
    done = run(*args, "--json", code=code)
    content = json.loads(done.stdout)
    assert isinstance(content, dict)
    if not code:
        assert done.stderr == ""
    return content


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def with_tokenizer(checkpoint: Path) -> Path:
    """One token for each printable ASCII character; line ends are unknown to it and dropped."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE(vocab={chr(code): code for code in range(32, 127)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    return checkpoint


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(write_random_checkpoint(tmp_path_factory.mktemp("end") / "scout"))


@pytest.fixture(scope="module")
def maverick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("end") / "maverick"
    return with_tokenizer(write_random_checkpoint(path, conditional=True, shards=3, **MAVERICK))


@pytest.fixture(scope="module")
def artifact(scout: Path) -> Path:
    """Tests that change it take a copy."""
    run("convert", scout, "--output", scout.parent / "int4")
    return scout.parent / "int4"


ROADS = {
    "scout": ("none", "cpu", "static"),
    "maverick": ("none", "portable", "windowed", "--verify-passes"),
    "nano": ("int4", "cpu", "growing"),
}


@pytest.mark.parametrize("name", ROADS)
def test_the_whole_road(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    checkpoint: Path = request.getfixturevalue(name)
    recipe, target, kv_cache, *more = ROADS[name]
    (tmp_path / "text").write_text(TEXT)
    out = tmp_path / "out"
    options = ["--recipe", recipe, "--target", target, "--kv-cache", kv_cache]
    converted = run_json("convert", checkpoint, "-o", out, *options, *more)
    assert converted["schema"] == "l4convert.convert/1"
    assert [converted[key] for key in ("output", "recipe", "target", "kv_cache")] == [
        str(out),
        recipe,
        target,
        kv_cache,
    ]
    verified = run_json("verify", out)
    assert (verified["schema"], verified["ok"], verified["problems"]) == ("l4convert.verify/1", True, [])
    assert verified["tensors"] >= converted["tensors"]
    options = ["--text", tmp_path / "text", "--tokens", 180, "--window", 90]
    report = run_json("validate", out, "--reference", checkpoint, *options)
    assert (report["schema"], report["passed"]) == ("l4convert.parity/1", True)
    assert {row["name"] for row in report["rows"]} >= {"one call", "odd splits", "token by token"}
    assert all(row["reference"]["non_finite"] == 0 for row in report["rows"])
    assert json.loads((out / "parity.json").read_text()) == report
    written = run_json("generate", out, "--prompt", "def main", "--max-new-tokens", 24)
    assert written["schema"] == "l4convert.generate/1"
    assert 0 < len(written["token_ids"]) <= 24
    assert run("generate", out, "--prompt", "def main", "--max-new-tokens", 24).stdout == written["text"] + "\n"
    run("verify", out)  # a report is no damage


def test_generated_text_is_transformers_own(nano: Path, tmp_path: Path) -> None:
    """Greedy and unquantized, past the end of a chunk."""
    import torch
    from transformers import AutoTokenizer, Llama4ForCausalLM

    prompt = "import os\n\n\ndef read(path):\n    with open(path) as file:\n"
    run("convert", nano, "-o", tmp_path / "out", "--recipe", "none", "--kv-cache", "static")
    written = run_json("generate", tmp_path / "out", "--prompt", prompt, "--max-new-tokens", 80)
    model: Any = Llama4ForCausalLM.from_pretrained(nano, dtype=torch.float32, attn_implementation="eager").eval()
    ids = AutoTokenizer.from_pretrained(nano)(prompt, return_tensors="pt").input_ids
    assert ids.shape[1] == written["prompt_tokens"]
    assert ids.shape[1] < model.config.attention_chunk_size < ids.shape[1] + len(written["token_ids"])
    # Causal, so one call says what the greedy choice was at every step.
    whole = torch.cat([ids, torch.tensor([written["token_ids"]])], dim=1)
    with torch.no_grad():
        choices = model(whole, use_cache=False).logits[0].argmax(dim=-1)[ids.shape[1] - 1 : -1]
    assert written["token_ids"] == choices.tolist()


@pytest.mark.parametrize("recipe", ["int4", "fp8"])
def test_two_conversions_give_the_same_bytes(maverick: Path, tmp_path: Path, recipe: str) -> None:
    for number, folder in enumerate(("one", "deeper/two")):
        surroundings = {"PYTHONHASHSEED": str(number), "TZ": ["UTC", "Asia/Tokyo"][number], "OMP_NUM_THREADS": "1"}
        run("convert", maverick, "-o", tmp_path / folder, "--recipe", recipe, **(surroundings if number else {}))
    one, two = files(tmp_path / "one"), files(tmp_path / "deeper" / "two")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert b"maverick" not in b"".join(one.values())  # no path of this machine either


def test_a_killed_conversion_leaves_no_output_and_can_be_repeated(scout: Path, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    expected = files(artifact)
    start = time.monotonic()
    run("convert", scout, "-o", tmp_path / "timed")
    whole = time.monotonic() - start
    killed = 0
    for delay in np.random.default_rng(0).uniform(0.3, 1.0, 5) * whole:
        process = subprocess.Popen(command("convert", scout, "-o", out, "--quiet"), cwd=REPO)
        try:
            process.wait(timeout=float(delay))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        if out.exists():  # whole, or not there at all
            assert files(out) == expected
            shutil.rmtree(out)
    assert killed
    run("convert", scout, "-o", out)
    assert files(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "timed"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Larger weights, so that a signal surely falls between the first and the last byte of a conversion."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8, "num_hidden_layers": 2}
    return write_random_checkpoint(tmp_path_factory.mktemp("end") / "large", **sizes)


def start_writing(checkpoint: Path, out: Path) -> subprocess.Popen[bytes]:
    """Start a conversion; return when it writes the weights."""
    process = subprocess.Popen(command("convert", checkpoint, "-o", out, "--quiet"), cwd=REPO)
    weights = out.parent / f".{out.name}.partial" / "artifact" / "model.safetensors"
    deadline = time.monotonic() + 60
    while not weights.exists():
        assert process.poll() is None, "ended before it wrote weights"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def test_a_conversion_killed_while_it_writes_weights(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_writing(large, out)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    run("verify", out, code=3)
    run("convert", large, "-o", out)
    assert run_json("verify", out)["ok"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_terminated_conversion_can_be_continued(large: Path, tmp_path: Path) -> None:
    process = start_writing(large, tmp_path / "out")
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert {path.name for path in tmp_path.iterdir()} <= {".out.partial"}
    run("convert", large, "-o", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_changed_bit_anywhere_is_exit_4(artifact: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.onnx", "config.json", "l4convert.json"):
        copy = tmp_path / name
        shutil.copytree(artifact, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        done = run("verify", copy, code=4)
        assert name in done.stdout
    (tmp_path / "model.onnx" / "tokenizer.json").unlink()
    content = run_json("verify", tmp_path / "model.onnx", code=4)
    assert content["ok"] is False
    assert any("tokenizer.json" in problem for problem in content["problems"])


def test_a_broken_policy_is_exit_4(scout: Path, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "strict.toml").write_text('schema = "l4convert.policy/1"\n[reference]\nmean_kl = 1e-9\n')
    options = ["--reference", scout, "--tokens", 60, "--window", 30, "--policy", tmp_path / "strict.toml"]
    report = run_json("validate", artifact, *options, code=4)
    assert report["passed"] is False
    assert any("mean_kl" in failure for failure in report["failures"])


def test_wrong_weights_are_exit_4(scout: Path, tmp_path: Path) -> None:
    """An artifact of other weights of the same shape, under the default policy."""
    run("convert", write_random_checkpoint(tmp_path / "other", seed=1), "-o", tmp_path / "out", "--recipe", "none")
    run("validate", tmp_path / "out", "--reference", scout, "--tokens", 120, "--window", 60, code=4)


ERRORS: dict[str, tuple[list[object], int]] = {
    "no command": (["transmogrify"], 2),
    "flag": (["convert", "CKPT", "--output", "OUT", "--fast"], 2),
    "no output": (["convert", "CKPT"], 2),
    "target": (["convert", "CKPT", "-o", "OUT", "--target", "tpu"], 2),
    "recipe": (["convert", "CKPT", "-o", "OUT", "--recipe", "int3"], 2),
    "block size": (["convert", "CKPT", "-o", "OUT", "--block-size", "48"], 2),
    "output in use": (["convert", "CKPT", "-o", "ARTIFACT"], 2),
    "no checkpoint": (["convert", "/nowhere/llama", "-o", "OUT"], 3),
    "no weights": (["convert", "EMPTY", "-o", "OUT"], 3),
    "recipe file": (["convert", "CKPT", "-o", "OUT", "--recipe", "/nowhere/mine.toml"], 3),
    "no artifact": (["verify", "EMPTY"], 3),
    "generate from nothing": (["generate", "EMPTY", "--prompt", "a"], 3),
    "temperature": (["generate", "ARTIFACT", "--prompt", "a", "--temperature", "-1"], 2),
    "no text": (["validate", "ARTIFACT", "--reference", "CKPT", "--text", "/nowhere/text"], 3),
    "no reference": (["validate", "ARTIFACT", "--reference", "/nowhere/llama"], 3),
    "reference of another size": (["validate", "ARTIFACT", "--reference", "OTHER"], 3),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_a_line_and_a_hint(scout: Path, artifact: Path, maverick: Path, tmp_path: Path, case: str) -> None:
    args, code = ERRORS[case]
    (tmp_path / "empty").mkdir()
    if case == "reference of another size":
        write_random_checkpoint(tmp_path / "other", num_hidden_layers=2)
    places = {
        "CKPT": scout,
        "ARTIFACT": artifact,
        "OUT": tmp_path / "out",
        "EMPTY": tmp_path / "empty",
        "OTHER": tmp_path / "other",
    }
    done = run(*(places.get(str(arg), arg) for arg in args), code=code)
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()
    lines = done.stderr.splitlines()
    assert all(line.startswith(("error: ", "hint: ")) for line in lines)


def test_a_damaged_checkpoint_is_exit_3_before_anything_is_written(scout: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(scout, copy)
    weights = copy / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    done = run("convert", copy, "-o", tmp_path / "out", code=3)
    assert "model.safetensors" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
