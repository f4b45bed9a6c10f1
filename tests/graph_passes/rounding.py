"""Quantized weights by the schemes' definitions, in numpy and ml_dtypes: what the graphs are compared with."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from l4convert.quantization.recipe import Recipe, Rule, Scheme

LINEARS = "model.layers.*_proj.weight"
EXPERTS = "model.layers.*.feed_forward.experts.*"
Weights = Callable[[str, np.ndarray], np.ndarray]


def recipe(*rules: tuple[str, Scheme]) -> Recipe:
    return Recipe("test", tuple(Rule(pattern, scheme) for pattern, scheme in rules))


def everything(scheme: Scheme) -> Recipe:
    """A scheme for what the bundled recipes quantize."""
    return recipe((EXPERTS, scheme), (LINEARS, scheme))


def dequantized(recipe: Recipe) -> Weights:
    """What the weights of a model are worth after quantization, for absmax scales; for ``reference_logits``."""
    return lambda name, weight: _along_inputs(name, weight, lambda w: _rounded(w, recipe.scheme_for(name)))


def stored(model: ir.Model) -> Weights:
    """The weights of a quantized graph, from its own values and scales."""

    def weight_of(name: str, weight: np.ndarray) -> np.ndarray:
        values = model.graph.initializers.get(f"{name}_int4")
        if values is None:
            return weight
        scale = model.graph.initializers[f"{name}_scale"].const_value.numpy()
        depth = values.shape[-2]
        block = max(b for b in (32, 64, 128) if -(-depth // b) == scale.shape[-2])
        whole = values.const_value.numpy().astype(np.float32) * np.repeat(scale, block, axis=-2)[..., :depth, :]
        return whole if "experts" in name and "shared" not in name else whole.T

    return weight_of


def _along_inputs(name: str, weight: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Stacked experts are [E,in,out], all other matrices [out,in]."""
    if weight.ndim == 3:
        return np.swapaxes(function(np.swapaxes(weight, 1, 2)), 1, 2)
    return function(weight)


def _rounded(weight: np.ndarray, scheme: Scheme) -> np.ndarray:
    if scheme.kind == "none":
        return weight
    if scheme.kind == "fp8":
        scale = np.abs(weight).max(axis=-1, keepdims=True) / 448
        return (weight / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    assert scheme.scale == "absmax"
    pieces = []
    for start in range(0, weight.shape[-1], scheme.block_size):
        block = weight[..., start : start + scheme.block_size]
        scale = np.abs(block).max(axis=-1, keepdims=True) / 7
        pieces.append(np.rint(block / scale).astype(ml_dtypes.int4).astype(np.float32) * scale)
    return np.concatenate(pieces, axis=-1)
