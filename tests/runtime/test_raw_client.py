"""What a client can do with an artifact by ONNX Runtime alone: keep a prefix, go back, share it in a batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from tests.runtime.following import Logits, text

Caches = dict[str, np.ndarray]


class Client:
    """The I/O contract of the growing form: what comes out as ``present`` goes in as ``past_key_values``."""

    def __init__(self, artifact: Path) -> None:
        self.session = ort.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
        self.past = [value.name for value in self.session.get_inputs() if value.name.startswith("past_key_values")]
        config = json.loads((artifact / "config.json").read_text())
        self.heads, self.width = config["num_key_value_heads"], config["head_dim"]

    def empty(self, batch: int) -> Caches:
        return {name: np.zeros((batch, self.heads, 0, self.width), np.float32) for name in self.past}

    def run(self, ids: np.ndarray, mask: np.ndarray, caches: Caches) -> tuple[np.ndarray, Caches]:
        """Logits, and all caches with the new tokens; the mask [B, past + new] covers both."""
        names = [output.name for output in self.session.get_outputs()]
        feeds = {"input_ids": ids, "attention_mask": mask, **caches}
        outputs = dict(zip(names, self.session.run(names, feeds), strict=True))
        return outputs.pop("logits"), {name.replace("present", "past_key_values"): a for name, a in outputs.items()}


@pytest.fixture(scope="module", params=["portable", "cpu"])
def client(
    request: pytest.FixtureRequest,
    artifacts: dict[str, Path],
    scout_layout: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Client:
    if request.param == "portable":
        return Client(artifacts["growing"])
    from l4convert.pipeline import ConvertOptions, convert

    out = tmp_path_factory.mktemp("raw") / "cpu"
    convert(ConvertOptions(checkpoint=scout_layout, output=out, target="cpu", recipe="none"))
    return Client(out)


def sliced(caches: Caches, slots: int) -> Caches:
    return {name: np.ascontiguousarray(array[:, :, :slots]) for name, array in caches.items()}


def assert_rows(logits: np.ndarray, texts: list[np.ndarray], reference: Logits) -> None:
    """The last logits of each row are those of transformers for the row's whole text."""
    for row, expected in zip(logits, reference([t.tolist() for t in texts]), strict=True):
        assert np.abs(row[-1] - expected[-1]).max() <= 1e-4 * np.abs(expected[-1]).max()


def ones(rows: int, columns: int) -> np.ndarray:
    return np.ones((rows, columns), np.int64)


@pytest.mark.parametrize("kept", [3, 8, 13, 16, 20])
def test_a_prefix_is_the_first_slots_of_the_caches(kept: int, client: Client, reference: Logits) -> None:
    """Of 21 tokens, within chunks of 8 and at their ends: rollback and reuse of a prefix are the same slice."""
    first, more = text(21), text(6, seed=2)
    _, caches = client.run(first[None], ones(1, 21), client.empty(1))
    logits, _ = client.run(more[None], ones(1, kept + 6), sliced(caches, kept))
    assert_rows(logits, [np.concatenate([first[:kept], more])], reference)


def test_a_batch_continues_one_prefix(client: Client, reference: Logits) -> None:
    """The prefix's caches are repeated; continuations of unequal lengths are padded on the left, then on the right."""
    prefix, more = text(13), [text(7, seed=3), text(4, seed=4), text(1, seed=5)]
    _, caches = client.run(prefix[None], ones(1, 13), client.empty(1))
    shared = {name: np.repeat(array, 3, axis=0) for name, array in caches.items()}
    ids, mask = np.zeros((3, 7), np.int64), np.zeros((3, 7), np.int64)
    for row, tokens in enumerate(more):
        ids[row, 7 - len(tokens) :], mask[row, 7 - len(tokens) :] = tokens, 1
    logits, caches = client.run(ids, np.concatenate([ones(3, 13), mask], axis=1), shared)
    assert_rows(logits, [np.concatenate([prefix, tokens]) for tokens in more], reference)
    token = np.array([[9], [10], [11]])
    logits, _ = client.run(token, np.concatenate([ones(3, 13), mask, ones(3, 1)], axis=1), caches)
    assert_rows(logits, [np.concatenate([prefix, a, b]) for a, b in zip(more, token, strict=True)], reference)


def test_a_zero_in_the_mask_forgets_a_token_of_one_row_alone(client: Client, reference: Logits) -> None:
    """No cache is touched: two rows of a batch go back by different numbers of tokens, one of them across a chunk."""
    first = np.stack([text(18), text(18, seed=2)])
    _, caches = client.run(first, ones(2, 18), client.empty(2))
    mask = ones(2, 18)
    mask[0, 11:] = mask[1, 17:] = 0
    more = np.stack([text(1, seed=3), text(1, seed=4)])
    logits, caches = client.run(more, np.concatenate([mask, ones(2, 1)], axis=1), caches)
    kept = [np.concatenate([first[0, :11], more[0]]), np.concatenate([first[1, :17], more[1]])]
    assert_rows(logits, kept, reference)
    several = np.stack([text(5, seed=5), text(5, seed=6)])
    logits, _ = client.run(several, np.concatenate([mask, ones(2, 6)], axis=1), caches)
    assert_rows(logits, [np.concatenate([a, b]) for a, b in zip(kept, several, strict=True)], reference)
