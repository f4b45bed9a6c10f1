"""Experts that Meta's own code quantized: its codes, its scales and exactly their products, in one file or two."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from l4convert.checkpoint import open_checkpoint
from l4convert.checkpoint.combiners import transposed
from l4convert.checkpoint.prequantized import carried
from tests.checkpoint.refusals import assert_refused
from tests.meta_checkpoints import (
    EXPERTS,
    QUANTIZED,
    published,
    quantize_fp8_per_row,
    quantize_impls,
    random_state,
    sharded,
    write_quantized,
)

KINDS = [("fp8", 1), ("fp8", 2), ("int4", 1), ("int4", 2)]


@pytest.fixture(scope="module")
def impls() -> Any:
    patch = pytest.MonkeyPatch()
    yield quantize_impls(patch)
    patch.undo()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, impls: Any) -> dict[tuple[str, int], Path]:
    root = tmp_path_factory.mktemp("quantized")
    return {(kind, n): write_quantized(root / f"{kind}{n}", kind, impls, n) for kind, n in KINDS}


def codes_of(weight: Any, kind: str, impls: Any) -> tuple[Any, Any]:
    """Meta's codes [E, N, K] and scales [E, N, blocks] of weights [E, N, K]."""
    if kind == "fp8":
        codes, scales = quantize_fp8_per_row(weight)
        return codes, scales[..., None]
    each = [impls.int4_row_quantize(matrix) for matrix in weight]
    return torch.stack([codes for codes, _ in each]), torch.stack([scales.T for _, scales in each])


@pytest.mark.parametrize(("kind", "shards"), KINDS)
def test_codes_and_scales_are_metas_bit_for_bit(folders: Any, impls: Any, kind: str, shards: int) -> None:
    checkpoint = open_checkpoint(folders[kind, shards])
    parts = sharded(published(random_state(QUANTIZED)), shards, 4)
    for layer in (1, 2):
        ours, prefix = f"model.layers.{layer}.feed_forward.experts.", f"layers.{layer}.feed_forward.experts."
        made = {
            name: [
                codes_of(part[prefix + key].reshape(4, -1, part[prefix + key].shape[-1]).transpose(1, 2), kind, impls)
                for part in parts
            ]
            for name, key in EXPERTS.items()
        }
        gate_up, down = [*made["w1"], *made["w3"]], made["w2"]
        for weight, shares, axis in (("gate_up_proj", gate_up, 1), ("down_proj", down, 2)):
            found = carried(transposed(checkpoint.tensors[ours + weight]))
            assert found is not None
            codes = torch.cat([codes for codes, _ in shares], axis)
            scales = torch.cat([scales for _, scales in shares], axis)
            assert found.values.dtype == {"fp8": ir.DataType.FLOAT8E4M3FN, "int4": ir.DataType.INT4}[kind]
            values = found.values.numpy()
            theirs = codes.view(torch.uint8).numpy() if kind == "fp8" else codes.numpy()
            np.testing.assert_array_equal(values.view(np.uint8) if kind == "fp8" else values.astype(np.int8), theirs)
            np.testing.assert_array_equal(found.scales.numpy(), scales.numpy())
            product = codes.float() * scales.repeat_interleave(codes.shape[-1] // scales.shape[-1], -1)
            whole = checkpoint.tensors[ours + weight]
            np.testing.assert_array_equal(whole.numpy(), product.transpose(1, 2).numpy())
            some = (3, slice(5, 40), slice(7, 90))
            np.testing.assert_array_equal(whole.tile(*some), product.transpose(1, 2).numpy()[some])


def test_layers_that_metas_script_leaves_out_stay_as_they_are(folders: Any) -> None:
    checkpoint = open_checkpoint(folders["fp8", 2])
    kinds = [checkpoint.tensors[f"model.layers.{i}.feed_forward.experts.down_proj"].dtype.name for i in range(4)]
    assert kinds == ["BFLOAT16", "FLOAT", "FLOAT", "BFLOAT16"]
    assert checkpoint.quantization is not None
    assert "4 of 51" in checkpoint.quantization
    assert "groups of 128" in checkpoint.quantization


def scales_of(path: Path, change: Callable[[dict[str, Any]], Any], file: str = "fp8_scales_0.pt") -> None:
    scales = torch.load(path / file, weights_only=False)
    change(scales)
    torch.save(scales, path / file)


W1 = "layers.1.feed_forward.experts.w1"
KEY = f"layers.1.feed_forward.experts.{EXPERTS['w1']}"
DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a missing file": (lambda p: (p / "fp8_scales_1.pt").unlink(), ["fp8_scales_1.pt", "missing"]),
    "a file too many": (lambda p: shutil.copy(p / "fp8_scales_1.pt", p / "fp8_scales_2.pt"), ["fp8_scales_2.pt"]),
    "both kinds": (lambda p: shutil.copy(p / "fp8_scales_1.pt", p / "int4_scales_1.pt"), ["fp8_scales", "int4_scales"]),
    "a missing scale": (lambda p: [scales_of(p, lambda s: s.pop(W1), f"fp8_scales_{i}.pt") for i in (0, 1)], [KEY]),
    "a scale missing in one": (lambda p: scales_of(p, lambda s: s.pop(W1)), [W1, "fp8_scales"]),
    "something else": (lambda p: scales_of(p, lambda s: s.update(x=torch.zeros(1))), ["'x'", "fp8_scales_0.pt"]),
    "a text": (lambda p: scales_of(p, lambda s: s.update({W1: "1"})), [W1, "fp8_scales_0.pt"]),
    "another shape": (lambda p: scales_of(p, lambda s: s.update({W1: s[W1][:, :-1].clone()})), [W1, "[4, "]),
    "another type": (lambda p: scales_of(p, lambda s: s.update({W1: s[W1].half()})), [W1, "FLOAT16"]),
    "a pickle": (lambda p: (p / "fp8_scales_0.pt").write_bytes(b"\x80\x02}."), ["fp8_scales_0.pt"]),
    "int4 scales for fp8": (
        lambda p: [(p / f"fp8_scales_{i}.pt").rename(p / f"int4_scales_{i}.pt") for i in (0, 1)], [W1, "shape"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_scales_are_refused_by_name(folders: Any, tmp_path: Path, kind: str) -> None:
    change, mentions = DAMAGE[kind]
    path = Path(shutil.copytree(folders["fp8", 2], tmp_path / "ckpt"))
    change(path)
    assert_refused(lambda: open_checkpoint(path), mentions)


def test_scales_for_weights_that_are_not_quantized_are_refused(folders: Any, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folders["fp8", 1], tmp_path / "ckpt"))
    torch.save(published(random_state(QUANTIZED)), path / "consolidated.00.pth")
    assert_refused(lambda: open_checkpoint(path), ["BFLOAT16", "fp8_scales_0.pt"])


def test_a_nan_scale_is_refused_when_it_is_written(folders: Any, tmp_path: Path) -> None:
    from l4convert.options import ConvertOptions
    from l4convert.pipeline import convert

    path = Path(shutil.copytree(folders["fp8", 1], tmp_path / "ckpt"))
    scales_of(path, lambda s: s[W1].fill_(float("nan")))
    options = ConvertOptions(path, tmp_path / "out", recipe="none")
    assert_refused(lambda: convert(options), ["NaN", W1, "fp8_scales_0.pt"])
