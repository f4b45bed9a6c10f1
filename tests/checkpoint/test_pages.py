"""Reading a mapped checkpoint within a budget: same values, bounded mappings, read errors instead of SIGBUS."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from l4convert.checkpoint import pages
from l4convert.checkpoint.pages import PageBudget, read_tile
from l4convert.checkpoint.safetensors_file import open_safetensors

ROWS, COLS = 96, 1024  # rows of a page each
PAGE = 4096


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A mapped file, and a matrix in it that begins at no page's beginning."""
    matrix = np.random.default_rng(1).standard_normal((ROWS, COLS)).astype(np.float32)
    path = tmp_path / "weights"
    path.write_bytes(bytes(100) + matrix.tobytes() + bytes(3 * PAGE))
    file = np.memmap(path, np.uint8, mode="r")
    return file, np.ndarray((ROWS, COLS), np.float32, buffer=file, offset=100)


@given(budget=st.integers(0, ROWS * PAGE * 2), bounds=st.lists(st.tuples(*[st.integers(0, ROWS)] * 2), max_size=6))
def test_any_budget_gives_the_same_values(budget: int, bounds: list[tuple[int, int]]) -> None:
    file = np.arange(100 + ROWS * PAGE, dtype=np.uint64).astype(np.uint8)
    with contextlib.closing(PageBudget(budget)) as held, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "_advise", lambda *_: 0)  # memory of this process, no file
        matrix = file[100:].reshape(ROWS, PAGE)
        for first, last in bounds:
            rows, cols = slice(min(first, last), max(first, last)), slice(5, 77)
            with held.job():
                assert np.array_equal(read_tile(file, matrix, rows, cols), matrix[rows, cols])


def test_what_is_mapped_stays_within_the_budget(
    mapped: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, matrix = mapped
    now: set[tuple[int, int]] = set()
    peak = 0

    def advise(_: np.ndarray, start: int, stop: int, advice: int) -> int:
        nonlocal peak
        if advice == pages._POPULATE_READ:
            now.add((start, stop))
        elif advice == pages.mmap.MADV_DONTNEED:
            now.discard((start, stop))
        peak = max(peak, sum(stop - start for start, stop in now))
        return 0

    monkeypatch.setattr(pages, "_advise", advise)
    budget = 8 * PAGE
    with contextlib.closing(PageBudget(budget)) as held:
        for start in range(0, ROWS, 4):
            with held.job():
                tile = read_tile(file, matrix, slice(start, start + 4), slice(0, COLS))
                assert np.shares_memory(tile, matrix)
        assert peak == budget  # all of it is used, so that neighbours find what they share
        with held.job():
            tile = read_tile(file, matrix, slice(0, ROWS), slice(0, 7))
            assert not np.shares_memory(tile, matrix)


def test_what_follows_is_asked_for_once(mapped: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    file, matrix = mapped
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_ask", lambda _, start, stop: asked.append((start, stop)))
    monkeypatch.setattr(pages, "_AHEAD_BYTES", 10 * PAGE)
    with contextlib.closing(PageBudget(1 << 30)) as held:
        for start in range(0, ROWS, 8):
            with held.job():
                read_tile(file, matrix, slice(start, start + 8), slice(0, COLS))
        held._reader.submit(int).result()  # everything before it was asked for
    starts, stops = zip(*asked, strict=True)
    assert starts[0] == 100 + 8 * PAGE
    assert starts[1:] == stops[:-1]  # neither gap nor overlap
    assert stops[-1] == file.size


CUT = """
import os, sys
from pathlib import Path
from l4convert.checkpoint.pages import PageBudget
from l4convert.checkpoint.safetensors_file import open_safetensors
from l4convert.errors import InputError

path = Path(sys.argv[1])
tensor = open_safetensors(path)["w"]
tensor.tile(0, slice(0, 1), slice(0, 4))  # maps the file
os.truncate(path, os.path.getsize(path) // 2)
try:
    with PageBudget(int(sys.argv[2])).job():
        print(tensor.tile(0, slice(0, 512), slice(0, 1024)).sum())
except InputError as error:
    print(error, "/", error.hint)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the call that tells read errors exists on Linux only")
@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path, budget: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": np.ones((512, 1024), np.float32)}, path)
    assert open_safetensors(path)["w"].size == 512 * 1024
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", CUT, str(path), str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "model.safetensors: tensor 'w': cannot be read: the disk fails, or the file was cut" in done.stdout
