"""Building the library: what is compiled and when, what is refused, and what the file is."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from l4convert import __version__
from l4convert.errors import BackendMissing, InputError, UsageError
from l4convert.plugins.library import build, native, tables, tools, variants
from l4convert.plugins.library import compile as compiling
from l4convert.plugins.library.build import BuildOptions
from l4convert.plugins.library.variants import DEFAULT_SMS, Tuning, Variant
from tests.conftest import PLUGINS
from tests.plugins.conftest import DEMO
from tests.plugins.cubin import read_cubin

BROKEN = {"broken": "tests.plugins.broken"}


@pytest.fixture(scope="module")
def library(built_library: Path) -> native.Library:
    return native.load(built_library)


def test_the_library_has_every_kernel_for_every_sm(library):
    wanted = [
        (variant.name, sm)
        for found in variants.gather(computes=("bf16",)).values()
        for variant in found
        for sm in DEFAULT_SMS
        if sm >= variant.least_sm
    ]
    assert wanted
    assert sorted((kernel.name, kernel.sm) for kernel in library.kernels) == sorted(wanted)
    assert library.sms == DEFAULT_SMS
    assert library.version == __version__


def test_kernels_for_one_type_of_activations_are_half_and_those_without_any():
    both, bf16, fp16 = (
        {variant.name for found in variants.gather(computes=computes).values() for variant in found}
        for computes in (("bf16", "fp16"), ("bf16",), ("fp16",))
    )
    assert both == bf16 | fp16
    assert not [name for name in bf16 if "fp16" in name]
    assert not [name for name in fp16 if "bf16" in name]
    assert bf16 & fp16 == {name for name in both if "fp16" not in name and "bf16" not in name}


def test_every_cubin_takes_what_the_table_says(library):
    """The types that launches are checked against, Triton's two hidden pointers, the block size, the SM."""
    sizes = {"p": 8, "l": 8, "i": 4, "f": 4}
    for kernel in library.kernels:
        cubin = read_cubin(ctypes.string_at(kernel.image, kernel.size), kernel.symbol)
        assert cubin.parameters == (*(sizes[letter.lower()] for letter in kernel.types), 8, 8), kernel.name
        assert cubin.threads == (32 * kernel.warps, 1, 1), kernel.name
        assert kernel.sm in cubin.sms, kernel.name


def test_the_library_shows_its_interface_and_needs_nothing_of_nvidia(built_library):
    symbols = subprocess.run(["nm", "-D", "--defined-only", built_library], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in symbols.stdout.splitlines()}
    assert {name for name in names if not name.startswith("l4_")} <= {"getCreators", "setLoggerFinder"}
    assert "l4_moe_enqueue" in names
    dynamic = subprocess.run(["readelf", "-d", built_library], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [name for name in needed if "cuda" in name or "nvinfer" in name or "stdc++" in name]


def test_a_build_compiles_only_what_is_not_there_yet(tmp_path):
    options = BuildOptions(
        tmp_path, sms=(80, 90), head_dims=(32,), ops=DEMO, cache=PLUGINS / "cache", jobs=2, overwrite=True
    )
    first = build.build(options).library.read_bytes()
    again = build.build(options)
    assert again.compiled == 0
    assert again.library.read_bytes() == first
    compiling._description_path(again.kernels[0].job, options.cubins).unlink()
    once_more = build.build(options)
    assert once_more.compiled == 1
    assert once_more.library.read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} <= {build.LIBRARY, *build.COMPANIONS}


def test_what_changes_a_kernel_changes_its_place_in_the_cache(tmp_path):
    variant = variants.gather((32,), DEMO)["demo"][0]
    job = compiling.Job("demo", DEMO["demo"], variant.at(80), 80)
    changed = [
        dataclasses.replace(job, sm=86),
        dataclasses.replace(job, package="tests.plugins.broken"),
        dataclasses.replace(job, variant=dataclasses.replace(job.variant, num_warps=8)),
        dataclasses.replace(job, variant=dataclasses.replace(job.variant, divisible=frozenset())),
        dataclasses.replace(job, variant=dataclasses.replace(job.variant, constants={"ROWS": 32})),
    ]
    assert len({compiling._key(one) for one in [job, *changed]}) == 6


def test_two_names_of_one_kernel_are_compiled_once(tmp_path):
    variant = variants.gather((32,), DEMO)["demo"][0]
    jobs = [
        compiling.Job("demo", DEMO["demo"], dataclasses.replace(variant.at(80), name=name), 80) for name in ("a", "b")
    ]
    assert len(compiling.missing_of(jobs, tmp_path)) == 1


def test_a_digest_covers_the_files_that_a_kernel_file_imports(tmp_path, monkeypatch):
    package = tmp_path / "kernels_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("A = 1\n")
    (package / "kernels.py").write_text("import math\nfrom kernels_of_a_test.helper import A\n")
    (package / "other.py").write_text("from .helper import A\n")
    monkeypatch.syspath_prepend(tmp_path)

    def digests() -> list[str]:
        compiling.source_digest.cache_clear()
        return [compiling.source_digest(f"kernels_of_a_test.{name}") for name in ("kernels", "other")]

    first = digests()
    assert digests() == first
    (package / "helper.py").write_text("A = 2\n")
    assert not {*digests()} & {*first}


@pytest.mark.parametrize(
    ("head_dim", "message"),
    [
        (16, r"^undefined for SM 90: .*nowhere"),
        (32, r"^described for SM 90: it needs scratch memory"),
        (64, r"^large for SM 90: .*\d+ bytes of shared memory"),
        (128, r"^misnamed for SM 90: .*parameters are not the kernel's.*'x'.*'z'"),
    ],
)
def test_a_kernel_that_cannot_be_is_refused_in_one_line(tmp_path, head_dim, message):
    options = BuildOptions(tmp_path, sms=(90,), head_dims=(head_dim,), ops=BROKEN, cache=tmp_path / "cache")
    with pytest.raises(InputError, match=message) as caught:
        build.build(options)
    assert "\n" not in caught.value.message
    assert not (tmp_path / build.LIBRARY).exists()


def test_an_interpreter_setting_does_not_reach_the_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    jobs = compiling.jobs_of(variants.gather((32,), DEMO), (80,), DEMO)
    (compiled,) = compiling.compile_all(jobs, tmp_path, 1)
    assert compiled.symbol == "scaled_product"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sms": (75,)}, "--sm 75: there are kernels for 80, "),
        ({"sms": (900,)}, "--sm 900"),
        ({"head_dims": (96,)}, "--head-dim 96: a power of two"),
        ({"head_dims": (8,)}, "--head-dim 8"),
    ],
)
def test_numbers_that_nothing_can_be_made_for(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        build.plan(BuildOptions(tmp_path, **options))


def test_a_library_that_is_there_stays(tmp_path):
    (tmp_path / build.LIBRARY).write_text("old")
    with pytest.raises(InputError, match="there is a library already"):
        build.build(BuildOptions(tmp_path, ops=DEMO))
    assert (tmp_path / build.LIBRARY).read_text() == "old"


def test_without_tensorrts_headers_the_c_interface_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "_package", lambda _name: None)
    monkeypatch.delenv("TENSORRT_ROOT", raising=False)
    options = BuildOptions(tmp_path, ops=DEMO, head_dims=(32,), cache=tmp_path / "cache", placeholders=True, jobs=2)
    built = build.build(options)
    assert built.tools.tensorrt_include is None
    assert len(native.load(built.library).kernels) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", build.LIBRARY]


def test_headers_are_taken_from_tensorrt_root(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    with pytest.raises(InputError, match=r"TENSORRT_ROOT=.*: no include/NvInferRuntime.h there"):
        tools.find_tools()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "NvInferRuntime.h").write_text("")
    assert tools.find_tools().tensorrt_include == str(tmp_path / "include")


@pytest.mark.parametrize(
    ("program", "message"),
    [("cmake", "^cmake is not installed: pip install cmake$"), ("c++", "C.. compiler: apt-get")],
)
def test_a_missing_program_is_named_with_its_install_command(tmp_path, monkeypatch, program, message):
    for name in ("cmake", "c++"):
        if name != program:
            (tmp_path / name).symlink_to(shutil.which(name) or "")
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BackendMissing, match=message):
        tools.find_tools()


def test_what_a_compiler_says_is_shown_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    options = BuildOptions(tmp_path, ops=DEMO, head_dims=(32,), cache=tmp_path / "cache", placeholders=True)
    with pytest.raises(InputError, match=r"^the C\+\+ build failed: CMake Error at .*compiler") as caught:
        build.build(options)
    assert "/bin/false" in Path(caught.value.hint.rpartition(": ")[2]).read_text()
    assert not (tmp_path / build.LIBRARY).exists()


@pytest.mark.parametrize(
    ("said", "first"),
    [
        (
            "-- looking\nCMake Error at CMakeLists.txt:6 (x):\n  CMake 3.22 or higher is required.\n",
            "6 (x): CMake 3.22",
        ),
        ("[1/2] a.cpp\na.cpp:3:1: error: expected ;\nninja: failed\n", "a.cpp:3:1: error: expected ;"),
        ("ninja: stopped", "ninja: stopped"),
        ("", "it said nothing"),
    ],
)
def test_the_first_error_of_a_build(said, first):
    assert first in build._first_error(said)


def test_a_missing_triton_is_named_with_its_install_command(tmp_path, monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def absent(_name: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(compiling, "version", absent)
    options = BuildOptions(tmp_path, ops=DEMO, cache=tmp_path / "cache")
    with pytest.raises(BackendMissing, match=r"^triton is not installed: pip install triton==3.6.0$"):
        build.build(options)


def test_a_variant_takes_the_tuning_of_its_sm_or_of_a_relative():
    variant = Variant(
        "v",
        "k",
        {},
        {"BLOCK": 64, "MASKED": True},
        num_warps=4,
        per_sm={89: Tuning({"BLOCK": 32}), 90: Tuning(num_warps=8, num_stages=5, max_registers=128)},
    )
    assert variant.at(80).constants == {"BLOCK": 64, "MASKED": True}
    assert variant.at(86) == variant.at(89)
    assert variant.at(89).constants == {"BLOCK": 32, "MASKED": True}
    hopper = variant.at(90)
    assert (hopper.num_warps, hopper.num_stages, hopper.max_registers) == (8, 5, 128)
    assert hopper.constants == variant.constants


def test_the_drivers_letters_and_constants_of_a_variant():
    signature = {"a": "*fp8e4nv", "b": "i32", "c": "i64", "d": "i32", "e": "i64", "f": "fp32"}
    variant = Variant("v", "k", signature, {"T": True, "N": 3, "S": "bf16"}, divisible=frozenset("de"))
    assert tables.type_letters(variant) == "pilILf"
    assert tables.constants_text(variant.constants) == "T=1,N=3,S='bf16'"
