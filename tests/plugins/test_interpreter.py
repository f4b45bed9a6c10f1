"""The interpreter as the tests use it: its conversions are a GPU's, and what it would get wrong raises."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.plugins import interpreter
from tests.plugins.demo import kernels
from tests.plugins.interpreter import DeviceBuffer, Fault, Memory

TYPES = {"x": "*fp32", "bf16": "*bf16", "fp16": "*fp16", "fp8": "*fp8e4nv", "sums": "*fp32"}


def test_conversions_are_those_of_torch():
    random = np.random.default_rng(0)
    ties = np.array([1.00390625, 1.01171875, -1.00390625, 17.0, 19.0, 0.0009765625, 448.0, 464.0], np.float32)
    values = np.concatenate([ties, random.standard_normal(248).astype(np.float32) * 20]).astype(np.float32)
    memory = Memory()
    given = {name: memory.add(DeviceBuffer(values.size * 4, name)) for name in TYPES}
    given["x"].bytes[:] = values.view(np.uint8)
    arguments = {name: buffer.address for name, buffer in given.items()}
    interpreter.run(kernels.convert, {**arguments, "COUNT": values.size}, TYPES, (1, 1, 1), memory)
    tensor = torch.from_numpy(values)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp8", torch.float8_e4m3fn)):
        expected = tensor.to(dtype).view(torch.uint8).numpy()
        np.testing.assert_array_equal(given[name].bytes[: expected.nbytes], expected, err_msg=name)
    total = tensor.to(torch.bfloat16).double().sum().item()
    assert given["sums"].numpy(np.float32)[0] == pytest.approx(total, rel=1e-5)


def test_float8_saturates_as_the_gpu_does():
    values = np.array([500.0, -1e9, np.inf, 448.0], np.float32)
    memory = Memory()
    given = {name: memory.add(DeviceBuffer(16, name)) for name in TYPES}
    given["x"].bytes[:] = values.view(np.uint8)
    arguments = {name: buffer.address for name, buffer in given.items()}
    interpreter.run(kernels.convert, {**arguments, "COUNT": 4}, TYPES, (1, 1, 1), memory)
    stored = given["fp8"].numpy(ml_dtypes.float8_e4m3fn)[:4].astype(np.float32)
    np.testing.assert_array_equal(stored, [448, -448, 448, 448])


def test_arithmetic_that_would_be_wrong_raises():
    memory = Memory()
    x, y = (memory.add(DeviceBuffer(32, name)) for name in "xy")
    arguments = {"x": x.address, "y": y.address, "COUNT": 16}
    with pytest.raises(Fault, match="arithmetic on bf16"):
        interpreter.run(kernels.add_bfloat16, arguments, {"x": "*bf16", "y": "*bf16"}, (1, 1, 1), memory)


def test_an_address_that_is_not_aligned_to_its_element_is_found():
    memory = Memory()
    x, y = (memory.add(DeviceBuffer(64, name)) for name in "xy")
    arguments = {"x": x.address + 1, "y": y.address, "COUNT": 16}
    with pytest.raises(Fault, match="not a multiple"):
        interpreter.run(kernels.add_bfloat16, arguments, {"x": "*bf16", "y": "*bf16"}, (1, 1, 1), memory)


def test_bytes_around_a_buffer_are_watched():
    buffer = DeviceBuffer(100)
    assert buffer.address % interpreter.GUARD == 0
    assert buffer.guarded()
    buffer._raw[buffer._outside[0].size + 100] = 0
    assert not buffer.guarded()
