"""``--adapter``: what the commands say of adapters, write of them and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from l4convert import cli
from l4convert.emit import blocks
from tests.adapters import PARAMETERS, edit_weights, merged_by_peft, write_adapter
from tests.checkpoints import MAVERICK, write_random_checkpoint

QUERY = "model.layers.0.self_attn.q_proj.weight"


def run_json(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> dict[str, Any]:
    assert cli.run([*map(str, args), "--json"]) == code
    content = json.loads(capsys.readouterr().out)
    assert isinstance(content, dict)
    return content


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_local_experts": 3, "intermediate_size": 32, "num_hidden_layers": 2}
    return write_random_checkpoint(tmp_path_factory.mktemp("base"), **{**MAVERICK, **sizes})


@pytest.fixture(scope="module")
def adapters(base: Path) -> tuple[Path, Path]:
    first = write_adapter(
        base, base / "../first", target_modules=["q_proj", "shared_expert.up_proj"], target_parameters=PARAMETERS
    )
    second = write_adapter(base, base / "../second", target_modules=["q_proj"], modules_to_save=["lm_head"], seed=1)
    return first.resolve(), second.resolve()


@pytest.fixture(scope="module")
def artifact(base: Path, adapters: tuple[Path, Path]) -> Path:
    out = base.parent / "artifact"
    first, second = adapters
    assert cli.run(["-q", "convert", str(base), "-o", str(out), "--recipe", "none", *given(first, second)]) == 0
    return out


def given(*adapters: Path) -> list[str]:
    return [word for adapter in adapters for word in ("--adapter", str(adapter))]


def test_an_artifact_has_the_weights_that_peft_merges(base: Path, adapters: tuple[Path, Path], artifact: Path) -> None:
    from safetensors.torch import load_file

    theirs = merged_by_peft(base, *adapters, dtype="float64")
    stored = load_file(artifact / "model.safetensors")
    names = {QUERY, "lm_head.weight", f"model.layers.1.{PARAMETERS[1]}"}
    found = {name for name in names for key in stored if key.startswith(name)}
    assert found == names
    for name in names:
        tensor = next(tensor for key, tensor in stored.items() if key.startswith(name))
        wanted = theirs[name].float().bfloat16()
        same = [shape for shape in (wanted, wanted.transpose(-1, -2)) if shape.shape == tensor.shape]
        assert any(torch.equal(tensor.to(wanted.dtype), one) for one in same), name


def test_validate_compares_with_peft(
    capsys: pytest.CaptureFixture[str], base: Path, adapters: tuple[Path, Path], artifact: Path
) -> None:
    first, second = adapters
    report = run_json(
        capsys, "validate", artifact, "--reference", base, *given(first, second), "--tokens", 120, "--window", 40
    )
    assert report["passed"]
    assert "adapter first merged by peft, adapter second merged by peft" in report["reference"]
    assert not any("adapters" in note for note in report["notes"])
    report = run_json(
        capsys, "validate", artifact, "--reference", base, *given(first), "--tokens", 120, "--window", 40, code=4
    )
    assert any("adapters merged into the reference (1)" in note for note in report["notes"])


def test_what_was_merged_is_told(
    capsys: pytest.CaptureFixture[str], base: Path, adapters: tuple[Path, Path], artifact: Path
) -> None:
    manifest = json.loads((artifact / "l4convert.json").read_text())
    first, second = manifest["adapters"]
    assert (first["folder"], first["merged"], first["replaced"]) == ("first", 2 + 1 + 2, 0)
    assert (second["merged"], second["replaced"], second["scales"]) == (2, 1, {"1.5": 2})
    assert first["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert str(base.parent) not in (artifact / "l4convert.json").read_text()
    assert run_json(capsys, "inspect", artifact)["adapters"] == manifest["adapters"]
    assert cli.run(["inspect", str(artifact)]) == 0
    assert "first: merged into 5 tensors, 0 replaced" in capsys.readouterr().out
    plan = run_json(capsys, "plan", base, *given(*adapters), "--recipe", "none", "--no-measure")
    assert [entry["merged"] for entry in plan["adapters"]] == [5, 2]
    sources = {name for row in plan["tensors"] for name in row["sources"]}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in sources
    assert cli.run(["plan", str(base), *given(*adapters)]) == 0
    text = capsys.readouterr().out
    assert "first: merged into 5 tensors (rank 4, scale 1.5)" in text
    assert "of merged weights" in text  # the estimate measures them


def test_inspect_shows_what_an_adapter_changes(capsys: pytest.CaptureFixture[str], adapters: tuple[Path, Path]) -> None:
    payload = run_json(capsys, "inspect", adapters[0], "--tensors")
    assert (payload["kind"], payload["rank"], payload["tensor_count"]) == ("adapter", 4, 2 * 5)
    assert {change["name"]: change["layers"] for change in payload["changes"]} == {
        "model.layers.*.self_attn.q_proj": [0, 1],
        "model.layers.*.feed_forward.shared_expert.up_proj": [1],
        "model.layers.*.feed_forward.experts.gate_up_proj": [1],
        "model.layers.*.feed_forward.experts.down_proj": [1],
    }
    assert cli.run(["inspect", str(adapters[1])]) == 0
    text = capsys.readouterr().out
    assert "scale is alpha / rank" in text
    assert "lm_head.weight" in text


def test_an_unfinished_run_is_not_continued_with_another_adapter(
    capsys: pytest.CaptureFixture[str], base: Path, adapters: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    command = ["-q", "convert", str(base), "-o", str(tmp_path / "out"), "--recipe", "none", "--jobs", "1"]
    copy = Path(shutil.copytree(adapters[1], tmp_path / "adapter"))
    calls: list[object] = []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 5:
            raise KeyboardInterrupt
        original(*args)

    original = blocks.write_at
    monkeypatch.setattr(blocks, "write_at", failing)
    assert cli.run([*command, *given(copy)]) == 130
    monkeypatch.setattr(blocks, "write_at", original)
    assert (tmp_path / ".out.partial").is_dir()
    assert cli.run([*command, *given(adapters[0])]) == 2
    assert "changed: adapters" in capsys.readouterr().err
    edit_weights(copy, lambda t: next(iter(t.values())).mul_(2))  # the same shapes, other numbers
    assert cli.run([*command, *given(copy)]) == 2
    assert cli.run([*command, *given(copy), "--restart"]) == 0


def test_a_broken_adapter_is_named_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(adapters[1], tmp_path / "adapter"))
    name = f"base_model.model.{QUERY.removesuffix('weight')}lora_B.weight"
    edit_weights(copy, lambda t: t[name].fill_(float("nan")))
    for recipe in ("int4", "none"):
        assert cli.run(["convert", str(base), "-o", str(tmp_path / "out"), "--recipe", recipe, *given(copy)]) == 3
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert f"adapter_model.safetensors: tensor '{name}' has 256 NaN" in error
        assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_an_adapter_is_no_place_for_an_artifact(
    capsys: pytest.CaptureFixture[str], base: Path, adapters: tuple[Path, Path]
) -> None:
    assert cli.run(["convert", str(base), "-o", str(adapters[0] / "out"), *given(adapters[0])]) == 2
    assert "must not be, lie in or contain" in capsys.readouterr().err


def test_the_shell_completes_folders() -> None:
    from l4convert.cli._complete import folders

    assert [item.type for item in folders(None, None, "my-")] == ["dir"]  # type: ignore[arg-type]
