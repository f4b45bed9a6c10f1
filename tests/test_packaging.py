"""What a user's `pip install` gets: a wheel built from a copy of the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from l4convert.cli.doctor import CORE, EXTRAS
from tests.conftest import PLUGINS

REPO = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
LINKS = ("graph_passes", "plugins", "targets")
KERNELS = "l4convert/quantization/kernels.bin"
# What `l4convert plugins build` compiles lies in wheels too.
LIBRARY_SOURCES = ("*.cpp", "*.h", "*.json", "*.map", "CMakeLists.txt")


def canonical(requirement: str) -> str:
    """The distribution's name in a requirement, as package indexes compare names (PEP 503)."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name.group()).lower()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, so that no build folder is left in it; wheels are built from it without network."""
    source = tmp_path_factory.mktemp("source")
    for name in ("l4convert", *LINKS):
        ignore = shutil.ignore_patterns("__pycache__", "*.bin")
        shutil.copytree(REPO / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    return source


def build(source: Path, dist: Path, **env: str) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("dist"))


def test_the_links_are_links():
    for name in LINKS:
        assert (REPO / "l4convert" / name).readlink() == Path("..") / name


def test_the_wheel_has_every_module_and_data_file_under_one_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in packed} == {"l4convert"}
    tracked = {
        path.relative_to(REPO)
        for top in ("l4convert", *LINKS)
        for pattern in ("*.py", "*.toml", "py.typed")
        for path in (REPO / top).rglob(pattern)
    }
    tracked |= {path.relative_to(REPO) for pattern in LIBRARY_SOURCES for path in (REPO / "plugins").rglob(pattern)}
    wanted = {path.as_posix() if path.parts[0] == "l4convert" else f"l4convert/{path.as_posix()}" for path in tracked}
    assert len(wanted) > 20
    assert packed - {KERNELS} == wanted


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None or shutil.which("cc") is None, reason="no compiler"
)
def test_the_wheel_has_the_kernels_for_any_later_python(wheel):
    assert wheel.name.split("-")[2:4] == ["cp311", "abi3"]
    with zipfile.ZipFile(wheel) as archive:
        assert KERNELS in archive.namelist()


def test_the_wheel_builds_and_quantizes_without_a_compiler(source, tmp_path):
    shutil.copytree(source, tmp_path / "source", symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    path = build(tmp_path / "source", tmp_path / "dist", CC="/nonexistent/cc", CXX="/nonexistent/c++")
    with zipfile.ZipFile(path) as archive:
        assert KERNELS not in archive.namelist()
        archive.extractall(tmp_path / "site")
    code = (
        "import numpy as np; from l4convert.checkpoint.lazy import Constant\n"
        "from l4convert.quantization import native\n"
        "from l4convert.quantization.int4 import quantize_int4\n"
        "values, _ = quantize_int4(Constant(np.full((1, 4), 2.0, np.float32)), 32, 'absmax')\n"
        "print(native.AVAILABLE, values.tobytes().hex())"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=env)
    assert done.stdout.split() == ["False", "7777"]


def test_the_wheel_runs_from_outside_the_repository(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = (
        "import l4convert.targets, sys; from l4convert.cli import run; print(l4convert.targets.__file__); run(['-V'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=env
    )
    where, version = done.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert version == f"l4convert {wheel.name.split('-')[1]}"


def test_the_wheel_builds_the_plugin_library_and_its_bytes_are_the_same(wheel, built_library, tmp_path):
    """At another place, with nothing but the compiled kernels kept."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cubins").symlink_to(PLUGINS / "cache" / "cubins")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "l4convert", "plugins", "build", "--output", "out", "--cache", "cache", "--json"]
    command += ["--compute", "bf16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["compiled"] == 0
    assert (tmp_path / "out" / built_library.name).read_bytes() == built_library.read_bytes()


def test_doctor_knows_the_declared_dependencies():
    assert {canonical(name) for name in CORE} == {canonical(name) for name in PYPROJECT["dependencies"]}
    declared = {name: {canonical(r) for r in listed} for name, listed in PYPROJECT["optional-dependencies"].items()}
    del declared["dev"]
    assert {name: {canonical(p) for p in extra["packages"]} for name, extra in EXTRAS.items()} == declared


def test_every_declared_dependency_is_pinned():
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pinned = {canonical(line) for line in lines if not line.startswith("#") and "==" in line}
    listed = [*PYPROJECT["dependencies"], *(r for extra in PYPROJECT["optional-dependencies"].values() for r in extra)]
    assert {canonical(requirement) for requirement in listed} <= pinned


def test_the_package_imports_without_its_optional_and_heavy_dependencies():
    code = (
        "import importlib, pkgutil, sys\n"
        "for name in ('onnxruntime', 'torch', 'transformers', 'tokenizers'):\n"
        "    sys.modules[name] = None\n"  # makes its import fail
        "import l4convert\n"
        "for module in pkgutil.walk_packages(l4convert.__path__, 'l4convert.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPO)
    assert done.returncode == 0, done.stderr[-2000:]


def test_onnxruntime_is_told_not_to_report(tmp_path):
    env = {key: value for key, value in os.environ.items() if key not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    code = "import l4convert, onnxruntime"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO, env={**env, "HOME": str(tmp_path)})
    assert not list(tmp_path.rglob("*"))  # else the identifier that it would report
