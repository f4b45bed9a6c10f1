from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.checkpoint.combiners import transposed
from l4convert.checkpoint.prequantized import carried
from l4convert.errors import InputError
from tests.checkpoint.llmcompressor.make import SIZES
from tests.checkpoint.quantized.agreement import assert_equal_to_library
from tests.checkpoint.quantized.damage import with_settings, with_tensors
from tests.checkpoint.quantized.road import convert_and_validate, remarks
from tests.modelopt_checkpoints import export

EXPERTS = "model.layers.0.feed_forward.experts"


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As nvidia/Llama-4-Scout-17B-16E-Instruct-FP8: one scale a tensor, static activations, FP8 caches."""
    folder = tmp_path_factory.mktemp("modelopt")
    return export(folder / "fp8", "FP8_DEFAULT_CFG", kv_cache=True, conditional=True, **SIZES)


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As nvidia/Llama-4-Scout-17B-16E-Instruct-FP4."""
    return export(tmp_path_factory.mktemp("modelopt") / "nvfp4", "NVFP4_DEFAULT_CFG", **SIZES)


def test_fp8_is_dequantized_as_modelopt_does(fp8: Path) -> None:
    assert assert_equal_to_library(fp8) == 27
    words = open_checkpoint(fp8).quantization
    assert words is not None
    assert words.startswith("modelopt: FP8 E4M3 with one scale a row (18 weights), of 27 tensors")
    assert words.endswith("not used: 18 static scales of activations, 4 scales of key and value caches")


def test_nvfp4_is_dequantized_as_modelopt_does(nvfp4: Path) -> None:
    assert assert_equal_to_library(nvfp4) == 27
    assert "FP4 E2M1 in groups of 16 (18 weights)" in str(open_checkpoint(nvfp4).quantization)
    assert all(carried(tensor) is None for tensor in open_checkpoint(nvfp4).tensors.values())


def test_one_scale_a_row_of_a_layer_and_one_an_expert(tmp_path: Path) -> None:
    path = export(tmp_path / "rows", "FP8_PER_CHANNEL_PER_TOKEN_CFG", **{**SIZES, "intermediate_size": 48})
    assert assert_equal_to_library(path) == 27


def test_the_codes_are_carried(fp8: Path) -> None:
    import torch
    from safetensors.torch import load_file

    stored = load_file(fp8 / "model.safetensors")
    tensor = open_checkpoint(fp8).tensors[f"{EXPERTS}.gate_up_proj"]
    assert carried(tensor) is None  # K is not last
    found = carried(transposed(tensor))
    assert found is not None
    codes = stored[f"language_model.{EXPERTS}.gate_up_proj"]
    assert found.values.numpy().tobytes() == codes.mT.contiguous().view(torch.uint8).numpy().tobytes()
    assert found.scales.dims == (2, 64, 1)
    assert set(found.scales.numpy().reshape(-1)) == {
        stored[f"language_model.{EXPERTS}.gate_up_proj_weight_scale"].item()
    }


def test_the_description_beside_a_config_that_says_nothing(fp8: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(fp8, tmp_path / "old"))
    values = json.loads((path / "config.json").read_text())
    del values["quantization_config"]
    (path / "config.json").write_text(json.dumps(values))
    assert open_checkpoint(path).quantization == open_checkpoint(fp8).quantization
    assert path / "hf_quant_config.json" in open_checkpoint(path).files
    assert_equal_to_library(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quant_algo", "W4A8_AWQ", "quantization_config.quant_algo is 'W4A8_AWQ': that cannot be read"),
        ("quant_algo", ["FP8"], "quantization_config.quant_algo is "),
        ("quant_algo", "NVFP4", "is F8_E4M3, expected U8"),
        ("ignore", ["*q_proj*"], "names 'language_model.model.layers.0.self_attn.q_proj', which the checkpoint has"),
        ("ignore", [3], "ignore has 3, which is no text"),
        ("ignore", ["*" * 9000, "?" * 2000], "ignore has patterns of 11,000 characters in all, more than 10,000"),
    ],
)
def test_a_description_that_does_not_fit(fp8: Path, tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = with_settings(fp8, tmp_path / "broken", lambda settings: settings.update({key: value}))
    with pytest.raises(InputError, match=r"model\.safetensors|config\.json") as caught:
        open_checkpoint(path)
    assert message in caught.value.message


def test_patterns_cannot_take_long(fp8: Path, tmp_path: Path) -> None:
    """Each would make a backtracking matcher try more ways than there are atoms."""
    patterns = ["*e" * 100 + "x", "*" * 100 + "x"] * 30
    begin = time.process_time()
    open_checkpoint(with_settings(fp8, tmp_path / "slow", lambda settings: settings.update({"ignore": patterns})))
    assert time.process_time() - begin < 1


def test_an_unknown_algorithm_s_tensors_are_not_guessed(nvfp4: Path, tmp_path: Path) -> None:
    def smooth(tensors: dict[str, Any]) -> None:
        name = "model.layers.0.self_attn.q_proj"
        tensors[f"{name}.pre_quant_scale"] = tensors[f"{name}.weight_scale_2"].clone()

    with pytest.raises(InputError, match=r"q_proj\.pre_quant_scale' is not one this config has"):
        open_checkpoint(with_tensors(nvfp4, tmp_path / "awq", smooth))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight_scale_2", lambda t: t * 0, "is 0, which is no scale"),
        ("weight_scale_2", lambda t: t / 0, "has 1 NaN or infinite values in it"),
        ("weight_scale", lambda t: t.float().fill_(float("nan")).to(t.dtype), "NaN or infinite values in rows 0 to"),
    ],
)
def test_scales_that_are_none(nvfp4: Path, tmp_path: Path, name: str, change: Any, message: str) -> None:
    full = f"{EXPERTS}.down_proj_{name}"
    path = with_tensors(nvfp4, tmp_path / "broken", lambda tensors: tensors.update({full: change(tensors[full])}))
    with pytest.raises(InputError) as caught:
        open_checkpoint(path).tensors[f"{EXPERTS}.down_proj"].numpy()
    assert f"model.safetensors: tensor '{full}'" in caught.value.message
    assert message in caught.value.message


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_2"])
def test_a_scale_of_another_shape(nvfp4: Path, tmp_path: Path, name: str) -> None:
    full = f"{EXPERTS}.down_proj_{name}"
    path = with_tensors(nvfp4, tmp_path / "broken", lambda t: t.update({full: t[full].reshape(-1)[:1].repeat(2)}))
    with pytest.raises(InputError, match=rf"{full}' has shape \[2\], config\.json makes it"):
        open_checkpoint(path)


def test_a_scale_of_activations_that_is_no_number(fp8: Path, tmp_path: Path) -> None:
    import torch

    full = f"language_model.{EXPERTS}.down_proj_input_scale"
    path = with_tensors(fp8, tmp_path / "broken", lambda t: t.update({full: torch.ones(1, dtype=torch.int32)}))
    with pytest.raises(InputError, match="is I32, expected BF16, F16, F32"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "recipe", "became"),
    [
        ("fp8", "keep", "carried over"),
        ("fp8", "none", "kept dequantized"),
        ("nvfp4", "keep", "kept dequantized"),
        ("nvfp4", "none", "kept dequantized"),
    ],
)
def test_convert_and_validate(
    name: str, recipe: str, became: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: Any
) -> None:
    converted = convert_and_validate(request.getfixturevalue(name), tmp_path / "out", recipe, capsys)
    assert remarks(converted) == {became}
