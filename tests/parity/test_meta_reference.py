"""Meta's own model as the reference: it loads what its code loads, and nothing of it is changed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from l4convert.checkpoint import open_checkpoint
from l4convert.errors import BackendMissing, InputError
from l4convert.parity.meta_reference import MetaReference, gloo
from l4convert.parity.open_reference import open_reference
from tests.meta_checkpoints import (
    MAVERICK,
    QUANTIZED,
    SCOUT,
    published,
    quantize_impls,
    random_state,
    write_meta,
    write_quantized,
)

IDS = np.random.default_rng(0).integers(0, 2000, 37)


def meta_logits(params: Any, state: Any, ids: Any) -> Any:
    """Meta's model with a state dict of its own modules' names, as one would run it by hand."""
    from llama_models.llama4.args import ModelArgs
    from llama_models.llama4.datatypes import TransformerInput
    from llama_models.llama4.model import Transformer

    with gloo():
        model = Transformer(ModelArgs(**params, max_batch_size=1, max_seq_len=len(ids)))
    model.load_state_dict({name: value.float() for name, value in state.items()})
    with torch.no_grad():
        return model(TransformerInput(tokens=torch.from_numpy(ids)[None], tokens_position=0)).logits[0].numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(tmp_path_factory.mktemp("meta") / "ckpt", SCOUT, shards=2)


@pytest.mark.parametrize(("params", "shards", "dense"), [(SCOUT, 4, "w"), (MAVERICK, 2, "fc"), (MAVERICK, 1, "w")])
def test_logits_are_those_of_metas_model(tmp_path: Path, params: Any, shards: int, dense: str) -> None:
    state = random_state(params)
    path = write_meta(tmp_path / "ckpt", params, published(state, dense=dense), shards)
    with open_reference(path) as reference:
        assert isinstance(reference, MetaReference)
        np.testing.assert_array_equal(reference.logits(IDS), meta_logits(params, state, IDS))
        assert reference.name.startswith("llama-models ")


def test_steps_of_any_size_and_batches_give_the_logits_of_the_whole_text(folder: Path) -> None:
    with open_reference(folder) as reference:
        whole, stream = reference.logits(IDS), reference.stream()
        steps = [stream.step(IDS[begin:end]) for begin, end in ((0, 1), (1, 9), (9, 16), (16, 37))]
        np.testing.assert_allclose(np.concatenate(steps), whole, atol=1e-5)
        np.testing.assert_allclose(reference.shifted(IDS[:8], 0), whole[:8], atol=1e-5)


def test_longer_texts_than_the_caches_make_them_longer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_reference(folder) as reference:
        expected = reference.logits(IDS)
    monkeypatch.setattr("l4convert.parity.meta_reference._FIRST_LENGTH", 8)
    with open_reference(folder) as reference:
        reference.logits(IDS[:3])
        np.testing.assert_array_equal(reference.logits(IDS), expected)


def test_angles_in_float64_change_nothing_near_the_beginning(folder: Path) -> None:
    own, exact = (open_reference(folder, exact_angles=choice) for choice in (False, True))
    np.testing.assert_allclose(exact.logits(IDS), own.logits(IDS), atol=1e-5)
    far = 2**23  # RoPE is relative: in exact arithmetic a text's logits are the same at any multiple of the chunk size
    near = exact.logits(IDS[:8])
    assert np.abs(exact.shifted(IDS[:8], far) - near).max() < 1e-4 < np.abs(own.shifted(IDS[:8], far) - near).max()


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_quantized_experts_are_dequantized_by_metas_formulas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from tests.checkpoint.test_meta_experts import codes_of

    impls = quantize_impls(monkeypatch)
    state = random_state(QUANTIZED)
    path = write_quantized(tmp_path / "ckpt", kind, impls)
    for layer in (1, 2):
        for name in ("w1", "w2", "w3"):
            key = f"layers.{layer}.feed_forward.experts.{name}"
            codes, scales = codes_of(state[key].transpose(1, 2), kind, impls)
            spread = scales.repeat_interleave(codes.shape[-1] // scales.shape[-1], -1)
            state[key] = (codes.float() * spread).transpose(1, 2)
    ids = IDS % QUANTIZED["vocab_size"]
    np.testing.assert_array_equal(open_reference(path).logits(ids), meta_logits(QUANTIZED, state, ids))


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_reference(folder)
    assert capfd.readouterr().out == ""


def test_tensor_cuda_is_given_back(folder: Path) -> None:
    before = torch.Tensor.cuda
    open_reference(folder)
    assert torch.Tensor.cuda is before
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("module", ["llama_models.llama4", "fairscale"])
def test_a_missing_library_is_named_with_its_install_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendMissing, match="pip install llama-models fairscale"):
        open_reference(folder)


def test_what_metas_code_does_not_take_is_an_error(tmp_path: Path) -> None:
    """Its resharding does not know its own modules' names for experts, only those of published files."""
    params = {**SCOUT, "n_layers": 1}
    path = write_meta(tmp_path / "ckpt", params, published(random_state(params)), 2)
    for file in path.glob("*.pth"):
        state = torch.load(file, weights_only=False)
        key = "layers.0.feed_forward.w_in_shared_FD.weight"
        state["layers.0.feed_forward.shared_expert.w1.weight"] = state.pop(key)
        torch.save(state, file)
    assert len(open_checkpoint(path).tensors) == 15
    with pytest.raises(InputError, match="Meta's code cannot load it"):
        open_reference(path)
