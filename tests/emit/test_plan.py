"""Planned offsets: pages, fillers, order, groups; against the safetensors library."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from l4convert.checkpoint.combiners import InterleavedHalves, Mapped, Reshaped, cast, transposed
from l4convert.checkpoint.lazy import Constant
from l4convert.checkpoint.pages import PageBudget
from l4convert.emit.blocks import Blocks
from l4convert.emit.fill import Filling, write_weights
from l4convert.emit.header import PAGE, Entry, align, encode_header
from l4convert.emit.jobs import count_jobs, group_jobs, plan_jobs
from l4convert.emit.plan import EXTERNAL_FROM_BYTES, FILLER_PREFIX, PlannedTensor, plan_weights
from l4convert.errors import InputError
from l4convert.plugins.moe.layout import GROUP, K_ORDER
from l4convert.quantization.fp8 import quantize_fp8
from l4convert.quantization.int4 import quantize_int4
from l4convert.quantization.layouts import long_words, matmul_nbits, ordered_words, qmoe
from tests.emit.models import NUMPY_DTYPES, Weight, holder, initializer, values

TENSORS = st.lists(
    st.tuples(st.sampled_from(list(NUMPY_DTYPES)), st.lists(st.integers(1, 40), min_size=1, max_size=3)),
    max_size=8,
)


def _computed(group: tuple[PlannedTensor, ...]) -> list[int]:
    """Compute the jobs of a group; sizes of their pieces."""
    jobs = list(group_jobs(group, 5))
    assert [job.index for job in jobs] == list(range(5, 5 + count_jobs(group)))
    sizes = [len(piece.compute()) for job in jobs for piece in job.pieces]
    assert sizes == [piece.nbytes for job in jobs for piece in job.pieces]
    return sizes


def _names(path: Path) -> list[str]:
    with safe_open(path, "np") as file:
        return sorted(name for name in file.keys() if not name.startswith(FILLER_PREFIX))  # noqa: SIM118  # no mapping


@settings(max_examples=60)
@given(TENSORS)
def test_any_set_of_tensors_is_a_valid_page_aligned_file(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[Any]
) -> None:
    arrays = {f"t{i}": values(dtype, shape, i) for i, (dtype, shape) in enumerate(shapes)}
    lazy = {name: Weight(array, name) for name, array in arrays.items()}
    plan = plan_weights(holder(dict(lazy)))
    path = tmp_path_factory.mktemp("plan") / "model.safetensors"
    write_weights(path, plan)
    assert path.stat().st_size == plan.total_bytes
    external = [name for name, tensor in lazy.items() if tensor.nbytes >= EXTERNAL_FROM_BYTES]
    assert _names(path) == sorted(external)  # opening it makes the library check gaps, sizes and dtypes
    data = path.read_bytes()
    for planned in plan.tensors:
        assert planned.offset % PAGE == 0
        stored = data[planned.offset : planned.offset + planned.nbytes]
        assert stored == ir.tensor(arrays[planned.name]).tobytes()  # onnx_ir's own packing of 4-bit types
    covered = sum(planned.nbytes for planned in plan.tensors) + len(plan.header)
    assert plan.total_bytes - covered < PAGE * max(1, len(external))


def test_the_safetensors_library_reads_the_values_back(tmp_path: Path) -> None:
    kinds = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64, ir.DataType.UINT8, ir.DataType.BOOL)
    arrays = {dtype.name: values(dtype, [33, 35], dtype) for dtype in kinds}
    write_weights(tmp_path / "w", plan_weights(holder({name: Weight(array) for name, array in arrays.items()})))
    with safe_open(tmp_path / "w", "np") as file:
        for name, array in arrays.items():
            read = file.get_tensor(name)
            assert read.dtype == array.dtype
            np.testing.assert_array_equal(read, array)


def test_types_without_a_safetensors_name_are_stored_as_bytes(tmp_path: Path) -> None:
    array = values(ir.DataType.INT4, [64, 64])
    write_weights(tmp_path / "w", plan_weights(holder({"q": Weight(array)})))
    with safe_open(tmp_path / "w", "np") as file:
        packed = file.get_tensor("q")
    assert packed.dtype == np.uint8
    assert packed.shape == (2048,)
    np.testing.assert_array_equal((packed & 0xF).astype(np.int8), array.astype(np.int8).reshape(-1)[0::2] & 0xF)
    np.testing.assert_array_equal((packed >> 4).astype(np.int8), array.astype(np.int8).reshape(-1)[1::2] & 0xF)


def test_fp8_and_bf16_keep_their_safetensors_types() -> None:
    kinds = (ir.DataType.FLOAT8E4M3FN, ir.DataType.BFLOAT16)
    plan = plan_weights(holder({dtype.name: Weight(values(dtype, [64, 64])) for dtype in kinds}))
    header = json.loads(plan.header[8:])
    assert {name: field["dtype"] for name, field in header.items()} == {"FLOAT8E4M3FN": "F8_E4M3", "BFLOAT16": "BF16"}


def test_small_initializers_stay_in_the_graph_and_order_is_the_graphs() -> None:
    zeros = {"z": (64, 64), "tiny": (4,), "a": (64, 65), "m": (300,)}
    model = holder({name: Weight(np.zeros(shape, np.float32), name) for name, shape in zeros.items()})
    assert [planned.name for planned in plan_weights(model).tensors] == ["z", "a", "m"]


def test_fillers_only_follow_tensors_that_end_inside_a_page() -> None:
    zeros = {"whole": (1024,), "part": (1025,), "whole2": (2048,), "last": (300,)}
    model = holder({name: Weight(np.zeros(shape, np.float32), name) for name, shape in zeros.items()})
    header = json.loads(plan_weights(model).header[8:])
    assert list(header) == ["whole", "part", "__padding__.0", "whole2", "last"]


def test_no_external_tensor_gives_a_valid_empty_file(tmp_path: Path) -> None:
    write_weights(tmp_path / "w", plan_weights(holder({})))
    assert _names(tmp_path / "w") == []


def test_one_tensor_under_two_names_is_stored_once() -> None:
    shared = Weight(np.zeros((64, 64), np.float32))
    model = holder({"embedding": shared})
    model.graph.initializers["head"] = initializer("head", shared)
    (planned,) = plan_weights(model).tensors
    assert planned.name == "embedding"
    assert [value.name for value in planned.values] == ["embedding", "head"]


def test_reserved_names_are_renamed() -> None:
    zeros = {"__padding__.0": Weight(np.zeros(300, np.float32)), "__metadata__": Weight(np.zeros(301, np.float32))}
    header = json.loads(plan_weights(holder(dict(zeros))).header[8:])
    assert list(header) == ["padding__.0", "__padding__.0", "metadata__"]


def test_tensors_of_the_same_rows_are_neighbours_and_computed_in_step() -> None:
    rows, columns, log = 4096, 2048, list[str]()
    values_ = Weight(np.zeros((rows, columns), np.uint8), "experts", log)
    scales = Weight(np.zeros((rows, columns // 32), np.float32), "experts", log)
    other = Weight(np.zeros((64, 64), np.float32), "other", log)
    plan = plan_weights(holder({"q": values_, "other": other, "s": scales}))
    assert [planned.name for planned in plan.tensors] == ["q", "s", "other"]
    _computed(plan.groups[0])
    assert log == ["q:0:0", "s:0:0", "q:0:2048", "s:0:2048"]


class Counted(Weight):
    """Counts the elements that are computed."""

    read = 0

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        Counted.read += (rows.stop - rows.start) * (cols.stop - cols.start)
        return super().tile(batch, rows, cols)


LAYOUTS = ["plain", "transposed", "matmul_nbits", "qmoe", "qmoe_interleaved", "fp8", "words", "fp8 words"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantized_values_and_scales_read_their_weight_once(layout: str) -> None:
    weight = Counted(np.ones((2, 3000, 2048), np.float32).astype("bfloat16"), "w")  # more than a tile each
    source = Reshaped(weight, (6000, 2048)) if layout == "matmul_nbits" else weight
    q, s = quantize_fp8(source) if "fp8" in layout else quantize_int4(source, 32, "absmax")
    if layout == "qmoe_interleaved":
        q, s = InterleavedHalves(q), InterleavedHalves(s)
    if layout == "transposed":  # a row of scales for 32 of values
        q, s = transposed(q), transposed(s)
    if layout == "matmul_nbits":
        q = matmul_nbits(q, 32)
    elif layout.startswith("qmoe"):
        q = qmoe(q)
    elif layout.endswith("words"):  # scales have a row for each block inside the rows of the words
        q, s = long_words(q) if "fp8" in layout else ordered_words(q, GROUP, K_ORDER), transposed(s)
    (group,) = plan_weights(holder({"q": q, "s": s})).groups
    Counted.read = 0
    assert sum(_computed(group)) == q.nbytes + s.nbytes
    assert Counted.read == weight.size


def test_a_tensor_written_by_columns_is_the_same_file_however_it_is_filled(tmp_path: Path) -> None:
    """Two of three jobs were done before; the digests follow the file, not the jobs."""
    array = np.random.default_rng(0).standard_normal((2, 1024, 8192)).astype(np.float32)
    values_, scales = quantize_int4(Weight(array, "w"), 64, "absmax")
    tensors = {"q": ordered_words(values_, GROUP, K_ORDER), "s": cast(transposed(scales), ir.DataType.FLOAT16)}
    plan = plan_weights(holder(tensors))
    (group,) = plan.groups
    assert count_jobs(group) == 4
    filled = write_weights(tmp_path / "w", plan, filling=Filling(jobs=2))
    data = (tmp_path / "w").read_bytes()
    for planned in group:
        stored = data[planned.offset : planned.offset + planned.nbytes]
        assert stored == tensors[planned.name].tobytes()
        assert filled.tensors[planned.name]["sha256"] == hashlib.sha256(stored).hexdigest()
    assert filled.file["sha256"] == hashlib.sha256(data).hexdigest()
    with (tmp_path / "w").open("r+b") as file, contextlib.closing(PageBudget(1 << 30)) as pages:
        blocks = Blocks("w", file.fileno(), pages)
        done = [blocks.do(job, None) for job in plan_jobs(plan)]
        file.seek(group[1].offset + 2 * 600)  # a scale of column 600: the second job
        file.write(b"??")
        file.flush()
        again = [blocks.do(job, before.digest) for job, before in zip(plan_jobs(plan), done, strict=True)]
    assert [job.resumed for job in again] == [True, False, True, True]
    assert (tmp_path / "w").read_bytes() == data


def test_the_order_is_that_of_use_wherever_a_graph_lists_its_initializers() -> None:
    model = holder({name: Weight(np.zeros((16, 32), np.float32), name) for name in ("c", "a", "unused", "b")})
    node = model.graph[0]
    for name in ("a", "b", "c"):
        value = model.graph.initializers[name]
        model.graph.insert_before(node, ir.node("Identity", [value]))
    assert [planned.name for planned in plan_weights(model).tensors] == ["a", "b", "c", "unused"]


def test_constants_and_in_memory_tensors_are_groups_of_their_own() -> None:
    tensors = {"a": Constant(np.zeros(400, np.float32)), "b": ir.tensor(np.zeros(400, np.float32))}
    plan = plan_weights(holder(tensors))
    assert [len(group) for group in plan.groups] == [1, 1]
    assert [size for group in plan.groups for size in _computed(group)] == [1600, 1600]


def test_planning_reads_no_weight() -> None:
    def explode(tile: np.ndarray) -> np.ndarray:
        raise AssertionError("read")

    part = Weight(np.zeros((64, 64), np.float32))
    assert plan_weights(holder({"w": Mapped(part, explode, ir.DataType.FLOAT)})).total_bytes == 2 * PAGE + 3 * PAGE


def test_plans_beyond_memory_are_made_at_once() -> None:
    class Huge(Weight):
        def __init__(self) -> None:
            super().__init__(np.zeros(0, np.float32))
            self.dims, self.shape = (128, 5120, 16384), ir.Shape((128, 5120, 16384))

    (planned,) = plan_weights(holder({"experts": Huge()})).tensors
    assert planned.nbytes == 128 * 5120 * 16384 * 4


def test_encode_header_pads_to_pages_and_refuses_what_readers_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    header = encode_header([Entry("a", "U8", (10,), 0, 10)])
    assert len(header) == PAGE == align(1) == align(PAGE)
    assert int.from_bytes(header[:8], "little") == PAGE - 8
    monkeypatch.setattr("l4convert.emit.header.MAX_HEADER_BYTES", 100)
    with pytest.raises(InputError, match="over the format's 100"):
        encode_header([Entry("a", "U8", (10,), 0, 10)])
