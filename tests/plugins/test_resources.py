"""What the compiled kernels take of a GPU does not grow unnoticed (plugins/library/resources.json)."""

from __future__ import annotations

import dataclasses

import pytest

from l4convert.plugins.library import native, resources
from l4convert.plugins.library.compile import jobs_of
from l4convert.plugins.library.resources import Resources
from l4convert.plugins.library.variants import DEFAULT_SMS, SHARED_LIMIT, gather

ROW = Resources(registers=96, spills=0, shared=32768, blocks=5)


def test_the_kernels_take_no_more_than_the_committed_table_says(built_library):
    kernels = native.load(built_library).kernels
    fresh = resources.make_table((k.name, k.sm, Resources(k.registers, k.spills, k.shared, k.blocks)) for k in kernels)
    built = {variant.name for found in gather(computes=("bf16",)).values() for variant in found}
    committed = {name: rows for name, rows in resources.read_table().items() if name in built}
    worse = resources.regressions(fresh, committed)
    assert not worse, "\n".join([*worse, "if that is meant: make plugins ARGS=--update-resources"])


def test_the_committed_table_has_every_kernel_of_the_default_library_and_no_other():
    rows = {(name, int(sm)) for name, by_sm in resources.read_table().items() for sm in by_sm}
    assert rows == {(job.variant.name, job.sm) for job in jobs_of(gather(), DEFAULT_SMS)}


def test_no_kernel_takes_more_than_its_sm_has(built_library):
    for kernel in native.load(built_library).kernels:
        assert kernel.shared <= SHARED_LIMIT[kernel.sm], kernel
        assert kernel.registers <= 255, kernel
        assert kernel.blocks >= 1, kernel
        assert 1 <= kernel.warps <= 32, kernel


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"registers": 104}, None),
        ({"registers": 105}, "k for SM 90: 105 registers, 96 committed"),
        ({"spills": 8}, "k for SM 90: 8 bytes spilled, 0 committed"),
        ({"shared": 32784}, "k for SM 90: 32784 bytes of shared memory, 32768 committed"),
        ({"registers": 32, "shared": 0}, None),
    ],
)
def test_what_got_worse_is_named(changed, found):
    fresh = {"k": {"90": dataclasses.replace(ROW, **changed)}}
    assert resources.regressions(fresh, {"k": {"90": ROW}}) == ([] if found is None else [found])


def test_missing_and_new_kernels_are_named():
    table = {"k": {"90": ROW}}
    assert resources.regressions({}, table) == ["k for SM 90 is not built any more"]
    assert resources.regressions(table, {}) == ["k for SM 90 is not in the committed table"]


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = resources.make_table([("k", 90, ROW), ("k", 120, ROW), ("a", 80, ROW)])
    resources.write_table(table, tmp_path / "table.json")
    assert resources.read_table(tmp_path / "table.json") == table
    assert resources.TABLE.read_text() == _rewritten(tmp_path)


def _rewritten(folder):
    resources.write_table(resources.read_table(), folder / "again.json")
    return (folder / "again.json").read_text()


@pytest.mark.parametrize(
    ("sm", "registers", "shared", "warps", "blocks"),
    [
        # CUDA's occupancy calculator (CUDA 12) for compute capabilities 8.0, 8.9 and 9.0.
        (80, 32, 0, 8, 8),  # threads: 2048 / 256
        (80, 64, 0, 8, 4),  # registers: 65536 / (64 * 256)
        (80, 168, 0, 4, 3),  # registers: 65536 / (168 * 128) = 3.05
        (80, 32, 49152, 4, 3),  # shared memory: 164 KiB / (48 + 1) KiB
        (90, 32, 73728, 4, 3),  # shared memory: 228 KiB / (72 + 1) KiB
        (89, 32, 0, 1, 24),  # blocks
        (80, 255, 0, 32, 0),  # does not fit
    ],
)
def test_occupancy(sm, registers, shared, warps, blocks):
    assert resources.occupancy(sm, registers, shared, warps) == blocks
