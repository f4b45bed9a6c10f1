from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.checkpoint.combiners import transposed
from l4convert.checkpoint.prequantized import carried
from l4convert.errors import InputError
from tests.checkpoint.llmcompressor.make import SIZES
from tests.checkpoint.quantized.agreement import assert_equal_to_library
from tests.checkpoint.quantized.damage import with_tensors
from tests.checkpoint.quantized.road import EXACT, ROUNDED, convert_and_validate, remarks
from tests.checkpoints import MAVERICK
from tests.fbgemm_checkpoints import write_fbgemm_checkpoint

EXPERTS = "model.layers.1.feed_forward.experts"


@pytest.fixture(scope="module")
def fbgemm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths that all differ, so that no axis can be taken for another."""
    return write_fbgemm_checkpoint(
        tmp_path_factory.mktemp("fbgemm") / "fp8", **{**SIZES, **MAVERICK, "intermediate_size": 48}
    )


def test_it_is_dequantized_as_transformers_computes_it(fbgemm: Path) -> None:
    assert assert_equal_to_library(fbgemm) == 24
    expected = "fbgemm_fp8: FP8 E4M3 with one scale a row (4 weights), of 24 tensors"
    assert open_checkpoint(fbgemm).quantization == expected


def test_it_is_near_what_it_was_made_from(fbgemm: Path) -> None:
    """So the reference, which cannot run transformers' kernels on a CPU, has the right axes too."""
    import numpy as np

    ours, source = open_checkpoint(fbgemm).tensors, open_checkpoint(fbgemm.with_name("fp8-bf16")).tensors
    for name, tensor in ours.items():
        was = source[name].numpy().astype(np.float32)
        assert np.abs(tensor.numpy().astype(np.float32) - was).max() <= np.abs(was).max() / 16, name


def test_the_codes_are_carried(fbgemm: Path) -> None:
    import torch
    from safetensors.torch import load_file

    stored = load_file(fbgemm / "model.safetensors")
    for name in ("gate_up_proj", "down_proj"):
        found = carried(transposed(open_checkpoint(fbgemm).tensors[f"{EXPERTS}.{name}"]))
        assert found is not None
        codes = stored[f"{EXPERTS}.{name}"].mT.contiguous().view(torch.uint8)
        assert found.values.numpy().tobytes() == codes.numpy().tobytes()
        assert found.scales.numpy().reshape(-1).tolist() == stored[f"{EXPERTS}.{name}_scale"].reshape(-1).tolist()


def nan_codes(tensors: dict[str, Any]) -> None:
    import torch

    codes = tensors[f"{EXPERTS}.down_proj"].view(torch.uint8)
    codes[1, 3, 4:6] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)


def test_nan_codes_are_counted_and_refused(fbgemm: Path, tmp_path: Path) -> None:
    path = with_tensors(fbgemm, tmp_path / "nan", nan_codes)
    tensor = open_checkpoint(path).tensors[f"{EXPERTS}.down_proj"]
    with pytest.raises(InputError) as caught:
        tensor.numpy()
    assert caught.value.message.startswith(f"model.safetensors: tensor '{EXPERTS}.down_proj' has 2 NaN")


def test_scales_of_another_shape(fbgemm: Path, tmp_path: Path) -> None:
    name = f"{EXPERTS}.gate_up_proj_scale"
    path = with_tensors(fbgemm, tmp_path / "turned", lambda t: t.update({name: t[name].mT.contiguous()}))
    with pytest.raises(
        InputError, match=r"gate_up_proj_scale' has shape \[2, 96, 1\], config\.json makes it \[2, 1, 96\]"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("recipe", "limit", "became"), [("keep", ROUNDED, "carried over"), ("none", EXACT, "kept dequantized")]
)
def test_convert_and_validate(
    fbgemm: Path, recipe: str, limit: float, became: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = convert_and_validate(fbgemm, tmp_path / "out", recipe, capsys, limit)
    assert remarks(converted) == {became}
