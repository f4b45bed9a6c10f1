"""Made checkpoints are those of the published models: our reader, transformers and safetensors agree on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from l4convert.checkpoint import open_checkpoint
from l4convert.checkpoint.presets import PRESETS
from tests.benchmarks.scripts import make_small, run_script

MEGABYTE = 1 << 20


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir())


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two whole layers and the whole vocabulary of Scout, in holes."""
    path = tmp_path_factory.mktemp("made") / "scout"
    done = run_script("make_checkpoint.py", "--preset", "scout", "--layers", 2, "--sparse", "--output", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("preset", PRESETS)
def test_a_whole_model_of_holes_is_that_model(tmp_path: Path, preset: str) -> None:
    """218 GB to 4 TB, which take less than 4 MB of disk."""
    done = run_script("make_checkpoint.py", "--preset", preset, "--sparse", "--output", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.config == PRESETS[preset]
    assert sum(file.stat().st_size for file in checkpoint.files) > 200e9
    assert on_disk(tmp_path / "model") < 4 * MEGABYTE


def test_transformers_expects_just_these_tensors(scout: Path) -> None:
    import torch
    from transformers import AutoConfig, Llama4ForCausalLM

    with torch.device("meta"):
        state = Llama4ForCausalLM(AutoConfig.from_pretrained(scout)).state_dict()
    found: dict[str, tuple[int, ...]] = {}
    for file in scout.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    assert found == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_the_index_names_every_file_and_its_tensors(scout: Path) -> None:
    index = json.loads((scout / "model.safetensors.index.json").read_text())
    files = sorted(scout.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(4)]
    assert all(file.stat().st_size < 4.6e9 for file in files)
    for file in files:
        with safe_open(file, "np") as tensors:
            assert {name for name, held in index["weight_map"].items() if held == file.name} == set(tensors.keys())


def test_transformers_loads_the_weights(tmp_path: Path) -> None:
    import torch
    from transformers import Llama4ForCausalLM

    path = make_small(tmp_path / "small")
    model, report = Llama4ForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    experts = weights["model.layers.1.feed_forward.experts.gate_up_proj"]
    assert experts.std() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(experts[0], experts[1])
    assert weights["model.layers.0.input_layernorm.weight"].mean() == pytest.approx(1, abs=0.1)


def test_a_seed_gives_the_same_bytes_again(tmp_path: Path) -> None:
    paths = [make_small(tmp_path / str(i), "--seed", seed) for i, seed in enumerate((1, 1, 2))]
    first, again, other = (next(path.glob("*.safetensors")).read_bytes() for path in paths)
    assert first == again
    assert first != other
    assert len(first) == len(other)


@pytest.mark.parametrize("experts", ["stacked", "unfused"])
def test_both_kinds_of_experts_can_be_converted(tmp_path: Path, experts: str) -> None:
    """Maverick's form: a dense layer, then one of experts; no tokenizer is needed."""
    from l4convert.pipeline import ConvertOptions, convert

    path = make_small(tmp_path / "model", "--preset", "maverick", "--experts", experts)
    assert open_checkpoint(path).experts == experts
    convert(ConvertOptions(checkpoint=path, output=tmp_path / "artifact"))
    assert (tmp_path / "artifact" / "model.onnx").is_file()


def test_a_tensor_larger_than_a_file_has_its_own(tmp_path: Path) -> None:
    path = make_small(tmp_path / "model", "--shard-gb", 20e-6)
    names = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    held = [[name for name in names if names[name] == file.name] for file in sorted(path.glob("*.safetensors"))]
    assert ["model.layers.0.feed_forward.experts.gate_up_proj"] in held
    assert max(len(part) for part in held) > 1
    assert open_checkpoint(path).tensors.keys() == names.keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", 49], "1 to 48 layers, not 49"),
        (["--set", "hiden_size=64"], "hiden_size=64 cannot be set"),
        (["--set", "hidden_size=0"], "hidden_size=0 cannot be set"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, arguments: list[object], said: str) -> None:
    done = run_script("make_checkpoint.py", "--output", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    done = run_script("make_checkpoint.py", "--sparse", "--output", tmp_path)
    assert done.returncode == 2
    assert "is already there" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_is_found_before_writing(tmp_path: Path) -> None:
    """Behemoth is 4 TB."""
    done = run_script("make_checkpoint.py", "--preset", "behemoth", "--output", tmp_path / "out")
    assert done.returncode == 3
    assert "too few" in done.stderr
    assert not (tmp_path / "out").exists()
