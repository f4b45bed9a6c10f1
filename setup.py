"""The compiled kernels: the one part of the build that pyproject.toml has no stable table for."""

from __future__ import annotations

from pathlib import PurePath

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Extension(
    "l4convert.quantization.kernels",
    sources=["l4convert/quantization/native.cpp"],
    depends=[f"l4convert/quantization/native_{part}.h" for part in ("lanes", "search", "int4", "fp8", "lowrank")],
    language="c++",
    # Contraction would fuse a product and a sum into one rounding on some machines and not on others.
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"],
    # Without a compiler the build goes on, and NumPy computes the same bytes: docs/adr/0010-quantization-kernels.md.
    optional=True,
)


class BuildLibrary(build_ext):
    """Builds a plain shared library, which ctypes loads, under a name that Python does not take for a module."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(PurePath(*fullname.split(".")).with_suffix(".bin"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


setup(
    ext_modules=[KERNELS],
    cmdclass={"build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
