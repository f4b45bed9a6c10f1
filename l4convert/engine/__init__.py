"""Engines: from an artifact's ONNX to TensorRT plans, on machines with no GPU (``l4convert build``)."""

from l4convert.engine.build import BuildOptions, BuildResult, BuiltEngine, build_engines, plan_build

__all__ = ["BuildOptions", "BuildResult", "BuiltEngine", "build_engines", "plan_build"]
