from __future__ import annotations

from pathlib import Path

from l4convert.checkpoint import FORMATS, open_checkpoint
from tests.checkpoint.refusals import assert_refused


def test_no_folder(tmp_path: Path) -> None:
    assert_refused(lambda: open_checkpoint(tmp_path / "gone"), ["gone: no such folder"])


def test_a_name_on_the_hub_is_no_folder() -> None:
    assert_refused(lambda: open_checkpoint(Path("meta-llama/Llama-4-Scout-17B-16E")), ["no such folder", "download"])


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert_refused(lambda: open_checkpoint(tmp_path / "model.safetensors"), ["model.safetensors: not a folder"])


def test_an_empty_folder(tmp_path: Path) -> None:
    assert_refused(lambda: open_checkpoint(tmp_path), ["empty"])


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    assert_refused(lambda: open_checkpoint(tmp_path), ["known format", *(row.name for row in FORMATS)])


def test_a_path_of_two_lines(tmp_path: Path) -> None:
    assert_refused(lambda: open_checkpoint(tmp_path / "a\nb"), [r"a\nb", "no such folder"])


def test_a_path_that_no_system_has() -> None:
    assert_refused(lambda: open_checkpoint(Path("a" * 5000)), ["aaa"])
    assert_refused(lambda: open_checkpoint(Path("a\0b")), [r"a\x00b"])
