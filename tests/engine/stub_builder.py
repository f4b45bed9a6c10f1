"""Stands for the module ``tensorrt``, whose library is not on PyPI: the same calls, and failures to order.

Copied to ``tensorrt.py`` by the tests. What it was asked for becomes the plan, as JSON; the environment variable
``STUB`` makes it misbehave.
"""

from __future__ import annotations

import enum
import json
import os
import signal
import time
from typing import Any

import onnx

__version__ = "10.99.0"
MODE = os.environ.get("STUB", "")


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class BuilderFlag(enum.IntEnum):
    DEBUG = 0
    TF32 = 6


class PreviewFeature(enum.IntEnum):
    ALIASED_PLUGIN_IO_10_03 = 1


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class LayerType(enum.IntEnum):
    """As of a version without attention layers."""

    CONVOLUTION = 0


class ILogger:
    Severity = Severity


class IProgressMonitor:
    pass


class IStreamWriter:
    pass


class _Cache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"."


class _Config:
    def __init__(self) -> None:
        self.flags = {BuilderFlag.TF32}
        self.profiles: list[dict[str, Any]] = []
        self.progress_monitor: Any = None
        self.cache = _Cache(b"")
        self.preview: list[str] = []

    def set_preview_feature(self, feature: PreviewFeature, on: bool) -> None:
        assert on
        self.preview.append(feature.name)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def get_flag(self, flag: BuilderFlag) -> bool:
        return flag in self.flags

    def add_optimization_profile(self, profile: _Profile) -> None:
        self.profiles.append(profile.shapes)

    def create_timing_cache(self, data: bytes) -> _Cache:
        return _Cache(data)

    def set_timing_cache(self, cache: _Cache, _ignore: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> _Cache:
        return self.cache


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes[name] = shapes


class _Error:
    def node_name(self) -> str:
        return "layers.0/experts"

    def node_operator(self) -> str:
        return "MoE"

    def desc(self) -> str:
        return "Plugin not found,\nare the name and version correct?"


class OnnxParser:
    num_errors = 2

    def __init__(self, network: dict[str, Any], _logger: ILogger) -> None:
        self.network = network

    def parse(self, model: bytes, path: str) -> bool:
        graph = onnx.load_model_from_string(model)
        self.network["functions"] = [function.name for function in graph.functions]
        self.network["path"] = path
        return MODE != "parse"

    def get_error(self, _index: int) -> _Error:
        return _Error()


class _Registry:
    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.loaded: list[str] = []

    def load_library(self, path: str) -> object | None:
        if MODE == "plugins":
            self.logger.log(Severity.ERROR, "plugin is registered already")
            return None
        self.loaded.append(path)
        return object()


class Builder:
    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.registry = _Registry(logger)

    def get_plugin_registry(self) -> _Registry:
        return self.registry

    def create_network(self, flags: int) -> dict[str, Any]:
        return {"flags": flags, "plugins": list(self.registry.loaded)}

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network_to_stream(self, network: dict[str, Any], config: _Config, writer: Any) -> bool:
        self.logger.log(Severity.ERROR, "(cudaError 35: CUDA driver version is insufficient)")
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        monitor.step_complete("Building", 0)
        os.write(1, b"printed by native code\n")
        if MODE == "fail":
            self.logger.log(Severity.ERROR, "no kernel\nfor this")
            return False
        writer.write(b"half of it ")
        if MODE == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if MODE == "slow":
            time.sleep(60)
        content = {
            "network": network,
            "profiles": config.profiles,
            "preview": config.preview,
            "cpu_only": os.environ.get("TRT_INTERNAL_OPTIONS"),
            "sm": getattr(config, "sm", None),
        }
        writer.write(json.dumps(content).encode())
        for number in (100, 50):
            self.logger.log(Severity.INFO, f"Max Scratch Memory: {number} bytes")
        self.logger.log(Severity.INFO, "Total Weights Memory: 7 bytes")
        monitor.step_complete("Building", 1)
        monitor.phase_finish("Building")
        return True
