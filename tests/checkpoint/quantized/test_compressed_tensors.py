"""Checkpoints made with compressed-tensors: dequantized as that library does, and refused where they are damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from l4convert.checkpoint import Checkpoint, open_checkpoint
from l4convert.checkpoint.fields import Fields
from l4convert.checkpoint.prequantized import carried
from l4convert.checkpoint.quantized.compressed_tensors import Schemes, kinds
from l4convert.errors import InputError
from l4convert.parity.reference_weights import decompress_compressed_tensors, quantization_config
from tests.checkpoint.refusals import assert_refused
from tests.checkpoints import write_random_checkpoint
from tests.compressed import IGNORE, PACKED, W4A16, compress

ALL = ("re:.*lm_head", "re:.*router")
CHANNELS = {"strategy": "channel", "group_size": None}
SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "groups": ({}, "INT4 in groups of 32"),
    "one scale": ({"strategy": "tensor", "group_size": None}, "INT4 with one scale a row"),
    "zero points": ({"symmetric": False}, "INT4 in groups of 32 with zero points"),
    "channels": (CHANNELS, "INT4 with one scale a row"),
    "8 bits": ({"num_bits": 8}, "INT8 in groups of 32"),
    "static order": ({"actorder": "static"}, "INT4 in groups of 32"),
}
Q_PROJ = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.1.feed_forward.experts.2.gate_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source"
    return write_random_checkpoint(path, num_hidden_layers=2, num_local_experts=3, dtype="bfloat16")


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(source, tmp_path_factory.mktemp("packed") / "packed", ignore=ALL)


def decompressed(path: Path) -> dict[str, Any]:
    """By the library, in float32."""
    state = load_file(path / "model.safetensors")
    return decompress_compressed_tensors(state, quantization_config(path))


@pytest.mark.parametrize(("changes", "words"), SCHEMES.values(), ids=SCHEMES.keys())
def test_weights_are_those_that_the_library_decompresses(
    source: Path, tmp_path: Path, changes: Mapping[str, Any], words: str
) -> None:
    path = compress(source, tmp_path / "checkpoint", {**W4A16, **changes}, ignore=ALL)
    checkpoint = open_checkpoint(path)
    assert checkpoint.quantization is not None
    assert words in checkpoint.quantization
    assert_equal(checkpoint, decompressed(path))


def assert_equal(checkpoint: Checkpoint, expected: Mapping[str, Any]) -> None:
    assert set(checkpoint.tensors) <= set(expected)
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(tensor.numpy().astype(np.float32), expected[name].float().numpy(), name)


# Codes of one a byte: what schemes that round activations, too, are stored as.
BYTES: dict[str, tuple[dict[str, Any], str, str]] = {
    "W8A8": ({"num_bits": 8, **CHANNELS}, "int-quantized", "INT8 with one scale a row"),
    "W8A8 with zero points": ({"num_bits": 8, "symmetric": False}, "int-quantized", "INT8 in groups of 32 with zero"),
    "W4A8": ({}, "int-quantized", "INT4 in groups of 32"),
    "naive": ({"num_bits": 8, **CHANNELS}, "naive-quantized", "INT8 with one scale a row"),
}


@pytest.mark.parametrize(("changes", "form", "words"), BYTES.values(), ids=BYTES.keys())
def test_integers_that_are_not_packed(
    source: Path, tmp_path: Path, changes: Mapping[str, Any], form: str, words: str
) -> None:
    path = compress(source, tmp_path / "checkpoint", {**W4A16, **changes}, form=form, ignore=ALL)
    checkpoint = open_checkpoint(path)
    assert words in str(checkpoint.quantization)
    assert_equal(checkpoint, decompressed(path))
    codes = carried(checkpoint.tensors[f"{Q_PROJ}.weight"])
    assert (codes is not None) == words.startswith("INT4")
    if codes is not None:
        stored = load_file(path / "model.safetensors")[f"{Q_PROJ}.weight"].numpy()
        np.testing.assert_array_equal(codes.values.numpy().astype(np.int8), stored)
        edit(path, lambda t: t[f"{Q_PROJ}.weight"].fill_(8))
        with pytest.raises(InputError, match=r"q_proj\.weight' has codes beyond the 4 bits of its scheme"):
            open_checkpoint(path).tensors[f"{Q_PROJ}.weight"].numpy()


# Targets of the groups of a config, in order, and the group that the library gives one weight.
TARGETS: dict[str, tuple[list[list[str]], str, int]] = {
    "an expression before a class": ([["Linear"], ["re:.*q_proj"]], Q_PROJ, 1),
    "a name before an expression": ([["re:.*q_proj"], [Q_PROJ]], Q_PROJ, 1),
    "expressions by the alphabet": ([["re:.*self_attn.*"], ["re:.*q_proj"]], Q_PROJ, 1),
    "the same target twice": ([["Linear"], ["Linear"]], Q_PROJ, 1),
    "the class of the embeddings": ([["Linear"], ["Embedding"]], "model.embed_tokens", 1),
    "two classes of the router": ([["Llama4Router"], ["Linear"]], "model.layers.0.feed_forward.router", 1),
}


@pytest.mark.parametrize(("targets", "module", "group"), TARGETS.values(), ids=TARGETS.keys())
def test_the_scheme_of_a_module_is_the_librarys_choice(targets: list[list[str]], module: str, group: int) -> None:
    from compressed_tensors.utils.match import match_targets
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    with torch.device("meta"):
        config = Llama4TextConfig(num_hidden_layers=1, num_local_experts=1, hidden_size=64, num_attention_heads=1)
        theirs = match_targets(module, Llama4ForCausalLM(config).get_submodule(module), chain(*targets))[0]
    groups = {
        str(i): {"targets": some, "format": PACKED, "weights": {"group_size": i}} for i, some in enumerate(targets)
    }
    schemes = Schemes(Fields({"config_groups": groups}, "config.json"))
    assert theirs in targets[group]
    assert schemes.of(module, kinds(f"{module}.weight")).weights.get("group_size") == group


def test_groups_of_activations_and_caches_leave_weights_as_they_are(source: Path, tmp_path: Path) -> None:
    attention = {"targets": ["Llama4TextAttention"], "weights": None, "input_activations": {"num_bits": 8}}
    path = compress(source, tmp_path / "checkpoint", ignore=("re:.*",), config_groups={"group_0": attention})
    names = {"k_scale": torch.ones(1), "k_zero_point": torch.zeros(1).char(), "q_proj.output_scale": torch.ones(1)}
    edit(path, lambda t: t.update({f"model.layers.0.self_attn.{name}": tensor for name, tensor in names.items()}))
    words = (
        "compressed-tensors: no weights, of 41 tensors; not used: 1 scales of key and value caches,"
        " 1 static scales of activations"
    )
    assert open_checkpoint(path).quantization == words
    say_groups(path, {}, kv_cache_scheme={"num_bits": 8, "type": "float"})
    checkpoint = open_checkpoint(path)
    assert checkpoint.quantization == words
    assert_equal(checkpoint, decompressed(path))


def test_what_the_config_ignores_stays_as_it_is(source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(compress(source, tmp_path / "checkpoint", ignore=IGNORE, shards=3))
    plain = {name for name, tensor in checkpoint.tensors.items() if tensor.dtype.name == "BFLOAT16"}
    assert f"{Q_PROJ}.weight" in plain
    assert f"{EXPERT}.weight" not in plain


def test_a_multimodal_checkpoint_is_read_by_its_own_names(tmp_path: Path) -> None:
    options = {"num_hidden_layers": 1, "num_local_experts": 2}
    whole = write_random_checkpoint(tmp_path / "whole", conditional=True, **options)
    ignore = ("re:.*lm_head", r"re:language_model\.model\.layers\.\d+\.self_attn", *IGNORE[2:])
    checkpoint = open_checkpoint(compress(whole, tmp_path / "checkpoint", ignore=ignore))
    assert checkpoint.quantization == "compressed-tensors: INT4 in groups of 32 (9 weights), of 19 tensors"


def test_activation_order_is_honoured(packed: Path, tmp_path: Path) -> None:
    """As early versions of the library wrote it; the present one has no code for it but the groups themselves."""
    path = tmp_path / "checkpoint"
    shutil.copytree(packed, path)
    order = torch.arange(64, dtype=torch.int32).flip(0) % 2
    edit(path, lambda t: t.update({f"{Q_PROJ}.weight_g_idx": order}))
    tensor = open_checkpoint(path).tensors[f"{Q_PROJ}.weight"]
    assert carried(tensor) is None
    np.testing.assert_array_equal(tensor.numpy(), decompressed(path)[f"{Q_PROJ}.weight"].numpy())
    assert not np.array_equal(tensor.numpy(), decompressed(packed)[f"{Q_PROJ}.weight"].numpy())


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    file.unlink()
    save_file(tensors, file)


def say(path: Path, **keys: Any) -> None:
    """Change keys of the quantization config; those of its only group under ``weights``."""
    file = path / "config.json"
    values = json.loads(file.read_text())
    config = values["quantization_config"]
    config["config_groups"]["group_0"]["weights"] |= keys.pop("weights", {})
    config |= keys
    values["quantization_config"] = keys.pop("instead", config)
    file.write_text(json.dumps(values))


def drop(suffix: str) -> Callable[[Path], None]:
    return lambda path: edit(path, lambda t: t.pop(f"{Q_PROJ}.{suffix}"))


def put(suffix: str, tensor: Any) -> Callable[[Path], None]:
    return lambda path: edit(path, lambda t: t.update({f"{Q_PROJ}.{suffix}": tensor}))


def say_groups(path: Path, groups: Mapping[str, Any], **keys: Any) -> None:
    values = json.loads((path / "config.json").read_text())
    values["quantization_config"] |= {"config_groups": groups, **keys}
    (path / "config.json").write_text(json.dumps(values))


def targets(path: Path, target: object) -> None:
    values = json.loads((path / "config.json").read_text())
    values["quantization_config"]["config_groups"]["group_0"]["targets"] = [target]
    (path / "config.json").write_text(json.dumps(values))


def two_configs(path: Path, **changes: Any) -> None:
    values = json.loads((path / "config.json").read_text())
    values["compression_config"] = {**values["quantization_config"], **changes}
    (path / "config.json").write_text(json.dumps(values))


def test_a_config_may_say_the_same_twice(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(packed, path)
    two_configs(path)
    assert open_checkpoint(path).quantization == open_checkpoint(packed).quantization


REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "method": (lambda p: say(p, quant_method="gptq"), ["quant_method", "'gptq'"]),
    "no method": (lambda p: say(p, instead={}), ["quant_method", "None"]),
    "two configs": (lambda p: two_configs(p, ignore=[]), ["compression_config", "differs from quantization_config"]),
    "format": (lambda p: say(p, format="marlin-24"), ["format", "'marlin-24'"]),
    "format is a list": (lambda p: say(p, format=["pack-quantized"]), ["format"]),
    "5 bits": (lambda p: say(p, weights={"num_bits": 5}), ["group_0.weights.num_bits", "5"]),
    "float": (lambda p: say(p, weights={"type": "float"}), ["num_bits", "'float'"]),
    "strategy": (lambda p: say(p, weights={"strategy": "token"}), ["weights.strategy", "'token'"]),
    "group size 0": (lambda p: say(p, weights={"group_size": 0}), ["group_size", "from 1"]),
    "group size that does not divide": (lambda p: say(p, weights={"group_size": 48}), ["group_size", "48", "64"]),
    "other group size": (lambda p: say(p, weights={"group_size": 16}), ["weight_scale", "[64, 2]", "[64, 4]"]),
    "no groups": (lambda p: say(p, config_groups={}), ["config_groups", "empty"]),
    "group is a list": (lambda p: say(p, config_groups={"W4A16": ["Linear"]}), ["W4A16", "an object"]),
    "too many groups": (lambda p: say(p, config_groups={str(i): {} for i in range(65)}), ["65 entries"]),
    "no target": (lambda p: targets(p, "re:.*experts.*"), ["config_groups", "no scheme", Q_PROJ]),
    "bad target": (lambda p: targets(p, "re:("), ["targets", "not a regular expression"]),
    "number as a target": (lambda p: targets(p, 3), ["targets", "3"]),
    "ignored but quantized": (lambda p: say(p, ignore=["re:.*q_proj"]), ["ignore", Q_PROJ]),
    "not compressed": (lambda p: say(p, quantization_status="calibration"), ["quantization_status"]),
    "sparse": (lambda p: say(p, sparsity_config={"format": "sparse-24-bitmask"}), ["sparsity_config.format"]),
    "rotated": (lambda p: say(p, transform_config={"config_groups": {"u": {}}}), ["transform_config"]),
    "no scales": (drop("weight_scale"), ["weight_scale", "missing"]),
    "no codes": (drop("weight_packed"), ["weight_packed", "missing"]),
    "no shape": (drop("weight_shape"), ["weight_shape", "missing"]),
    "shape of three": (put("weight_shape", torch.tensor([64, 64, 1])), ["weight_shape", "[3]", "[2]"]),
    "codes of another shape": (put("weight_packed", torch.zeros(64, 7, dtype=torch.int32)), ["[64, 7]", "[64, 8]"]),
    "codes of another type": (put("weight_packed", torch.zeros(64, 8)), ["weight_packed", "F32", "I32"]),
    "scales of another type": (put("weight_scale", torch.zeros(64, 2).double()), ["weight_scale", "F64"]),
    "order of another length": (put("weight_g_idx", torch.zeros(9, dtype=torch.int32)), ["weight_g_idx", "[9]"]),
    "what nobody knows": (put("weight_magic", torch.zeros(2)), ["weight_magic", "not one this config has"]),
    "zero points that nobody asked for": (
        put("weight_zero_point", torch.zeros(64, 2, dtype=torch.int8)),
        ["weight_zero_point", "not one this config has"],
    ),
    "zero points that are missing": (lambda p: say(p, weights={"symmetric": False}), ["weight_zero_point", "missing"]),
    "both kinds of weight": (put("weight", torch.zeros(64, 64).bfloat16()), [f"{Q_PROJ}.weight'", "both"]),
}


@pytest.mark.parametrize(("damage", "mentions"), REFUSED.values(), ids=REFUSED.keys())
def test_a_damaged_checkpoint_is_refused(
    packed: Path, tmp_path: Path, damage: Callable[[Path], object], mentions: list[str]
) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(packed, path)
    damage(path)
    assert_refused(lambda: open_checkpoint(path), mentions)


def test_a_shape_is_read_where_rows_do_not_fill_their_words(tmp_path: Path) -> None:
    odd = {"num_hidden_layers": 1, "num_local_experts": 2, "intermediate_size": 36}
    source = write_random_checkpoint(tmp_path / "source", **odd)
    path = compress(source, tmp_path / "checkpoint", {**W4A16, "strategy": "channel", "group_size": None}, ignore=ALL)
    name = "model.layers.0.feed_forward.shared_expert.down_proj"
    np.testing.assert_array_equal(
        open_checkpoint(path).tensors[f"{name}.weight"].numpy(), decompressed(path)[f"{name}.weight"].numpy()
    )
    edit(path, lambda t: t.update({f"{name}.weight_shape": torch.tensor([64, 40])}))
    assert_refused(lambda: open_checkpoint(path), ["weight_shape", "[64, 40]", "[64, 36]"])


def test_experts_of_a_layer_have_one_type(source: Path, tmp_path: Path) -> None:
    """Else they could not be stacked, and each would be a product of its own in the graph."""
    path = compress(source, tmp_path / "checkpoint", ignore=(*ALL, r"re:.*layers\.1\.feed_forward\.experts\.1\..*"))
    expected, checkpoint = decompressed(path), open_checkpoint(path)
    experts = {name: tensor for name, tensor in checkpoint.tensors.items() if ".experts." in name}
    assert {tensor.dtype.name for tensor in experts.values()} == {"FLOAT"}
    for name, tensor in experts.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name].float().numpy())


def test_scales_that_are_not_finite_are_refused_by_name(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(packed, path)
    edit(path, lambda t: t[f"{Q_PROJ}.weight_scale"][3].fill_(float("nan")))
    tensor = open_checkpoint(path).tensors[f"{Q_PROJ}.weight"]
    with pytest.raises(InputError, match=r"weight_scale' has 2 NaN or infinite values in rows 0 to 63"):
        tensor.numpy()


def test_a_group_that_has_no_scales_is_refused_when_it_is_read(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(packed, path)
    put("weight_g_idx", torch.full((64,), 2, dtype=torch.int32))(path)
    tensor = open_checkpoint(path).tensors[f"{Q_PROJ}.weight"]
    with pytest.raises(InputError, match=r"weight_g_idx' names groups beyond the 2"):
        tensor.numpy()
