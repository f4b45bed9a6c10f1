"""What docs/guides/plugins.md shows: its C compiles, and its least times are those that the benchmark computes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from l4convert.targets.hardware import load_hardware
from tests.benchmarks.scripts import load

REPO = Path(__file__).resolve().parent.parent.parent
GUIDE = (REPO / "docs" / "guides" / "plugins.md").read_text()


def test_the_c_example_compiles_against_the_header(tmp_path: Path) -> None:
    (block,) = re.findall(r"```c\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "example.c").write_text(block)
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{REPO}", tmp_path / "example.c"]
    subprocess.run(command, check=True)


@pytest.mark.parametrize(
    ("shown", "rows"),
    [
        ("0.071 / 1.13 | 0.0003 / 0.016 | 21 / 338", ("scout MoE int4, decode 1", "scout MoE int4, decode 64")),
        ("1.30 | 2.06 | 2,084", ("scout MoE int4, prefill 8k",)),
        ("9.23 | 2.06 | 2,756", ("maverick MoE int4, prefill 8k",)),
        (
            "0.034 / 2.15 | 0.0002 / 0.011 | 10 / 642",
            ("chunked attention, bf16 cache, decode 1 at 128k", "chunked attention, bf16 cache, decode 64 at 8k"),
        ),
        (
            "4.29 / 2.15 | 0.021 / 0.021 | 1,282 / 641",
            ("global attention, bf16 cache, decode 1 at 1M", "global attention, fp8 cache, decode 1 at 1M"),
        ),
        (
            "0.24 / 0.23 | 0.69 / 0.69 | 695 / 695",
            ("chunked attention, bf16 cache, prefill 8k", "global attention, bf16 cache, prefill 8k"),
        ),
    ],
)
def test_its_least_times_are_computed(shown: str, rows: tuple[str, ...]) -> None:
    assert shown in GUIDE
    limits = load("roofline").limits_of(load_hardware("h100"))
    work = {row.name: row.work for row in load("gpu_workloads").ROWS}
    for number, name in enumerate(rows):
        cells = [cell.split(" / ")[number].replace(",", "") for cell in shown.split(" | ")]
        found = (work[name].moved / 1e9, work[name].flops / 1e12, work[name].seconds(limits) * 1e6)
        for cell, value in zip(cells, found, strict=True):
            assert f"{value:.{len(cell.partition('.')[2])}f}" == cell
