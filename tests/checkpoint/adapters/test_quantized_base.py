"""Adapters merged into weights that the checkpoint stores quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from l4convert.checkpoint import open_checkpoint
from l4convert.checkpoint.adapters import merge_adapters
from l4convert.checkpoint.prequantized import carried
from l4convert.parity.reference import load_transformers
from tests.adapters import PARAMETERS, as_torch, write_adapter
from tests.checkpoints import MAVERICK, unfuse, write_random_checkpoint
from tests.compressed import compress


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(
        tmp_path_factory.mktemp("plain"), **{**MAVERICK, "num_local_experts": 2, "num_hidden_layers": 2}
    )


def test_a_quantized_weight_is_dequantized_merged_and_not_carried_over(plain: Path, tmp_path: Path) -> None:
    base = compress(plain, tmp_path / "w4a16")
    adapter = write_adapter(
        plain,
        tmp_path / "adapter",
        target_modules=["o_proj", "shared_expert.up_proj"],
        target_parameters=PARAMETERS[1:],
    )
    checkpoint = merge_adapters(open_checkpoint(base), [adapter])
    applied = checkpoint.adapters[0]
    prefix = "model.layers.1.feed_forward."
    quantized = {f"{prefix}shared_expert.up_proj.weight", *(f"{prefix}experts.{e}.down_proj.weight" for e in (0, 1))}
    assert set(applied.dequantized) == quantized
    assert "3 of them were stored quantized and are not any more" in applied.words
    assert all(carried(checkpoint.tensors[name]) is None for name in quantized)
    assert carried(checkpoint.tensors[f"{prefix}shared_expert.gate_proj.weight"]) is not None
    # compressed-tensors dequantizes and peft merges: the same float32 numbers, and BF16 where they were BF16 before.
    theirs = unfuse(load_transformers(checkpoint).state_dict())
    for name, tensor in as_torch(checkpoint.tensors).items():
        assert torch.equal(tensor, theirs[name]), name
