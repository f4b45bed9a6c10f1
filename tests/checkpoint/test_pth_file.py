"""Files of torch.save: every tensor's bytes equal what torch.load reads, and damaged files are refused by name."""

from __future__ import annotations

import io
import math
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l4convert.checkpoint.pth_file import open_pth
from tests.checkpoint.refusals import assert_refused

DTYPES = (
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
    torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip


def raw(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) if tensor.numel() else b""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_every_dtype_equal_what_torch_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    values = (torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    torch.save({"x": values, "scalar": values[0, 0, 0]}, tmp_path / "x.pth")
    found, theirs = open_pth(tmp_path / "x.pth").tensors, torch.load(tmp_path / "x.pth")
    assert {key: (t.dims, t.tobytes()) for key, t in found.items()} == {
        key: (tuple(t.shape), raw(t)) for key, t in theirs.items()
    }


VIEWS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda t: t,
    "rows": lambda t: t[1:3],
    "one": lambda t: t[2],
    "turned": lambda t: t.transpose(-1, -2),
    "flat": lambda t: t.flatten(),
    "an axis more": lambda t: t[None],
    "a turned row": lambda t: t[1:2].transpose(-1, -2),
    "nothing": lambda t: t[:0],
}


@given(st.lists(st.sampled_from(list(VIEWS)), min_size=1, max_size=4), st.booleans(), st.integers(1, 5))
@settings(max_examples=40)
def test_views_that_share_a_storage_equal_what_torch_loads(views: list[str], parameter: bool, width: int) -> None:
    base = torch.arange(4 * 3 * width, dtype=torch.float32).reshape(4, 3, width)
    state = {f"{number} {view}": VIEWS[view](base) for number, view in enumerate(views)}
    if parameter:
        state = {key: torch.nn.Parameter(value) for key, value in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "x.pth")
        found = open_pth(Path(folder) / "x.pth").tensors
        assert list(found) == list(state)
        for key, value in state.items():
            np.testing.assert_array_equal(found[key].numpy(), value.detach().numpy())


def test_a_tile_is_a_view_of_the_file_and_nothing_else_is_read(tmp_path: Path) -> None:
    values = torch.arange(60.0).reshape(3, 4, 5)
    torch.save({"x": values}, tmp_path / "x.pth")
    tile = open_pth(tmp_path / "x.pth").tensors["x"].tile(2, slice(1, 3), slice(0, 2))
    np.testing.assert_array_equal(tile, values[2, 1:3, 0:2])
    with pytest.raises(ValueError, match="read-only"):
        tile[0, 0] = 1.0


def test_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(2), "e": io.BytesIO(b"1"), "n": None, "d": {"a": 1}}, tmp_path / "x.pth")
    assert open_pth(tmp_path / "x.pth").others == ("e", "n", "d")


@pytest.mark.parametrize("view", [lambda t: t[:, :2], lambda t: t.expand(2, 4, 6), lambda t: t[::2]])
def test_views_with_gaps_are_refused_with_what_to_do(tmp_path: Path, view: Callable[[Any], Any]) -> None:
    torch.save({"w": view(torch.zeros(4, 6))}, tmp_path / "x.pth")
    assert_refused(lambda: open_pth(tmp_path / "x.pth"), ["x.pth", "'w'", "strides", ".contiguous()"])


@pytest.mark.parametrize(
    "value",
    [torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.complex128), torch.nn.Linear(1, 1), [1], {1: 2}, print],
)  # fmt: skip
def test_other_kinds_of_values_are_refused(tmp_path: Path, value: Any) -> None:
    torch.save({"w": value}, tmp_path / "x.pth")
    assert_refused(lambda: open_pth(tmp_path / "x.pth"), ["x.pth", "data.pkl"])


def test_old_files_are_refused_with_how_to_save_them_again(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert_refused(lambda: open_pth(tmp_path / "x.pth"), ["x.pth", "before 1.6", "torch.save"])


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "x.pth")
    assert_refused(lambda: open_pth(tmp_path / "x.pth"), ["x.pth"])


def rewritten(path: Path, change: Callable[[dict[str, bytes]], Any]) -> Path:
    """A file of torch.save with other entries, in an archive of zipfile's."""
    torch.save({"w": torch.arange(6.0).reshape(2, 3), "v": torch.arange(4)}, path)
    with zipfile.ZipFile(path) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return path


def edited(old: bytes, new: bytes) -> Callable[[dict[str, bytes]], Any]:
    def change(entries: dict[str, bytes]) -> None:
        assert old in entries["x/data.pkl"]
        entries["x/data.pkl"] = entries["x/data.pkl"].replace(old, new, 1)

    return change


def flattened(entries: dict[str, bytes]) -> None:
    """Sizes that are huge, with strides that stay at the first element."""
    pickle = entries["x/data.pkl"]
    at = pickle.index(b"K\x02K\x03\x86")
    begin, end = at + 5, at + 7  # a BINPUT between sizes and strides
    huge = b"\x8a\x08" + b"\xff" * 7 + b"\x7f"
    assert pickle[end : end + 5] == b"K\x03K\x01\x86"
    entries["x/data.pkl"] = pickle[:at] + huge * 2 + b"\x86" + pickle[begin:end] + b"K\0K\0\x86" + pickle[end + 5 :]


DAMAGE: dict[str, tuple[Callable[[dict[str, bytes]], Any], list[str]]] = {
    "no pickle": (lambda e: e.pop("x/data.pkl"), ["data.pkl"]),
    "no storage": (lambda e: e.pop("x/data/0"), ["'w'", "missing"]),
    "a short storage": (lambda e: e.update({"x/data/0": b"1" * 20}), ["'w'", "24", "20"]),
    "a long storage": (lambda e: e.update({"x/data/0": b"1" * 28}), ["'w'", "24", "28"]),
    "big endian": (lambda e: e.update({"x/byteorder": b"big"}), ["byte order", "little"]),
    "another byte order": (lambda e: e.update({"x/byteorder": b"little\0"}), ["byte order"]),
    "a long byte order": (lambda e: e.update({"x/byteorder": b"l" * 1000}), ["byteorder"]),
    "no version": (lambda e: e.pop("x/version"), ["version"]),
    "version 0": (lambda e: e.update({"x/version": b"0"}), ["version"]),
    "version 99": (lambda e: e.update({"x/version": b"99"}), ["version"]),
    "version x": (lambda e: e.update({"x/version": b"x"}), ["version"]),
    "version in other digits": (lambda e: e.update({"x/version": "\u0663".encode()}), ["version"]),
    "code": (lambda e: e.update({"x/code/a.py": b"1"}), ["code/a.py"]),
    "an entry of another folder": (lambda e: e.update({"y/data/9": b"1"}), ["y/data/9"]),
    "an entry outside": (lambda e: e.update({"../data/9": b"1"}), ["../data/9"]),
    "an absolute entry": (lambda e: e.update({"/etc/data/9": b"1"}), ["/etc/data/9"]),
    "a storage with a name": (lambda e: e.update({"x/data/../0": b"1"}), ["x/data/../0"]),
    "two folders": (lambda e: e.update({"x/x/data.pkl": b"1"}), ["x/x/data.pkl"]),
    "a larger size": (edited(b"K\x02K\x03\x86", b"K\x03K\x03\x86"), ["'w'", "beyond"]),
    "a larger stride": (edited(b"K\x03K\x01\x86", b"K\x09K\x01\x86"), ["'w'", "beyond"]),
    "strides that overlap": (edited(b"K\x03K\x01\x86", b"K\x01K\x01\x86"), ["'w'", "strides"]),
    "an offset at the end": (edited(b"QK\x00K\x02", b"QK\x06K\x02"), ["'w'", "beyond"]),
    "a huge offset": (edited(b"QK\x00K\x02", b"Q\x8a\x08" + b"\xff" * 7 + b"\x7fK\x02"), ["'w'", "beyond"]),
    "huge sizes": (edited(b"K\x02K\x03\x86", b"\x8a\x08" + b"\xff" * 7 + b"\x7fK\x03\x86"), ["'w'", "beyond"]),
    "huge sizes and no strides": (flattened, ["'w'", "strides"]),
    "a size that overflows 64 bits": (edited(b"K\x06t", b"\x8a\x08" + b"\xff" * 7 + b"\x7ft"), ["'w'", "storage must"]),
    "another type": (edited(b"FloatStorage", b"DoubleStorage"), ["'w'", "48", "24"]),
    "another storage": (edited(b"X\x01\0\0\x000", b"X\x01\0\0\x009"), ["'w'", "'9'"]),
    "a storage outside": (edited(b"X\x01\0\0\x000", b"X\x07\0\0\x00../data"), ["'w'", "../data"]),
    "the version as a storage": (edited(b"X\x01\0\0\x000", b"X\x0a\0\0\x00../version"), ["'w'", "../version"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused_by_the_name_of_file_and_tensor(tmp_path: Path, kind: str) -> None:
    change, mentions = DAMAGE[kind]
    assert_refused(lambda: open_pth(rewritten(tmp_path / "x.pth", change)), ["x.pth", *mentions])


def test_the_undamaged_twin_is_read(tmp_path: Path) -> None:
    assert list(open_pth(rewritten(tmp_path / "x.pth", lambda e: None)).tensors) == ["w", "v"]


@pytest.mark.parametrize(
    "content", [b"", b"P", b"PK\x03\x04", b"\x80\x02}.", b"version https://git-lfs.github.com/spec/v1"]
)
def test_files_that_are_something_else_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    assert_refused(lambda: open_pth(tmp_path / "x.pth"), ["x.pth"])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path: Path, share: float) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "x.pth")
    data = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(data[: math.floor(len(data) * share)])
    assert_refused(lambda: open_pth(tmp_path / "x.pth"), ["x.pth", "ends too early", "download"])


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(10)}, tmp_path / "x.pth")
    tensor = open_pth(tmp_path / "x.pth").tensors["w"]
    torch.save({"w": torch.zeros(20)}, tmp_path / "x.pth")
    assert_refused(tensor.numpy, ["x.pth", "changed"])
