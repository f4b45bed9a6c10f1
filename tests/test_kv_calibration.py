"""Conversions with quantized caches, from the command line to the bytes: calibrated, resumed, refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from l4convert import calibrating, cli
from l4convert.errors import InputError, UsageError
from l4convert.parity import Comparison, Metrics, default_policy
from l4convert.parity.metrics import NO_TARGET
from l4convert.pipeline import ConvertOptions, PlanOptions, convert, plan_conversion
from l4convert.quantization.kv import KvDtype, KvScheme
from l4convert.runtime import OrtSession, TextTokenizer, read_artifact
from l4convert.targets import TARGETS

TEXT = "".join(chr(32 + (n * n * 7 + n // 3) % 95) for n in range(600))


@pytest.fixture(scope="module")
def checkpoint(scout_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``scout_layout`` with a tokenizer: one token for each printable ASCII character."""
    from tokenizers import Tokenizer, decoders, models

    path = tmp_path_factory.mktemp("calibrated") / "scout"
    shutil.copytree(scout_layout, path)
    tokenizer = Tokenizer(models.BPE(vocab={chr(code): code for code in range(32, 127)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def text(checkpoint: Path) -> Path:
    path = checkpoint.parent / "notes.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def reference(checkpoint: Path, text: Path) -> dict[str, np.ndarray]:
    """The scales that target portable finds."""
    return scales_of(convert(options(checkpoint, checkpoint.parent / "reference", text, target="portable")).output)


def options(checkpoint: Path, out: Path, text: Path, **changes: Any) -> ConvertOptions:
    return ConvertOptions(checkpoint, out, **({"kv_dtype": "int8", "calibration": text, "recipe": "none"} | changes))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def scales_of(artifact: Path) -> dict[str, np.ndarray]:
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    found = [tensor for tensor in model.graph.initializer if tensor.name.endswith(("key_scale", "value_scale"))]
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in found}


def test_from_the_command_line(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "l4convert", "convert", str(checkpoint), "-o", str(out), "--recipe", "int4"]
    quantized = [
        "--kv-dtype",
        "int4",
        "--kv-layers",
        "global",
        "--calibration",
        str(text),
        "--calibration-tokens",
        "300",
    ]
    done = subprocess.run([*command, *quantized], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "keys, values  int4, one scale a channel, global layers" in done.stdout
    assert "calibrated    on 300 tokens of notes.txt" in done.stdout
    assert cli.run(["verify", str(out)]) == 0
    capsys.readouterr()
    assert cli.run(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "int4, one scale a channel, global layers" in shown
    assert "on 300 tokens of notes.txt" in shown
    assert cli.run(["inspect", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kv_scheme"] == {"dtype": "int4", "granularity": "channel", "layers": "global"}
    types = {value["name"]: value["dtype"] for value in said["inputs"]}
    assert (types["past_key_values.0.key"], types["past_key_values.3.key"]) == ("FLOAT", "UINT8")
    assert cli.run(["generate", str(out), "--prompt", "abc", "--max-new-tokens", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 3


def test_two_runs_give_the_same_bytes_and_the_manifest_says_why(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    one = convert(options(checkpoint, tmp_path / "one", text, kv_dtype="fp8"))
    two = convert(options(checkpoint, tmp_path / "two", text, kv_dtype="fp8", jobs=1))
    assert snapshot(one.output) == snapshot(two.output)
    manifest = json.loads((one.output / "l4convert.json").read_text())
    assert manifest["recipe"]["kv_cache"] == {"dtype": "fp8", "granularity": "head", "layers": "all"}
    assert manifest["calibration"]["file"] == "notes.txt"
    assert manifest["calibration"]["tokens"] == 600
    assert read_artifact(one.output).kv_scheme == one.kv_scheme == KvScheme("fp8", "head")
    assert "calibration.onnx" not in manifest["files"]


def test_the_weights_are_those_of_float_caches(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    quantized = convert(options(checkpoint, tmp_path / "int8", text)).output
    plain = convert(ConvertOptions(checkpoint, tmp_path / "plain", recipe="none")).output
    assert (quantized / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    scales = scales_of(quantized)
    assert len(scales) == 8
    assert all(scale.shape == (1, 2, 1, 16) and (scale > 0).all() for scale in scales.values())
    assert len({scale.tobytes() for scale in scales.values()}) == 8


@pytest.mark.parametrize("form", ["growing", "static", "windowed"])
def test_every_form_has_the_same_scales(
    checkpoint: Path, text: Path, tmp_path: Path, form: str, reference: dict[str, np.ndarray]
) -> None:
    out = convert(options(checkpoint, tmp_path / form, text, kv_cache=form)).output
    scales = scales_of(out)
    with OrtSession.open(out) as session:
        logits = session.start(1).step(np.arange(40, 60)[None])
    assert np.isfinite(logits).all()
    for name, scale in scales.items():
        np.testing.assert_allclose(scale, reference[name], rtol=0.06)  # a step of the search, at most


@pytest.mark.parametrize("target", [name for name, row in TARGETS.items() if "int8" in row.kv_dtypes])
def test_every_target_that_can(
    checkpoint: Path, text: Path, tmp_path: Path, target: str, reference: dict[str, np.ndarray]
) -> None:
    found = scales_of(convert(options(checkpoint, tmp_path / target, text, target=target)).output)
    assert found.keys() == reference.keys()
    for name, scale in found.items():
        np.testing.assert_allclose(scale, reference[name], rtol=0.1)  # some compute in 16 bits


def test_shared_weights_are_calibrated_on(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    copied = convert(options(checkpoint, tmp_path / "copied", text, target="portable")).output
    shared = convert(options(checkpoint, tmp_path / "shared", text, target="portable", share_weights=True)).output
    for name, scale in scales_of(copied).items():
        np.testing.assert_array_equal(scales_of(shared)[name], scale)


def test_a_run_that_ends_in_calibration_is_continued(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = snapshot(convert(options(checkpoint, tmp_path / "undisturbed", text)).output)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibrating, "calibrate", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(options(checkpoint, tmp_path / "out", text))
    staging = tmp_path / ".out.partial" / "artifact"
    assert [path.name for path in staging.iterdir()] == ["model.safetensors"]
    (staging / "calibration.onnx").write_bytes(b"what a kill leaves")
    other = tmp_path / "other" / "notes.txt"
    other.parent.mkdir()
    other.write_text(TEXT[::-1])
    for changes, named in (
        ({"calibration": other}, "calibration"),
        ({"calibration_tokens": 200}, "calibration"),
        ({"kv_layers": "global"}, "recipe"),
        ({"kv_dtype": None, "calibration": None}, "recipe"),
    ):
        with pytest.raises(UsageError, match=f"cannot be continued; changed: .*{named}"):
            convert(options(checkpoint, tmp_path / "out", text, **changes))
    resumed = convert(options(checkpoint, tmp_path / "out", text))
    assert resumed.resumed_bytes == resumed.bytes
    assert snapshot(tmp_path / "out") == undisturbed
    assert not staging.parent.exists()


def test_damage_leaves_nothing(checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise InputError("a key of layer 0 is NaN or infinite")

    monkeypatch.setattr(calibrating, "calibrate", failing)
    with pytest.raises(InputError, match="layer 0"):
        convert(options(checkpoint, tmp_path / "out", text))
    assert list(tmp_path.iterdir()) == []


def test_another_layout_of_the_weights_is_refused(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = calibrating.plan_weights

    def reordered(model: Any, share: bool) -> Any:
        names = list(model.graph.initializers)
        moved = model.graph.initializers.pop(names[0])
        del moved
        return honest(model, share)

    monkeypatch.setattr(calibrating, "plan_weights", reordered)
    with pytest.raises(AssertionError, match="changed the layout of the weights"):
        convert(options(checkpoint, tmp_path / "out", text))
    assert list(tmp_path.iterdir()) == []


NO_CACHES = next((name for name, row in TARGETS.items() if not row.kv_dtypes), "tensorrt-rtx")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--kv-dtype", "fp8"], 2, "give --calibration FILE"),
        (["--calibration", "notes.txt"], 2, "--calibration is for quantized caches"),
        (["--kv-layers", "global"], 2, "--kv-granularity and --kv-layers say how caches are quantized"),
        (["--kv-dtype", "none", "--kv-granularity", "head"], 2, "they are not"),
        (["--kv-dtype", "fp8", "--calibration", "absent.txt"], 3, "absent.txt: No such file"),
        (["--kv-dtype", "fp8", "--calibration", "short.txt"], 3, "short.txt: 5 tokens are too few"),
        (["--kv-dtype", "fp8", "--calibration", "binary.txt"], 3, "binary.txt: not UTF-8"),
        (["--kv-dtype", "fp8", "--calibration", "notes.txt", "--calibration-tokens", "5"], 2, "5 tokens are too few"),
        (["--kv-dtype", "int4", "--calibration", "notes.txt", "--target", NO_CACHES], 2, f"target {NO_CACHES} "),
        (
            ["--kv-dtype", "int4", "--calibration", "notes.txt", "--target", "tensorrt"],
            2,
            "of int4, only of fp8 and int8\nhint: give --kv-dtype fp8 or int8 or none, or a target",
        ),
    ],
)
def test_refusals(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("notes", TEXT.encode()), ("short", b"hello"), ("binary", b"\xff" * 900)):
        (tmp_path / f"{name}.txt").write_bytes(content)
    assert cli.run(["convert", str(checkpoint), "-o", "out", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".txt"]


def test_plans_need_no_text(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_conversion(PlanOptions(checkpoint=checkpoint, kv_dtype="int8", recipe="none"))
    assert {report.name: report.fired for report in plan.passes}["quantize_kv_cache"] == 4
    assert cli.run(["convert", str(checkpoint), "-o", str(tmp_path / "out"), "--kv-dtype", "fp8", "--dry-run"]) == 0
    assert cli.run(["plan", str(checkpoint), "--kv-dtype", "int4", "--kv-layers", "global", "--no-measure"]) == 0
    capsys.readouterr()


def test_a_recipe_s_own_table_and_options_over_it(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('name = "mine"\n[kv_cache]\ndtype = "int8"\nlayers = "global"\n')
    one = convert(options(checkpoint, tmp_path / "one", text, recipe=str(recipe), kv_dtype=None))
    assert one.kv_scheme == KvScheme("int8", "channel", "global")
    two = convert(options(checkpoint, tmp_path / "two", text, recipe=str(recipe), kv_dtype="fp8"))
    assert two.kv_scheme == KvScheme("fp8", "head", "global")
    off = ConvertOptions(checkpoint, tmp_path / "off", recipe=str(recipe), kv_dtype="none")
    assert convert(off).kv_scheme is None


@pytest.mark.parametrize(("dtype", "factor"), [("int8", 4), ("int4", 4), ("fp8", 0.25)])
def test_a_wrong_scale_breaks_the_policy_and_the_right_one_holds_it(
    nano: Path, tmp_path: Path, dtype: KvDtype, factor: float
) -> None:
    """Against the same weights with float caches. FP8 has room above for a factor of 4, and none below."""
    content = (nano.parent / "heldout.txt").read_text()
    (tmp_path / "a.txt").write_text(content[10_000:])
    given = {"kv_dtype": dtype, "calibration": tmp_path / "a.txt", "calibration_tokens": 1000}
    out = convert(ConvertOptions(nano, tmp_path / "out", recipe="none", **given)).output  # type: ignore[arg-type]
    plain = convert(ConvertOptions(nano, tmp_path / "plain", recipe="none")).output
    ids = np.array(TextTokenizer.open(nano).encode(content[:10_000])[:500])
    expected = logits_of(plain, ids)
    limits = default_policy("none", (), "cpu", kv=KvScheme(dtype)).reference
    assert not limits.broken_by(compared(expected, logits_of(out, ids), ids))
    model = onnx.load(out / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(("key_scale", "value_scale")):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    onnx.save(model, out / "model.onnx")
    assert any("mean_kl" in line for line in limits.broken_by(compared(expected, logits_of(out, ids), ids)))


def logits_of(artifact: Path, ids: np.ndarray) -> np.ndarray:
    with OrtSession.open(artifact) as session:
        result: np.ndarray = session.start(1).step(ids[None])[0]
        return result


def compared(expected: np.ndarray, logits: np.ndarray, ids: np.ndarray) -> Metrics:
    comparison = Comparison()
    comparison.update(expected, logits, np.append(ids[1:], NO_TARGET))
    return comparison.result()
