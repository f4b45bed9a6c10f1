from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.checkpoint.prequantized import carried
from l4convert.errors import InputError
from tests.checkpoint.llmcompressor.make import HERE, SIZES
from tests.checkpoint.quantized.agreement import assert_equal_to_library
from tests.checkpoint.quantized.damage import with_settings, with_tensors
from tests.checkpoint.quantized.road import EXACT, ROUNDED, convert_and_validate, remarks
from tests.checkpoints import write_random_checkpoint
from tests.compressed import compress

FP8: Mapping[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
EXPERT = "language_model.model.layers.1.feed_forward.experts.0.gate_proj"
WORDS = {
    "fp8-dynamic": "compressed-tensors: FP8 E4M3 with one scale a row (6 weights), of 28 tensors",
    "fp8-static": "compressed-tensors: FP8 E4M3 with one scale a row (26 weights), of 35 tensors"
    "; not used: 26 static scales of activations",
    "nvfp4": "compressed-tensors: FP4 E2M1 in groups of 16 (26 weights), of 35 tensors"
    "; not used: 26 static scales of activations",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("floats") / "bf16", **{**SIZES, "intermediate_size": 48})


@pytest.mark.parametrize("name", WORDS)
def test_what_llm_compressor_made_is_dequantized_as_its_library_does(name: str) -> None:
    assert_equal_to_library(HERE / name)
    assert open_checkpoint(HERE / name).quantization == WORDS[name]


MX: Mapping[str, Any] = {**FP8, "strategy": "group", "group_size": 16, "scale_dtype": "torch.uint8"}
KINDS: dict[str, tuple[Mapping[str, Any], str]] = {
    "tensor": ({**FP8, "strategy": "tensor"}, "float-quantized"),
    "channel": ({**FP8, "strategy": "channel"}, "naive-quantized"),
    "group": ({**FP8, "strategy": "group", "group_size": 8}, "naive-quantized"),
    "block": ({**FP8, "strategy": "block", "block_structure": [8, 16]}, "float-quantized"),
    "block in words": ({**FP8, "strategy": "block", "block_structure": "8x16"}, "float-quantized"),
    "left out": (FP8, "float-quantized"),
    "MXFP8": (MX, "mxfp8-quantized"),
    "MXFP4": ({**MX, "num_bits": 4}, "mxfp4-pack-quantized"),
}


@pytest.mark.parametrize(("weights", "form"), KINDS.values(), ids=KINDS.keys())
def test_every_granularity(plain: Path, tmp_path: Path, weights: Mapping[str, Any], form: str) -> None:
    assert_equal_to_library(compress(plain, tmp_path / "quantized", weights, form=form))


def test_an_mx_scale_that_is_no_number_is_refused(plain: Path, tmp_path: Path) -> None:
    path = compress(plain, tmp_path / "mx", MX, form="mxfp8-quantized")
    name = "model.layers.1.feed_forward.experts.0.gate_proj.weight"
    broken = with_tensors(path, tmp_path / "nan", lambda t: t[f"{name}_scale"][3].fill_(255))
    with pytest.raises(InputError, match=rf"{name}_scale' has 2 NaN values"):
        open_checkpoint(broken).tensors[name].numpy()


def test_scales_of_layers_as_vectors(tmp_path: Path) -> None:
    """Some writers leave the last axis of a scale for each channel out."""
    flat = lambda t: t.update({f"{EXPERT}.weight_scale": t[f"{EXPERT}.weight_scale"][:, 0]})  # noqa: E731
    path = with_tensors(HERE / "fp8-dynamic", tmp_path / "flat", flat)
    name = EXPERT.removeprefix("language_model.") + ".weight"
    ours, theirs = (open_checkpoint(folder).tensors[name].numpy() for folder in (path, HERE / "fp8-dynamic"))
    np.testing.assert_array_equal(ours, theirs)


def test_the_codes_are_carried_but_not_those_of_nvfp4() -> None:
    import torch
    from safetensors.torch import load_file

    stored = load_file(HERE / "fp8-dynamic" / "model.safetensors")
    found = carried(open_checkpoint(HERE / "fp8-dynamic").tensors[EXPERT.removeprefix("language_model.") + ".weight"])
    assert found is not None
    assert found.values.numpy().tobytes() == stored[f"{EXPERT}.weight"].view(torch.uint8).numpy().tobytes()
    assert found.scales.numpy().tobytes() == stored[f"{EXPERT}.weight_scale"].view(torch.uint8).numpy().tobytes()
    assert not any(carried(tensor) for tensor in open_checkpoint(HERE / "nvfp4").tensors.values())


@pytest.mark.parametrize("name", ["fp8-dynamic", "fp8-static"])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_counted_and_refused(name: str, code: int, tmp_path: Path) -> None:
    import torch

    def damage(tensors: dict[str, Any]) -> None:
        tensors[f"{EXPERT}.weight"].view(torch.uint8)[7, 3:6] = code

    tensor = open_checkpoint(with_tensors(HERE / name, tmp_path / "nan", damage)).tensors[
        EXPERT.removeprefix("language_model.") + ".weight"
    ]
    with pytest.raises(InputError, match="has 3 NaN or infinite values in rows 0 to 31 of matrix 0") as caught:
        tensor.numpy()
    assert caught.value.message.startswith(f"model.safetensors: tensor '{EXPERT}.weight'")
    found = carried(tensor)
    assert found is not None
    with pytest.raises(InputError, match="3 NaN"):
        found.values.numpy()


@pytest.mark.parametrize(
    ("case", "key", "value", "message"),
    [
        ("fp8-dynamic", "num_bits", 4, "num_bits and type are not 8 and 'float'"),
        ("fp8-dynamic", "type", "int", "is F8_E4M3, expected I8"),
        ("fp8-dynamic", "symmetric", False, "symmetric is false"),
        ("fp8-dynamic", "strategy", "token", "strategy is 'token': not supported"),
        ("fp8-dynamic", "strategy", "group", "group_size must be an integer, not null"),
        ("fp8-dynamic", "strategy", [], "strategy is "),
        ("fp8-dynamic", "strategy", "block", "block_structure is None, expected rows and columns of a block"),
        ("fp8-dynamic", "strategy", "tensor", "has shape [32, 1], config.json makes it [1]"),
        ("nvfp4", "group_size", 32, "group_size is not 16"),
    ],
)
def test_a_scheme_that_does_not_fit(case: str, key: str, value: Any, message: str, tmp_path: Path) -> None:
    def change(settings: dict[str, Any]) -> None:
        settings["config_groups"]["group_0"]["weights"][key] = value

    with pytest.raises(InputError) as caught:
        open_checkpoint(with_settings(HERE / case, tmp_path / "broken", change))
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("name", "recipe", "limit", "became"),
    [
        ("fp8-dynamic", "keep", ROUNDED, "carried over"),
        ("fp8-dynamic", "none", EXACT, "kept dequantized"),
        ("fp8-static", "keep", EXACT, "carried over"),
        ("fp8-static", "none", EXACT, "kept dequantized"),
        ("nvfp4", "keep", EXACT, "kept dequantized"),
        ("nvfp4", "none", EXACT, "kept dequantized"),
    ],
)
def test_convert_and_validate(
    name: str, recipe: str, limit: float, became: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = convert_and_validate(HERE / name, tmp_path / "out", recipe, capsys, limit)
    assert remarks(converted) == {became}
    assert ("inputs are rounded to FP8" in str(converted["passes"])) == (limit == ROUNDED)
