"""The TensorRT plugins: their contract, by the conformance program, and their calls, on the interpreter's GPU."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l4convert.errors import DeviceError, InputError
from l4convert.plugins.library import native
from l4convert.plugins.library.calling import PluginCall, Tensor
from l4convert.plugins.library.checking import check_library
from l4convert.plugins.library.support import Attribute, missing_support
from l4convert.plugins.long_context_attention import definition
from l4convert.plugins.long_context_attention.definition import AttentionSpec
from l4convert.plugins.moe.packed import PackedMoESpec
from tests.plugins import attention_cases, moe
from tests.plugins.stand_in import StandIn

LARGEST_ERROR = 1e-2  # of issue 6, for bfloat16
CASES = 11


def test_every_method_keeps_the_contract(interpreted_library: native.Library) -> None:
    report = check_library(interpreted_library.path)
    assert [check for check in report["checks"] if not check["ok"]] == []
    counts = Counter(check["name"] for check in report["checks"])
    assert Counter(counts.values()) == {CASES: 19, 1: 3}
    assert counts["serialize, create again, equal"] == CASES


def test_the_library_of_five_gpus_keeps_it_too(built_library: Path) -> None:
    """That one is for bfloat16 only: nothing is asked of it for float16."""
    report = check_library(built_library)
    assert [check for check in report["checks"] if not check["ok"]] == []
    subjects = {check["subject"] for check in report["checks"]}
    assert {"INT4 experts, blocks of 128", "FP8 experts", "chunked layer, FP8 caches"} <= subjects
    assert not any("float16" in subject for subject in subjects)


def test_a_library_without_kernels_fails_and_says_what_builds_them(demo_library: native.Library) -> None:
    report = check_library(demo_library.path)
    wrong = [check["wrong"] for check in report["checks"] if not check["ok"]]
    assert report["failed"] == len(wrong) > 0
    assert all("l4convert plugins build" in text for text in wrong), wrong


def test_the_program_shows_a_table_and_ends_with_4(demo_library: native.Library) -> None:
    program = demo_library.path.parent / "l4convert_conformance"
    done = subprocess.run([program, demo_library.path], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert re.search("^is created, with three faces +FAILED  0 of 6$", done.stdout, re.MULTILINE)
    assert subprocess.run([program], capture_output=True, check=False).returncode == 2


def attributes_of(spec: Any) -> dict[str, Attribute]:
    return {name: int(value) if isinstance(value, bool) else value for name, value in asdict(spec).items()}


def run_plugin(
    gpu: StandIn, plugin: str, attributes: dict[str, Attribute], inputs: Sequence[np.ndarray], in_place: bool
) -> list[np.ndarray]:
    """What a plugin gives, all its buffers watched; the types that it takes are those of the arrays."""
    gpu.make_current()
    with PluginCall(gpu.library.path, plugin, attributes, [array.shape for array in inputs]) as call:
        assert call.inputs == tuple(Tensor(array.dtype.name, array.shape) for array in inputs)
        given = [gpu.upload(array) for array in inputs]
        results = [
            given[alias] if alias is not None and in_place else gpu.empty(tensor.shape, np.dtype(tensor.dtype))
            for alias, tensor in zip(call.aliases, call.outputs, strict=True)
        ]
        workspace = gpu.empty((max(call.workspace, 1),), np.uint8, "workspace")
        addresses = [buffer.address for buffer in given], [buffer.address for buffer in results]
        gpu.call(lambda: call.enqueue(*addresses, workspace.address))
        return [buffer.numpy().astype(np.float32) for buffer in results]


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


CHUNKED, GLOBAL = attention_cases.CHUNKED, attention_cases.GLOBAL


@pytest.mark.parametrize(
    ("spec", "past", "new", "in_place"),
    [
        (CHUNKED, [31, 7], [1, 1], True),
        (replace(CHUNKED, compute="float16"), [0, 33], [9, 4], False),
        (replace(GLOBAL, kv_dtype="fp8"), [40, 3], [1, 1], True),
        (replace(GLOBAL, kv_dtype="int8"), [20, 5], [6, 8], True),
    ],
    ids=["decode, chunked", "prefill over a border, separate caches", "decode, FP8 caches", "prefill, INT8 caches"],
)
def test_attention_equals_the_function_body(
    gpu: StandIn, spec: AttentionSpec, past: list[int], new: list[int], in_place: bool
) -> None:
    positions = attention_cases.positions_of(past, new, max(new))
    call = attention_cases.make_call(spec, positions, max(new), spec.chunk_size or 64)
    inputs = [getattr(call, name) for name in definition.input_names(spec)]
    results = run_plugin(gpu, definition.OP_TYPE, attributes_of(spec), inputs, in_place)
    wanted = attention_cases.expected(call)
    real = call.new_positions >= 0
    assert relative_error(results[0][real], wanted.attention[real]) < LARGEST_ERROR
    for cache, body in zip(results[1:], (wanted.present_key, wanted.present_value), strict=True):
        assert relative_error(cache, body) < LARGEST_ERROR


@pytest.mark.parametrize(
    ("weights", "tokens", "top_k", "blocks", "compute", "bound"),
    [
        ("int4", 3, 1, (32, 64), moe.BF16, LARGEST_ERROR),
        ("int4", 70, 2, (128, 128), moe.FP16, LARGEST_ERROR),
        ("plain", 9, 1, (0, 0), moe.BF16, LARGEST_ERROR),
        ("fp8", 7, 1, (128, 128), moe.BF16, 3 * LARGEST_ERROR),  # a code apart where the body rounds otherwise
    ],
)
def test_experts_equal_the_function_body(
    gpu: StandIn, weights: str, tokens: int, top_k: int, blocks: tuple[int, int], compute: Any, bound: float
) -> None:
    case = moe.make_case(weights, tokens, 4, 128, 128, top_k, blocks, compute)
    attributes = attributes_of(case.spec)
    inputs = [case.x, case.logits, case.gate_up.stored, case.down.stored]
    if weights != "plain":
        blocks_of = {"gate_up_block": case.gate_up.block, "down_block": case.down.block}
        attributes = attributes_of(PackedMoESpec(**vars(case.spec), weights=weights, **blocks_of))
        words = {"int4": np.int32, "fp8": np.int64}[weights]
        pairs = ((each.packed.view(words), each.scale) for each in (case.gate_up, case.down))
        inputs = [case.x, case.logits, *(array for pair in pairs for array in pair if array is not None)]
    [y] = run_plugin(gpu, "MoE", attributes, inputs, in_place=True)
    assert moe.relative_error(y, case.expected) < bound


def test_refusals_name_what_is_wrong(gpu: StandIn) -> None:
    spec, path = CHUNKED, gpu.library.path
    shapes = [(1, 2, 80), (1, 2, 16), (1, 2, 16), (1, 1, 32, 16), (1, 1, 32, 16), (1, 9), (32, 8), (32, 8)]
    short = [*shapes[:3], (1, 1, 8, 16), (1, 1, 8, 16), *shapes[5:]]
    for given, said in [
        (shapes[:-1], "has 7 inputs and 3 outputs; with these fields 8 and 3 are needed"),
        ([(1, 2, 96), *shapes[1:]], r"query \[1, 2, 96\]: dimension 2 is not 80"),
        (short, "the cache has 8 slots, fewer than the 9 that 9 tokens may need"),
    ]:
        with pytest.raises(InputError, match=said):
            PluginCall(path, "LongContextAttention", attributes_of(spec), given)
    with pytest.raises(InputError, match="the library has no plugin Sort"):
        PluginCall(path, "Sort", {}, [])
    with PluginCall(path, "LongContextAttention", attributes_of(spec), shapes) as call:
        gpu.make_current(context=False)
        with pytest.raises(DeviceError, match=r"^LongContextAttention: no CUDA context is current in this thread$"):
            call.enqueue([0] * 8, [0] * 3, 0)


@pytest.mark.parametrize(
    ("changes", "sm", "said"),
    [
        ({}, 90, None),
        ({}, 86, None),
        ({"head_dim": 256}, 90, "d256 for SM 90.*plugins build.*--head-dim 256 .*--compute bf16"),
        ({}, 75, "SM 75"),
        ({"compute": "float32"}, 90, '"compute" is "float32", which the plugin does not know'),
        ({"kv_dtype": "int4"}, 90, '"kv_dtype" is "int4"'),
        ({"unheard_of": 1}, 90, '"unheard_of" is not known'),
    ],
)
def test_a_library_says_what_it_lacks(
    interpreted_library: native.Library, changes: dict[str, Attribute], sm: int, said: str | None
) -> None:
    why = missing_support(interpreted_library.path, "LongContextAttention", attributes_of(CHUNKED) | changes, sm)
    assert (why is None) == (said is None)
    assert said is None or re.search(said, why or ""), why
