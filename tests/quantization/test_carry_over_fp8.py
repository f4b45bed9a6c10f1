"""The E4M3 codes of a checkpoint are stored as they are, byte for byte, in whatever form a target wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from l4convert.conversion import Conversion
from l4convert.errors import InputError
from l4convert.options import PlanOptions
from l4convert.progress import NO_PROGRESS
from l4convert.targets import TARGETS
from tests.checkpoint.quantized.damage import with_tensors
from tests.checkpoints import write_random_checkpoint
from tests.compressed import compress

EXPERTS = 2
MLP = "model.layers.0.feed_forward"
FP8: Mapping[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
PER_TOKEN: Mapping[str, Any] = {**FP8, "strategy": "token", "dynamic": True}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """One scale a row with activations rounded token by token, one scale a tensor without, and blocks of both axes."""
    folder = tmp_path_factory.mktemp("fp8")
    sizes = {"num_hidden_layers": 1, "num_local_experts": EXPERTS, "intermediate_size": 128}  # widths that differ
    source = write_random_checkpoint(folder / "source", **sizes)
    schemes: dict[str, tuple[dict[str, Any], Mapping[str, Any] | None]] = {
        "channel": ({}, PER_TOKEN),
        "tensor": ({}, None),
        "block": ({"block_structure": [16, 32]}, None),
    }
    return {
        strategy: compress(
            source,
            folder / strategy,
            {**FP8, "strategy": strategy, **more},
            form="float-quantized",
            ignore=("re:.*lm_head", "re:.*router"),
            inputs=inputs,
        )
        for strategy, (more, inputs) in schemes.items()
    }


def codes(path: Path, *modules: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes [N, K], and scales float32 [N], of modules one above the other, by the safetensors library."""
    import torch

    state = load_file(path / "model.safetensors")
    found = [state[f"{module}.weight"].view(torch.uint8).numpy() for module in modules]
    scales = [state[f"{module}.weight_scale"].float().numpy().reshape(-1) for module in modules]
    return np.concatenate(found), np.concatenate(
        [np.broadcast_to(s, len(rows)) if len(s) == 1 else s for s, rows in zip(scales, found, strict=True)]
    )


def expert_codes(path: Path, *projections: str) -> tuple[np.ndarray, np.ndarray]:
    """Those of the experts, [E, N, K] and [E, N]."""
    found = [codes(path, *(f"{MLP}.experts.{e}.{p}_proj" for p in projections)) for e in range(EXPERTS)]
    return np.stack([rows for rows, _ in found]), np.stack([scales for _, scales in found])


def stored(conversion: Conversion, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes [.., K, N] or [.., N, K] as bytes, and scales, of a tensor; None where there is none."""
    values: Any = conversion.model.graph.initializers.get(name)
    if values is None:
        return None
    tensor = values.const_value
    rows = np.frombuffer(tensor.tobytes(), np.uint8)
    return rows.reshape(*tensor.dims[:-1], -1), scales_beside(conversion, name)


def scales_beside(conversion: Conversion, name: str) -> np.ndarray:
    graph = conversion.model.graph.initializers
    plain = f"{name.removesuffix('_fp8')}_scale"
    return graph[f"{name}_scale" if f"{name}_scale" in graph else plain].const_value.numpy().astype(np.float32)


def in_halves(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Rows of gate and up in turn, as QMoE has them, put back: first gate, then up."""
    return tuple(np.concatenate([part[:, 0::2], part[:, 1::2]], axis=1) for part in pair)


def found_in(conversion: Conversion, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes [.., N, K] and scales [.., N] of a weight, from the form in which its target has them."""
    if (apart := [stored(conversion, f"{name}_fp8_{expert}_nk") for expert in range(EXPERTS)]) and apart[0]:
        return np.stack([pair[0] for pair in apart if pair]), np.stack([pair[1][:, 0] for pair in apart if pair])
    k_last = (in_halves if name.endswith("gate_up_proj") else tuple, "_fp8_nk"), (tuple, "_fp8_packed")
    k_first: Callable[[Any], Any] = lambda pair: (np.swapaxes(pair[0], -1, -2), pair[1])  # noqa: E731
    ways = (k_first, "_fp8"), *k_last
    if conversion.target.name == "tensorrt-rtx":
        ways = (k_first, "_fp8_packed"), (k_first, "_fp8")
    for turn, ending in ways:
        if (pair := stored(conversion, name + ending)) is not None:
            rows, scales = turn(pair)
            return rows, scales.reshape(rows.shape[:-1])
    raise AssertionError(f"{name} is not stored as FP8")


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_stores_the_checkpoints_bytes(checkpoints: Mapping[str, Path], target: str, strategy: str) -> None:
    path = checkpoints[strategy]
    conversion = Conversion(PlanOptions(checkpoint=path, target=target, recipe="keep"), NO_PROGRESS)
    expected = {
        f"{MLP}.shared_expert.down_proj.weight": codes(path, f"{MLP}.shared_expert.down_proj"),
        "model.layers.0.self_attn.k_proj.weight": codes(path, "model.layers.0.self_attn.k_proj"),
        f"{MLP}.experts.gate_up_proj": expert_codes(path, "gate", "up"),
        f"{MLP}.experts.down_proj": expert_codes(path, "down"),
    }
    for name, (rows, scales) in expected.items():
        found_rows, found_scales = found_in(conversion, name)
        np.testing.assert_array_equal(found_rows, rows, name)
        np.testing.assert_array_equal(found_scales, scales, name)


@pytest.mark.parametrize(("strategy", "rounded"), [("channel", True), ("tensor", False)])
def test_activations_are_rounded_where_the_checkpoint_means_it(
    checkpoints: Mapping[str, Path], strategy: str, rounded: bool
) -> None:
    """Static scales of activations are not used: the inputs of such weights stay as they are."""
    conversion = Conversion(
        PlanOptions(checkpoint=checkpoints[strategy], target="portable", recipe="keep"), NO_PROGRESS
    )
    assert any(node.op_type == "QuantizeLinear" for node in conversion.model.graph) == rounded


def test_the_recipe_fp8_takes_the_same_bytes(checkpoints: Mapping[str, Path]) -> None:
    path = checkpoints["tensor"]
    conversion = Conversion(PlanOptions(checkpoint=path, target="portable", recipe="fp8"), NO_PROGRESS)
    rows, scales = found_in(conversion, f"{MLP}.experts.down_proj")
    expected = expert_codes(path, "down")
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_array_equal(scales, expected[1])


def test_blocks_of_both_axes_are_rounded_again_or_kept_dequantized(checkpoints: Mapping[str, Path]) -> None:
    for recipe, remark in (("keep", "kept dequantized"), ("fp8", "rounded a second time, to fp8")):
        options = PlanOptions(checkpoint=checkpoints["block"], target="portable", recipe=recipe)
        reports = {report.name: report for report in Conversion(options, NO_PROGRESS).reports}
        notes = {text for _, text in reports["quantize_weights"].notes}
        assert {text.partition(", ")[2] for text in notes} == {remark}, recipe


@pytest.mark.parametrize("recipe", ["keep", "none"])
def test_nan_codes_stop_a_conversion(checkpoints: Mapping[str, Path], tmp_path: Path, recipe: str) -> None:
    import torch

    name = f"{MLP}.experts.1.up_proj.weight"
    path = with_tensors(
        checkpoints["channel"], tmp_path / "nan", lambda tensors: tensors[name].view(torch.uint8)[3].fill_(0xFF)
    )
    from l4convert import cli

    out = tmp_path / "out"
    assert cli.run(["convert", str(path), "--output", str(out), "--recipe", recipe]) == InputError.exit_code
    assert not out.exists()
