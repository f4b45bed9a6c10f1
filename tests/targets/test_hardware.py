"""Hardware profiles: complete, consistent with what builders say, and strict about a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from l4convert.engine.backend import find_backend
from l4convert.errors import InputError, UsageError
from l4convert.quantization.recipe import bundled_recipes
from l4convert.targets.hardware import Hardware, hardware_names, load_hardware

NAMES = {
    *("h100", "h200", "b200", "a100-80g", "l40s", "l4", "rtx-pro-6000", "rtx-5090", "rtx-4090", "dgx-spark", "cpu"),
}
GPUS = sorted(NAMES - {"cpu"})
OWN = """\
summary = "mine"
compute_capability = "8.6"
memory_bytes = 24_000_000_000
bandwidth_bytes_per_second = 936_000_000_000
precisions = ["fp16", "int4"]
runtimes = ["tensorrt-rtx"]
recipe = "int4"
[peak_flops]
fp16 = 142_000_000_000_000
[sources]
memory_bytes = "the box"
"""


def _own(folder: Path, text: str = OWN) -> Hardware:
    path = folder / "mine.toml"
    path.write_text(text)
    return load_hardware(str(path))


@pytest.fixture(scope="module")
def tensorrt_rtx() -> frozenset[str]:
    """Compute capabilities that the builder itself knows."""
    capabilities = find_backend("tensorrt-rtx").capabilities
    assert capabilities
    return capabilities


def test_the_profiles_are_those_that_were_asked_for() -> None:
    assert set(hardware_names()) == NAMES


@pytest.mark.parametrize("name", GPUS)
def test_every_figure_of_a_gpu_has_a_source(name: str) -> None:
    hardware = load_hardware(name)
    figures = {
        "compute_capability",
        "memory_bytes",
        "bandwidth_bytes_per_second",
        "peak_flops",
        "precisions",
        "runtimes",
    }
    assert hardware.sources.keys() == figures
    assert all(source.startswith("https://") for source in hardware.sources.values())
    assert hardware.peak_flops
    assert hardware.recipe in bundled_recipes()


@pytest.mark.parametrize("name", GPUS)
def test_a_profile_agrees_with_the_builder_and_the_architecture(name: str, tensorrt_rtx: frozenset[str]) -> None:
    hardware = load_hardware(name)
    assert (f"SM{hardware.sm}" in tensorrt_rtx) == ("tensorrt-rtx" in hardware.runtimes)
    assert "tensorrt" in hardware.runtimes
    # FP8 came with Ada and Hopper, FP4 with Blackwell (CUDA programming guide, compute capabilities).
    assert ("fp8" in hardware.precisions) == (hardware.sm >= 89)
    assert ("fp4" in hardware.precisions) == (hardware.sm >= 100)
    rates = hardware.peak_flops
    assert sorted(rates.values()) == [rates[p] for p in ("bf16", "fp8", "fp4") if p in rates]  # narrower is faster


def test_a_recipe_is_one_that_the_hardware_can_run() -> None:
    for name in GPUS:
        hardware = load_hardware(name)
        assert hardware.recipe in hardware.precisions


def test_the_cpu_has_no_engines_and_no_figures() -> None:
    cpu = load_hardware("cpu")
    assert (cpu.compute_capability, cpu.memory_bytes, cpu.runtimes, cpu.sm) == (None, None, (), 0)


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    mine = _own(tmp_path)
    assert (mine.name, mine.sm, mine.memory_bytes) == ("mine", 86, 24 * 10**9)
    assert mine.as_dict()["peak_flops"] == {"fp16": 142 * 10**12}


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="h1000 is not a hardware profile") as error:
        load_hardware("h1000")
    assert "rtx-5090" in str(error.value.hint)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('summary = "mine"', "", "summary is missing"),
        ('"mine"', '"a\\nb"', "summary must be one line"),
        ('"8.6"', "8.6", 'compute_capability must be text like "8.9"'),
        ('"8.6"', '"sm86"', "compute_capability must be text"),
        ("24_000_000_000", "24e9", "memory_bytes must be a whole number"),
        ("24_000_000_000", "0", "memory_bytes must be a whole number"),
        ("24_000_000_000", "true", "memory_bytes must be a whole number"),
        ("bandwidth_bytes_per_second =", "bandwidth =", "bandwidth is not a key"),
        ('["fp16", "int4"]', "[]", "precisions is empty"),
        ('["fp16", "int4"]', '["fp16", "fp16"]', "precisions must be a list of some of"),
        ('["fp16", "int4"]', '"fp16"', "precisions must be a list"),
        ('["tensorrt-rtx"]', '["onnx"]', "runtimes must be a list of some of"),
        ("fp16 = 142", "fp8 = 142", "peak_flops has fp8, which is not among its precisions"),
        ("142_000_000_000_000", "-1", "peak_flops.fp16 must be a whole number"),
        ('memory_bytes = "the box"', "memory_bytes = 3", "sources.memory_bytes must be the source"),
        ('memory_bytes = "the box"', 'colour = "red"', "sources.colour must be the source"),
        ("[peak_flops]", "[peak_flops", "not a TOML file"),
    ],
)
def test_a_damaged_profile_is_refused_in_one_line(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert old in OWN
    with pytest.raises(InputError) as error:
        _own(tmp_path, OWN.replace(old, new, 1))
    assert error.value.message.startswith(f"{tmp_path / 'mine.toml'}: ")
    assert problem in error.value.message
    assert "\n" not in error.value.message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_hardware(str(tmp_path / "none.toml"))
    (tmp_path / "a b.toml").write_text(OWN)
    with pytest.raises(InputError, match="no name of a folder"):
        load_hardware(str(tmp_path / "a b.toml"))
