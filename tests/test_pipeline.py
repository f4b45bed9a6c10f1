"""The order of phases: what a conversion returns, writes, plans and refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from l4convert import conversion
from l4convert.checkpoint import open_checkpoint
from l4convert.errors import InputError, UsageError
from l4convert.graph_passes import CANONICAL_PASSES
from l4convert.pipeline import ConversionPlan, ConvertOptions, ConvertResult, convert, plan_conversion
from l4convert.progress import NO_PROGRESS
from l4convert.targets import TARGETS
from tests.checkpoints import write_random_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multimodal, as Meta publishes Llama 4, with the files beside the weights that clients read."""
    path = write_random_checkpoint(tmp_path_factory.mktemp("pipeline") / "conditional", conditional=True, shards=2)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = [2, 5]
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "temperature": 0.6}))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend", "bos_token": "é"}))
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "modeling_llama4.py").write_text("raise SystemExit('executed')")
    return path


@pytest.fixture(scope="module")
def converted(checkpoint: Path) -> ConvertResult:
    return convert(ConvertOptions(checkpoint, checkpoint.parent / "out", block_size=64))


def test_the_result_says_what_was_written(converted, checkpoint):
    assert converted.output == checkpoint.parent / "out"
    assert (converted.target, converted.recipe, converted.kv_cache) == ("cpu", "int4", "growing")
    assert [r.name for r in converted.passes] == [p.name for p in (*CANONICAL_PASSES, *TARGETS["cpu"].lowering)]
    fired = {r.name: r.fired for r in converted.passes}
    assert fired["outline_attention"] == fired["lower_attention_to_gqa"] == 4
    assert fired["quantize_weights"] == 36
    assert converted.seconds > 0
    with safe_open(converted.output / "model.safetensors", "numpy") as file:
        names = [name for name in file.keys() if not name.startswith("__padding__")]  # noqa: SIM118  # not a dict
        assert converted.tensors == len(names)
        assert converted.bytes == sum(file.get_tensor(name).nbytes for name in names)


def test_the_folder_has_what_clients_read_and_nothing_that_runs(converted):
    assert {path.name for path in converted.output.iterdir()} == {
        "model.onnx",
        "model.safetensors",
        "l4convert.json",
        "genai_config.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def test_the_manifest_says_how_it_was_made(converted, checkpoint):
    manifest = json.loads((converted.output / "l4convert.json").read_text())
    assert manifest["schema"] == "l4convert.manifest/1"
    assert (manifest["target"], manifest["kv_cache"]) == ("cpu", "growing")
    assert manifest["recipe"]["name"] == "int4"
    assert {rule["block_size"] for rule in manifest["recipe"]["rule"]} == {64}
    assert manifest["config"] == json.loads(json.dumps(dataclasses.asdict(open_checkpoint(checkpoint).config)))
    assert {p["name"]: p["fired"] for p in manifest["passes"]} == {r.name: r.fired for r in converted.passes}
    assert {p["name"]: p["skipped"] for p in manifest["passes"]}["quantize_weights"] == {"the recipe keeps it": 5}
    sources = manifest["source"]["files"]
    assert {"config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= sources.keys()
    for name, entry in sources.items():
        assert entry["sha256"] == hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256((converted.output / name).read_bytes()).hexdigest()
    assert manifest["files"].keys() | {"l4convert.json"} == {path.name for path in converted.output.iterdir()}


def test_the_config_is_that_of_the_text_model(converted, checkpoint):
    config = json.loads((converted.output / "config.json").read_text())
    assert config["model_type"] == "llama4_text"
    assert config["architectures"] == ["Llama4ForCausalLM"]
    assert "vision_config" not in config
    given = json.loads((checkpoint / "config.json").read_text())["text_config"]
    assert config["eos_token_id"] == given["eos_token_id"] == [2, 5]
    assert config["attention_chunk_size"] == given["attention_chunk_size"]


def test_a_text_config_is_copied_as_it_is(scout_layout, tmp_path):
    out = convert(ConvertOptions(scout_layout, tmp_path / "out", recipe="none")).output
    assert (out / "config.json").read_bytes() == (scout_layout / "config.json").read_bytes()


def test_other_client_files(converted, checkpoint):
    tokenizer = (converted.output / "tokenizer_config.json").read_text()
    assert json.loads(tokenizer) == {
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "é",
    }
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (converted.output / name).read_bytes() == (checkpoint / name).read_bytes()
    genai = json.loads((converted.output / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["num_hidden_layers"] == 4
    assert genai["model"]["eos_token_id"] == [2, 5]


@pytest.mark.parametrize("recipe", ["none", "int4", "fp8"])
@pytest.mark.parametrize(("target", "kv_cache"), [("cpu", "static"), ("portable", "windowed")])
def test_a_dry_run_writes_nothing_and_predicts_every_byte(checkpoint, tmp_path, target, kv_cache, recipe):
    options = ConvertOptions(checkpoint, tmp_path / "out", target=target, recipe=recipe, kv_cache=kv_cache)
    plan: ConversionPlan = plan_conversion(options)
    assert list(tmp_path.iterdir()) == []
    result = convert(options)
    assert (plan.bytes, plan.tensors, plan.passes) == (result.bytes, result.tensors, result.passes)
    assert "model.safetensors" in plan.files
    for name, nbytes in plan.files.items():
        assert (tmp_path / "out" / name).stat().st_size == nbytes, name
    unplanned = {path.name for path in result.output.iterdir()} - plan.files.keys()
    assert unplanned == {"l4convert.json"}


def test_a_dry_run_reads_no_weight(checkpoint, tmp_path, monkeypatch):
    """Only what lies in model.onnx itself: tensors of less than a kilobyte, norms of this small model."""
    for kind in {type(tensor) for tensor in open_checkpoint(checkpoint).tensors.values()}:
        tile = kind.tile

        def checked(self, *args, tile=tile):
            assert self.nbytes < 1024, f"{self.name} was read"
            return tile(self, *args)

        monkeypatch.setattr(kind, "tile", checked)
    options = ConvertOptions(checkpoint, tmp_path / "out", recipe="none")
    assert plan_conversion(options).bytes > 0
    with pytest.raises(AssertionError, match="was read"):
        convert(options)


def test_only_a_windowed_cache_has_no_genai_config(checkpoint, tmp_path):
    for kv_cache, expected in (("growing", True), ("static", True), ("windowed", False)):
        plan = plan_conversion(ConvertOptions(checkpoint, tmp_path / "out", kv_cache=kv_cache))
        assert ("genai_config.json" in plan.files) is expected


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "target": ({"target": "tpu"}, UsageError, "unknown target 'tpu'"),
    "cache": ({"kv_cache": "paged"}, UsageError, "target cpu has no 'paged' KV cache"),
    "recipe": ({"recipe": "int3"}, UsageError, "there is no recipe 'int3'"),
    "recipe file": ({"recipe": "missing.toml"}, InputError, "missing.toml: cannot be read"),
    "block size": ({"block_size": 48}, UsageError, "block size 48 is not possible"),
    "block size of FP8": ({"recipe": "fp8", "block_size": 32}, UsageError, "has no int4 rule"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("function", [convert, plan_conversion])
def test_unknown_names_are_refused(checkpoint, tmp_path, case, function):
    values, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        function(ConvertOptions(checkpoint, tmp_path / "out", **values))
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_matches_nothing_is_refused(checkpoint, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('name = "mine"\n[[rule]]\npattern = "layers.*.q_proj"\nscheme = "int4"\n')
    with pytest.raises(InputError, match="recipe mine: no rule matches any tensor"):
        convert(ConvertOptions(checkpoint, tmp_path / "out", recipe=str(recipe)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pattern", "fits"), [("*.experts.gate_up_proj", True), ("*.experts.*.gate_proj.weight", False)]
)
def test_recipes_name_stacked_experts_whatever_the_checkpoint_has(tmp_path, pattern, fits):
    unfused = write_random_checkpoint(tmp_path / "unfused", unfused=True)
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'name = "mine"\n[[rule]]\npattern = "{pattern}"\nscheme = "int4"\n')
    options = ConvertOptions(unfused, tmp_path / "out", recipe=str(recipe))
    if not fits:
        with pytest.raises(InputError, match="no rule matches any tensor"):
            convert(options)
        return
    fired = {report.name: report.fired for report in convert(options).passes}
    assert fired["quantize_weights"] == 4


def test_an_output_in_use_is_refused_before_any_work(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("irreplaceable")
    monkeypatch.setattr(conversion, "open_checkpoint", lambda path: pytest.fail("the checkpoint was opened"))
    for overwrite in (False, True):
        for function in (convert, plan_conversion):
            with pytest.raises(UsageError, match="out"):
                function(ConvertOptions(checkpoint, out, overwrite=overwrite))
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_an_artifact_is_replaced_only_when_asked(converted, checkpoint, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(converted.output, out)
    with pytest.raises(UsageError):
        convert(ConvertOptions(checkpoint, out, recipe="none"))
    assert convert(ConvertOptions(checkpoint, out, recipe="none", overwrite=True)).recipe == "none"


def test_the_checkpoint_is_no_place_for_the_output(checkpoint):
    with pytest.raises(UsageError):
        convert(ConvertOptions(checkpoint, checkpoint / "out"))
    assert not (checkpoint / "out").exists()


def test_passes_are_verified_when_asked(checkpoint, tmp_path, monkeypatch):
    from l4convert.graph_passes import verification

    seen = []
    original = verification.verified
    monkeypatch.setattr(verification, "verified", lambda p, *args: seen.append(p.name) or original(p, *args))
    plain = convert(ConvertOptions(checkpoint, tmp_path / "plain"))
    assert seen == []
    checked = convert(ConvertOptions(checkpoint, tmp_path / "checked", verify_passes=True), NO_PROGRESS)
    assert seen == [report.name for report in checked.passes]
    for path in plain.output.iterdir():
        assert path.read_bytes() == (checked.output / path.name).read_bytes(), path.name
