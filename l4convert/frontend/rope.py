"""Rotary tables: frequencies in float64, angles of chunk-relative positions, rounded to float32 once."""

from __future__ import annotations

import math

import numpy as np

from l4convert.checkpoint.config import DecoderConfig, RopeScaling


def inverse_frequencies(config: DecoderConfig) -> np.ndarray:
    """``theta^(-2i/D)``, scaled where the model says so: float64 [head_dim/2].

    Source: transformers ``modeling_rope_utils``: ``_compute_llama3_parameters`` and the default formula of
    ``Llama4TextRotaryEmbedding``.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    return frequencies if config.rope_scaling is None else _scaled(frequencies, config.rope_scaling)


def _scaled(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3's scaling: long waves slowed by ``factor``, short ones kept, a linear blend between."""
    wavelengths = 2 * math.pi / frequencies
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    slowed = frequencies / scaling.factor
    result = np.where(wavelengths > longest, slowed, frequencies)
    if shortest < longest:  # Llama 4 has both factors 1: there is nothing between
        turns = scaling.original_max_position_embeddings / wavelengths
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        between = (wavelengths <= longest) & (wavelengths >= shortest)
        result = np.where(between, (1 - blend) * slowed + blend * frequencies, result)
    return result


def rotary_tables(config: DecoderConfig, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of ``position * frequency`` for positions 0 .. rows-1: float32 [rows, head_dim/2] each."""
    angles = np.arange(rows, dtype=np.float64)[:, None] * inverse_frequencies(config)[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
