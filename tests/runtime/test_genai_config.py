"""What GenAI makes of the configuration is tested in tests/interop; here are cases that its models do not show."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from l4convert.checkpoint.config import LayerConfig
from l4convert.errors import UsageError
from l4convert.quantization.kv import kv_scheme
from l4convert.runtime.genai_config import genai_config
from tests import shapes

CHUNKED = LayerConfig(rope=True, chunked=True, moe=True)
GLOBAL = LayerConfig(rope=False, chunked=False, moe=True)
SCOUT = dataclasses.replace(shapes.SCOUT, layers=(CHUNKED, CHUNKED, CHUNKED, GLOBAL))


def test_static_shares_buffers_and_bounds_them() -> None:
    made = genai_config(SCOUT, "static")
    assert made["search"] == {"max_length": 32768, "past_present_share_buffer": True}
    window = made["model"]["decoder"]["sliding_window"]
    assert window["window_size"] + window["cache_slack"] == SCOUT.attention_chunk_size
    assert window["layers"] == [0, 1, 2]


def test_growing_is_bounded_by_the_context_only() -> None:
    made = genai_config(SCOUT, "growing")
    assert made["search"] == {"max_length": 10485760, "past_present_share_buffer": False}
    assert "sliding_window" not in made["model"]["decoder"]


def test_target_cuda_runs_on_cuda_without_graphs() -> None:
    options = [genai_config(SCOUT, "static", target=t)["model"]["decoder"]["session_options"] for t in ("cpu", "cuda")]
    assert [o["provider_options"] for o in options] == [[], [{"cuda": {"enable_cuda_graph": "0"}}]]


def test_model_without_chunks_has_no_window() -> None:
    plain = dataclasses.replace(SCOUT, layers=(GLOBAL, GLOBAL))
    assert "sliding_window" not in genai_config(plain, "static")["model"]["decoder"]


def test_static_length_is_never_beyond_the_context() -> None:
    short = dataclasses.replace(SCOUT, max_position_embeddings=1000, attention_chunk_size=128)
    assert genai_config(short, "static")["search"]["max_length"] == 1000


def test_windowed_cache_is_refused() -> None:
    with pytest.raises(UsageError, match="windowed"):
        genai_config(SCOUT, "windowed")


@pytest.mark.parametrize(
    ("model", "given", "bos", "eos", "pad"),
    [
        pytest.param({}, {}, 200000, [200001, 200007, 200008], 200018, id="model"),
        pytest.param({}, {"bos_token_id": 4, "eos_token_id": 5, "pad_token_id": 6}, 4, [5], 6, id="generation config"),
        pytest.param({"pad_token_id": None}, {}, 200000, [200001, 200007, 200008], 200001, id="no pad"),
        pytest.param(
            {"pad_token_id": -1, "bos_token_id": None, "eos_token_ids": ()}, {}, None, None, 202047, id="none"
        ),
    ],
)
def test_token_ids(
    model: Mapping[str, Any], given: Mapping[str, Any], bos: int | None, eos: list[int] | None, pad: int
) -> None:
    made = genai_config(dataclasses.replace(SCOUT, **model), "growing", given)["model"]
    assert (made.get("bos_token_id"), made.get("eos_token_id"), made["pad_token_id"]) == (bos, eos, pad)


def test_sampling_defaults_are_carried_over() -> None:
    given = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "transformers_version": "5.0"}
    search = genai_config(SCOUT, "growing", given)["search"]
    assert search["do_sample"] is True
    assert (search["temperature"], search["top_p"]) == (0.6, 0.9)
    assert search.keys() == {"max_length", "past_present_share_buffer", "do_sample", "temperature", "top_p"}


def test_growing_caches_of_int4_have_half_the_head_size() -> None:
    """GenAI allocates them by it; static ones have the widths that the graph says."""

    def head_size(kv_cache: str, dtype: str) -> int:
        made = genai_config(SCOUT, kv_cache, scheme=kv_scheme(dtype))
        size: int = made["model"]["decoder"]["head_size"]
        return size

    assert [head_size("growing", dtype) for dtype in ("fp8", "int8", "int4")] == [128, 128, 64]
    assert head_size("static", "int4") == 128
