"""Quantized graphs against transformers with the same weights rounded by numpy and ml_dtypes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.quantization.recipe import Scheme, load_recipe
from tests.checkpoints import write_random_checkpoint
from tests.graph_passes.mutations import insert_after, node
from tests.graph_passes.rounding import dequantized, everything, recipe, stored
from tests.graphs import (
    TOKENS,
    Client,
    canonical,
    lowered,
    op_counts,
    outputs,
    reference_logits,
    relative_error,
    run_passes,
    snapshot,
    token_ids,
)

CANONICAL = ("outline_attention", "fuse_experts", "quantize_weights")
# (recipe, layout) -> weights quantized. A layer has 4 attention matrices, 3 of a dense or shared MLP, 2 of experts.
FIRED = {
    ("int4", "scout"): 4 * 9,
    ("fp8", "scout"): 4 * 9,
    ("fp8-experts", "scout"): 4 * 2,
    ("none", "scout"): 0,
    ("int4", "maverick"): 4 * 7 + 2 * 2,
    ("fp8", "top-2"): 4 * 9,
    ("int4", "unfused"): 4 * 9,
    ("fp8-experts", "unfused maverick, top-2"): 2 * 2,
    ("int4", "tied with biases"): 4 * 9,
}


def quantized(checkpoint: Any, scheme: Any, kv_cache: str = "growing") -> ir.Model:
    model = canonical(checkpoint, kv_cache)
    run_passes(model, *CANONICAL, recipe=scheme)
    return model


@pytest.mark.parametrize(("name", "layout"), FIRED)
def test_fires_on_what_the_recipe_names_and_says_why_not_elsewhere(layouts, name, layout):
    model = canonical(layouts[layout])
    rules = load_recipe(name)
    *_, report = run_passes(model, *CANONICAL, recipe=rules)
    assert report.fired == FIRED[name, layout]
    weights = {n for n in model.graph.initializers if n.endswith((".weight", "_proj")) and "norm" not in n}
    kept = weights - {"model.embed_tokens.weight"}  # a table, not a factor
    assert {where for where, _ in report.skipped} == kept
    assert {why for _, why in report.skipped} <= {"the recipe keeps it"}
    before = snapshot(model)
    (again,) = run_passes(model, "quantize_weights", recipe=rules)
    assert again.fired == 0
    assert again.skipped == report.skipped
    assert snapshot(model) == before


def test_no_weight_is_read(scout, monkeypatch):
    model = canonical(scout)
    for value in model.graph.initializers.values():
        if value.const_value.sources:
            monkeypatch.setattr(type(value.const_value), "tile", None)
    assert run_passes(model, *CANONICAL, recipe=load_recipe("int4"))[-1].fired == 36


def test_a_table_that_the_recipe_names_is_left_alone_with_the_reason(scout):
    model = canonical(scout)
    rules = recipe(("model.embed_tokens.weight", Scheme("int4")), ("model.norm.weight", Scheme("fp8")))
    *_, report = run_passes(model, *CANONICAL, recipe=rules)
    assert report.fired == 0
    reasons = dict(report.skipped)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert reasons[name] == "no matrix product takes it as its second operand"


def test_a_computed_weight_is_left_alone(scout):
    model = canonical(scout)
    insert_after(model, "layers.0/self_attn/model.layers.0.self_attn.q_proj.weight/cast", "Neg")
    *_, report = run_passes(model, *CANONICAL, recipe=load_recipe("int4"))
    assert report.fired == 35
    assert dict(report.skipped)["model.layers.0.self_attn.q_proj.weight"].startswith("no matrix product takes it")


SCHEMES = {
    "int4 block 32": Scheme("int4", 32, "absmax"),
    "int4 block 64": Scheme("int4", 64, "absmax"),
    "int4 block 128": Scheme("int4", 128, "absmax"),
    "fp8 weights": Scheme("fp8"),
}


@pytest.mark.parametrize(
    ("layout", "form"), [("scout", "functions"), ("scout", "portable"), ("scout", "cpu"), ("maverick", "cpu")]
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_transformers_with_rounded_weights(layouts, layout, scheme, form):
    checkpoint, rules = layouts[layout], everything(SCHEMES[scheme])
    model = quantized(checkpoint, rules) if form == "functions" else lowered(checkpoint, form, recipe=rules)
    ids = token_ids(2)
    expected = reference_logits(checkpoint.path, ids, dequantized(rules))
    client = Client(model, checkpoint.config, "growing")
    for splits in ([TOKENS], [5, 7, 1, 13, 3]):
        assert relative_error(client.logits(ids, splits), expected) <= 1e-4
    assert relative_error(expected, reference_logits(checkpoint.path, ids)) > 1e-2  # rounding is seen by this test


@pytest.mark.parametrize(("block_size", "form"), [(32, "cpu"), (64, "portable"), (128, "cpu")])
def test_least_error_scales_are_better_and_are_what_the_graph_computes_with(scout, block_size, form):
    rules = everything(Scheme("int4", block_size, "lse"))
    weights = stored(quantized(scout, rules))
    ids = token_ids(1)
    expected = reference_logits(scout.path, ids, weights)
    client = Client(lowered(scout, form, recipe=rules), scout.config, "growing")
    assert relative_error(client.logits(ids, [TOKENS]), expected) <= 1e-4
    name = "model.layers.2.self_attn.q_proj.weight"
    weight = scout.tensors[name].numpy().astype(np.float32)
    absmax = dequantized(everything(Scheme("int4", block_size, "absmax")))(name, weight)
    least = weights(name, weight)
    assert 0 < np.square(least - weight).sum() < 0.95 * np.square(absmax - weight).sum()


@pytest.fixture(scope="module")
def k96(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every K is 96: one and a half blocks of 64, less than one of 128."""
    sizes = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 6}
    return open_checkpoint(write_random_checkpoint(tmp_path_factory.mktemp("k96"), **sizes))


@pytest.mark.parametrize("form", ["portable", "cpu"])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_blocks_that_do_not_divide_k(k96, block_size, form):
    rules = everything(Scheme("int4", block_size, "absmax"))
    model = lowered(k96, form, recipe=rules)
    ids = token_ids(1)
    expected = reference_logits(k96.path, ids, dequantized(rules))
    assert relative_error(Client(model, k96.config, "growing").logits(ids, [TOKENS]), expected) <= 1e-4
    if form == "cpu":
        counts = op_counts(model)
        assert (counts.get("QMoE", 0), counts.get("MoE", 0)) == ((4, 0) if block_size == 32 else (0, 4))
        assert counts["MatMulNBits"] == 28


@pytest.mark.parametrize("form", ["portable", "cpu"])
def test_odd_widths(tmp_path, form):
    """Two 4-bit values a byte, and rows of 33 and 35 of them."""
    checkpoint = open_checkpoint(write_random_checkpoint(tmp_path, intermediate_size=33, intermediate_size_mlp=35))
    rules = everything(Scheme("int4", 32, "absmax"))
    ids = token_ids(1)
    expected = reference_logits(checkpoint.path, ids, dequantized(rules))
    client = Client(lowered(checkpoint, form, recipe=rules), checkpoint.config, "growing")
    assert relative_error(client.logits(ids, [TOKENS]), expected) <= 1e-4


CUSTOM = {
    "only gate_up": recipe(("*.experts.gate_up_proj", Scheme("int4", 32, "absmax"))),
    "only down": recipe(("*.experts.down_proj", Scheme("int4", 32, "absmax"))),
    "gate_up INT4, down FP8": recipe(
        ("*.experts.gate_up_proj", Scheme("int4", 32, "absmax")), ("*.experts.down_proj", Scheme("fp8"))
    ),
    "two block sizes": recipe(
        ("*.experts.gate_up_proj", Scheme("int4", 32, "absmax")),
        ("*.experts.down_proj", Scheme("int4", 64, "absmax")),
    ),
    "head": recipe(("lm_head.weight", Scheme("int4", 64, "absmax"))),
    "router": recipe(("*.router.weight", Scheme("fp8"))),
}


@pytest.mark.parametrize("form", ["portable", "cpu"])
@pytest.mark.parametrize("name", CUSTOM)
def test_custom_recipes(scout, name, form):
    rules = CUSTOM[name]
    model = lowered(scout, form, recipe=rules)
    ids = token_ids(1)
    expected = reference_logits(scout.path, ids, dequantized(rules))
    assert relative_error(Client(model, scout.config, "growing").logits(ids, [TOKENS]), expected) <= 1e-4
    if form == "cpu":
        counts = Counter(op_counts(model))
        assert counts["QMoE"] == 0
        assert counts["MoE"] == 4
        assert counts["MatMulNBits"] == (1 if name == "head" else 0)


@pytest.mark.parametrize("form", ["portable", "cpu"])
def test_tied_embeddings_and_biases(layouts, form):
    checkpoint = layouts["tied with biases"]
    rules = recipe(("*embed_tokens.weight", Scheme("int4")), *((r.pattern, r.scheme) for r in _absmax().rules))
    ids = token_ids(1)
    expected = reference_logits(checkpoint.path, ids, dequantized(_absmax()))
    client = Client(lowered(checkpoint, form, recipe=rules), checkpoint.config, "growing")
    assert relative_error(client.logits(ids, [TOKENS]), expected) <= 1e-4


def _absmax() -> Any:
    return everything(Scheme("int4", 32, "absmax"))


def test_a_weight_that_two_products_share_is_quantized_once(scout):
    model = canonical(scout)
    shared = model.graph.initializers["model.layers.0.self_attn.k_proj.weight"]
    node(model, "layers.0/self_attn/model.layers.0.self_attn.v_proj.weight/cast").replace_input_with(0, shared)
    *_, report = run_passes(model, *CANONICAL, recipe=everything(Scheme("int4", 32, "absmax")))
    assert report.fired == 35
    assert sum(name.startswith("model.layers.0.self_attn.k_proj.weight_int4") for name in model.graph.initializers) == 1


@pytest.mark.parametrize("form", ["functions", "portable", "cpu"])
@pytest.mark.parametrize("name", ["fp8", "fp8-experts"])
def test_fp8_activations_are_transformers_with_rounded_activations(scout, name, form):
    rules = load_recipe(name)
    model = quantized(scout, rules) if form == "functions" else lowered(scout, form, recipe=rules)
    client = Client(model, scout.config, "growing", optimize=form != "functions")
    ids = token_ids(8)
    expected = _rounding_reference(scout.path, ids, rules, linears=name == "fp8")
    actual = client.logits(ids, [TOKENS])
    # The last bit of a sum can decide how an activation is rounded, which changes the rest of that sequence.
    error = np.abs(actual - expected).max(axis=-1) / np.abs(expected).max()
    assert np.median(error) <= 1e-5
    weights_only = reference_logits(scout.path, ids, dequantized(rules))
    assert np.quantile(np.abs(weights_only - expected).max(axis=-1) / np.abs(expected).max(), 0.2) > 1e-3


def _rounding_reference(path: Any, ids: np.ndarray, rules: Any, linears: bool) -> np.ndarray:
    """transformers with E4M3 weights, and the inputs of the products that the recipe names rounded token by token."""
    import torch
    from transformers import Llama4ForCausalLM

    def rounded(x: Any) -> Any:
        values = x.numpy()
        scale = np.abs(values).max(axis=-1, keepdims=True).clip(1e-12) / np.float32(448)
        return torch.from_numpy((values / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale)

    def experts_forward(self: Any, x: Any) -> Any:
        x = x.view(self.num_experts, -1, self.hidden_size)
        gate, up = torch.bmm(rounded(x), self.gate_up_proj).chunk(2, dim=-1)
        return torch.bmm(rounded(up * torch.nn.functional.silu(gate)), self.down_proj).view(-1, self.hidden_size)

    model: Any = Llama4ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    weights = dequantized(rules)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(weights(name, parameter.numpy()))))
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                module.forward = experts_forward.__get__(module)
            elif linears and name.endswith("_proj") and isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
        return model(torch.tensor(ids), use_cache=False).logits.numpy()


def test_activations_stay_float_where_only_one_of_two_has_them(scout):
    rules = recipe(("*.experts.gate_up_proj", Scheme("fp8", activations=True)), ("*.experts.down_proj", Scheme("fp8")))
    model = canonical(scout)
    *_, report = run_passes(model, *CANONICAL, recipe=rules)
    assert report.fired == 8
    reasons = dict(report.skipped)
    assert reasons["layers.0/feed_forward/experts/moe"].startswith("activations stay float: only one of gate_up")
    ids = token_ids(1)
    expected = reference_logits(scout.path, ids, dequantized(rules))
    assert relative_error(Client(model, scout.config, "growing").logits(ids, [TOKENS]), expected) <= 1e-4


def test_padding_and_splits_after_quantization(scout):
    """Quantized is one model, however it is called: the portable and the plain form agree on a padded batch."""
    rules = everything(Scheme("int4", 32, "absmax"))
    plain = outputs(quantized(scout, rules), scout.config)
    assert relative_error(outputs(lowered(scout, "portable", recipe=rules), scout.config), plain) <= 1e-5
    assert relative_error(outputs(lowered(scout, "cpu", recipe=rules), scout.config), plain) <= 1e-4
