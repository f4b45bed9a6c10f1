"""What becomes of a checkpoint's own codes: which recipe takes them, and that every target stores them bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from safetensors.torch import load_file

from l4convert.checkpoint import Checkpoint, open_checkpoint
from l4convert.conversion import Conversion
from l4convert.errors import UsageError
from l4convert.options import PlanOptions
from l4convert.plugins.moe.layout import GROUP, K_ORDER
from l4convert.progress import NO_PROGRESS
from l4convert.quantization.carry_over import resolve
from l4convert.quantization.recipe import Recipe, Rule, Scheme, load_recipe, parse_recipe
from l4convert.targets import TARGETS
from tests.checkpoints import write_random_checkpoint
from tests.compressed import IGNORE, W4A16, compress

ALL = ("re:.*lm_head", "re:.*router")
EXPERTS = 3
MLP = "model.layers.0.feed_forward"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source"
    # 128 wide, so that there are groups of 128.
    return write_random_checkpoint(
        path,
        num_hidden_layers=2,
        num_local_experts=EXPERTS,
        num_attention_heads=8,
        hidden_size=128,
        intermediate_size=128,
    )


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a checkpoint with these changes of the scheme, once."""
    folder = tmp_path_factory.mktemp("quantized")

    def make(ignore: tuple[str, ...] = ALL, **changes: Any) -> Path:
        path = folder / "-".join(map(str, (len(ignore), *changes.values())))
        return path if path.exists() else compress(source, path, {**W4A16, **changes}, ignore=ignore)

    return make


def codes(path: Path, module: str) -> tuple[np.ndarray, np.ndarray]:
    """Integers int8 [N, K] and scales float32 of a module, unpacked by the library."""
    state = load_file(path / "model.safetensors")
    shape = state[f"{module}.weight_shape"]
    integers = unpack_from_int32(state[f"{module}.weight_packed"], 4, shape).numpy()
    return integers, state[f"{module}.weight_scale"].float().numpy()


def expert_codes(path: Path, *projections: str) -> tuple[np.ndarray, np.ndarray]:
    """Those of the experts [E, N, ...], the projections one above the other."""
    found = [[codes(path, f"{MLP}.experts.{e}.{p}_proj") for p in projections] for e in range(EXPERTS)]
    joined = [[np.concatenate([pair[i] for pair in expert]) for expert in found] for i in range(2)]
    return np.stack(joined[0]), np.stack(joined[1])


def nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., n] to int8 [..., 2n], the lower half of a byte first, in two's complement."""
    both = np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1).astype(np.int8)
    return np.where(both > 7, both - 16, both)


def alternating(rows: np.ndarray) -> np.ndarray:
    """[E, 2N, ...] with the rows of the two halves in turn, as QMoE has them."""
    gate, up = np.split(rows, 2, axis=1)
    return np.stack([gate, up], axis=2).reshape(rows.shape)


def words_in_order(words: np.ndarray) -> np.ndarray:
    """Codes [E, N, K] of the MoE plugin's words: slot s of a group holds code K_ORDER[s]."""
    slots = nibbles(np.ascontiguousarray(words).view(np.uint8)).reshape(*words.shape[:2], -1, GROUP)
    result = np.empty_like(slots)
    result[..., list(K_ORDER)] = slots
    return result.reshape(*words.shape[:2], -1)


def lowered(path: Path, target: str, recipe: str = "keep", **options: Any) -> Conversion:
    return Conversion(PlanOptions(checkpoint=path, target=target, recipe=recipe, **options), NO_PROGRESS)


def stored(conversion: Conversion, name: str) -> np.ndarray:
    """What a tensor would hold in the weights file: its bytes, as its type."""
    tensor: Any = conversion.model.graph.initializers[name].const_value
    if tensor.dtype == ir.DataType.INT4:
        return nibbles(np.frombuffer(tensor.tobytes(), np.uint8)).reshape(tensor.dims)
    return np.frombuffer(tensor.tobytes(), tensor.dtype.numpy()).reshape(tensor.dims)


def swapped(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, -1, -2)


Decoder = Callable[[np.ndarray], np.ndarray]
# Target -> of a matrix, of gate and up, and of down: the end of its name, and how codes [.., N, K] are read from it.
OFFSET: Decoder = lambda packed: nibbles(packed ^ 0x88).reshape(*packed.shape[:2], -1)  # noqa: E731
ROWS: Decoder = lambda packed: OFFSET(packed.reshape(len(packed), 1, -1))[:, 0]  # noqa: E731
RTX: Decoder = lambda words: swapped(nibbles(np.ascontiguousarray(words).view(np.uint8)))  # noqa: E731
STORED: Mapping[str, tuple[tuple[str, Decoder], ...]] = {
    "cpu": (("_packed", ROWS), ("_packed", OFFSET), ("_packed", OFFSET)),
    "cuda": (("_packed", ROWS), ("_packed", OFFSET), ("_packed", OFFSET)),
    "portable": (("", swapped),) * 3,
    "tensorrt": (("", swapped), ("_packed", words_in_order), ("_packed", words_in_order)),
    "tensorrt-rtx": (("", swapped), ("_packed", RTX), ("_packed", RTX)),
}


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_stores_the_librarys_integers_and_scales(quantized: Callable[..., Path], target: str) -> None:
    path = quantized()
    conversion = lowered(path, target)
    matrix, gate_up, down = (
        codes(path, f"{MLP}.shared_expert.down_proj"), expert_codes(path, "gate", "up"), expert_codes(path, "down"),
    )  # fmt: skip
    names = (f"{MLP}.shared_expert.down_proj.weight", f"{MLP}.experts.gate_up_proj", f"{MLP}.experts.down_proj")
    if target in ("cpu", "cuda"):
        gate_up = alternating(gate_up[0]), alternating(gate_up[1])
    for name, (integers, scales), (ending, decode) in zip(names, (matrix, gate_up, down), STORED[target], strict=True):
        np.testing.assert_array_equal(decode(stored(conversion, f"{name}_int4{ending}")), integers, name)
        # Scales lie beside codes: as [.., N, blocks], or the other way round.
        prefix = f"{name}_int4_packed_scale" if ending else f"{name}_scale"
        found = stored(conversion, prefix).astype(np.float32)
        if target not in ("cpu", "cuda"):
            found = swapped(found)
        np.testing.assert_array_equal(found, scales, name)


BLOCKS: dict[str, tuple[dict[str, Any], int | None, int, int]] = {
    # scheme of the checkpoint, --block-size, block size of the artifact, how often a scale is repeated
    "the checkpoint's": ({"group_size": 64}, None, 64, 1),
    "smaller than its groups": ({"group_size": 128}, 32, 32, 4),
    "larger groups than kernels have": ({"strategy": "channel", "group_size": None}, None, 128, 1),
    "a row in blocks": ({"strategy": "channel", "group_size": None}, 64, 64, 2),
}


@pytest.mark.parametrize(("scheme", "asked", "block", "times"), BLOCKS.values(), ids=BLOCKS.keys())
def test_block_sizes(
    quantized: Callable[..., Path], scheme: dict[str, Any], asked: int | None, block: int, times: int
) -> None:
    path = quantized(**scheme)
    conversion = lowered(path, "portable", "int4", block_size=asked)
    name = f"{MLP}.shared_expert.up_proj"
    integers, scales = codes(path, name)
    values = conversion.model.graph.initializers[f"{name}.weight_int4"]
    (dequantize, _), *_ = values.uses()
    assert dequantize.attributes["block_size"].as_int() == block
    np.testing.assert_array_equal(stored(conversion, f"{name}.weight_int4"), integers.T)
    np.testing.assert_array_equal(stored(conversion, f"{name}.weight_scale"), np.repeat(scales, times, axis=1).T)


def test_a_larger_block_than_the_groups_is_refused(quantized: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="blocks of 128 cannot be made of the groups of 32"):
        lowered(quantized(), "cpu", "int4", block_size=128)


def test_groups_that_no_kernel_has_are_rounded_again(quantized: Callable[..., Path]) -> None:
    reports = {report.name: report for report in lowered(quantized(group_size=16), "cpu", "int4").reports}
    notes = {remark for _, remark in reports["quantize_weights"].notes}
    assert notes == {"stored as INT4 in groups of 16, rounded a second time, to int4"}


REMARKS: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "int4": ({}, "int4", {"carried over: the checkpoint's own codes and scales (INT4 in groups of 32)"}),
    "fp8": (
        {},
        "fp8",
        {"stored as INT4 in groups of 32, rounded a second time, to fp8; --recipe keep would carry its codes over"},
    ),
    "none": ({}, "none", {"stored as INT4 in groups of 32, kept dequantized"}),
    "zero points": (
        {"symmetric": False},
        "int4",
        {"stored as INT4 in groups of 32 with zero points, rounded a second time, to int4"},
    ),
    "zero points, kept": (
        {"symmetric": False},
        "keep",
        {"stored as INT4 in groups of 32 with zero points, kept dequantized"},
    ),
}


@pytest.mark.parametrize(("scheme", "recipe", "remarks"), REMARKS.values(), ids=REMARKS.keys())
def test_the_pass_says_what_became_of_the_checkpoints_codes(
    quantized: Callable[..., Path], scheme: dict[str, Any], recipe: str, remarks: set[str]
) -> None:
    reports = {report.name: report for report in lowered(quantized(**scheme), "portable", recipe).reports}
    assert {remark for _, remark in reports["quantize_weights"].notes} == remarks
    assert len(reports["quantize_weights"].notes) == 18  # 9 weights a layer


def rules(recipe: Recipe) -> dict[str, Scheme]:
    return {rule.pattern: rule.scheme for rule in recipe.rules}


def test_a_resolved_recipe_says_what_is_carried_over(quantized: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(quantized(IGNORE))
    own = Scheme("int4", 32, "stored")
    resolved = resolve(load_recipe("keep"), checkpoint)
    assert rules(resolved) == {
        "model.layers.*.feed_forward.experts.*": own,
        "model.layers.*.feed_forward.shared_expert.gate_proj.weight": own,
        "model.layers.*.feed_forward.shared_expert.up_proj.weight": own,
        "model.layers.*.feed_forward.shared_expert.down_proj.weight": own,
        "*": Scheme("none"),
    }
    assert resolved.to_dict()["rule"][0] == {
        "pattern": "model.layers.*.feed_forward.experts.*",
        "scheme": "int4",
        "block_size": 32,
        "scale": "stored",
    }
    assert rules(resolve(load_recipe("int4"), checkpoint))["model.layers.*_proj.weight"].scale == "lse"


def test_layers_that_differ_have_rules_of_their_own(quantized: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(quantized((*ALL, "re:.*layers.1.*")))
    patterns = list(rules(resolve(load_recipe("keep"), checkpoint)))
    assert f"{MLP}.experts.gate_up_proj" in patterns
    assert "model.layers.0.self_attn.q_proj.weight" in patterns
    assert not any(".1." in pattern for pattern in patterns)


def test_a_recipe_of_ones_own_may_ask_for_a_block_size(quantized: Callable[..., Path]) -> None:
    rule = {"pattern": "*experts*", "scheme": "int4", "block_size": 64}
    recipe = parse_recipe({"name": "mine", "rule": [rule]}, "mine.toml")
    with pytest.raises(UsageError, match="blocks of 64"):
        resolve(recipe, open_checkpoint(quantized()))


def test_a_checkpoint_that_is_not_quantized_changes_no_recipe(source: Path) -> None:
    checkpoint: Checkpoint = open_checkpoint(source)
    recipe = load_recipe("int4")
    assert resolve(recipe, checkpoint) is recipe
    assert resolve(load_recipe("keep"), checkpoint).rules == (Rule("*", Scheme("none")),)
