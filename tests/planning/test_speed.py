"""Bounds of speed against brute force and closed forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from l4convert.checkpoint.presets import SCOUT
from l4convert.planning import ConversionPlan
from l4convert.planning.speed import distinct_experts, multiplied_elements, visible_keys
from l4convert.planning.use import ServingPlan
from l4convert.quantization.recipe import load_recipe


def test_distinct_experts_of_a_batch():
    random = np.random.default_rng(0)
    for experts, tokens in ((16, 1), (16, 8), (128, 64)):
        drawn = [len(set(random.integers(0, experts, tokens))) for _ in range(2000)]
        assert distinct_experts(experts, 1, tokens) == pytest.approx(np.mean(drawn), rel=0.02)


def test_keys_that_are_seen():
    config = dataclasses.replace(SCOUT, attention_chunk_size=8, layers=SCOUT.layers[:4])
    for context in (1, 7, 8, 9, 20, 32):
        every = sum(p + 1 + 3 * (p % 8 + 1) for p in range(context))
        assert visible_keys(config, context)[1] == every
    chunk = np.mean([p % 8 + 1 for p in range(8)])
    assert visible_keys(config, 32)[0] == 32 + 3 * chunk


def test_multiplied_weights_are_the_active_parameters(plan: ConversionPlan):
    elements = multiplied_elements(SCOUT, load_recipe("int4"))
    assert elements.keys() == {"plain"}
    norms = (2 * 48 + 1) * SCOUT.hidden_size
    assert plan.active_parameters - elements["plain"] == SCOUT.vocab_size * SCOUT.hidden_size + norms
    split = multiplied_elements(SCOUT, load_recipe("fp8"))
    assert sum(split.values()) == elements["plain"]
    assert split["plain"] == SCOUT.vocab_size * SCOUT.hidden_size + 48 * 16 * SCOUT.hidden_size  # head, routers


def test_decode_reads_active_weights_and_caches(serving: Callable[..., ServingPlan]):
    one = serving("h100", 131072).chosen
    active = 14.5e9  # Scout's 17.2 B less embedding and head
    weights = active * (0.5 + 2 / 128) + 2 * SCOUT.vocab_size * SCOUT.hidden_size
    caches = 4096 * (12 * 131072 + 36 * 8193 / 2)
    assert one.decode == pytest.approx(3.35e12 / (weights + caches), rel=0.1)
    rates = [serving("h200", 131072, batch=n).chosen.decode or 0.0 for n in (1, 2, 8)]
    assert rates[0] < rates[1] < rates[2] < 8 * rates[0]


def test_a_prompt_takes_at_least_its_arithmetic(serving: Callable[..., ServingPlan]):
    found = serving("h100", 131072, tensor_parallel=1).result("prefill")
    attention = 4 * 5120 * (12 * 131072**2 / 2 + 36 * 16 * 8192**2 / 2)
    assert found is not None
    assert found.value == pytest.approx(131072 * 989.4e12 / (2 * 16.14e9 * 131072 + attention), rel=0.01)
