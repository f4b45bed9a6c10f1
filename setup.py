"""The compiled kernels: the one part of the build that pyproject.toml has no stable table for."""

from setuptools import Extension, setup

KERNELS = Extension(
    "l4convert.quantization._native",
    sources=["l4convert/quantization/native.cpp"],
    depends=["l4convert/quantization/native_lanes.h"],
    language="c++",
    # Contraction would fuse a product and a sum into one rounding on some machines and not on others.
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"],
    py_limited_api=True,
    # Without a compiler the build goes on, and NumPy computes the same bytes: docs/adr/0010-quantization-kernels.md.
    optional=True,
)

setup(ext_modules=[KERNELS], options={"bdist_wheel": {"py_limited_api": "cp311"}})
