"""Dequantizing floating-point codes for the reference, with the code of the libraries that wrote them.

Everything is computed in float32. The state dicts have the checkpoint's own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l4convert.errors import backend_missing

State = dict[str, Any]
_UNUSED = ("input_scale", "k_scale", "v_scale", "output_scale")


def decompress_nvfp4(tensors: State, scheme: Any) -> Any:
    """A weight of compressed-tensors' nvfp4-pack-quantized, with its code.

    Args:
        tensors: What is stored for one module.
        scheme: Its ``QuantizationScheme``.

    Returns:
        float32 [N, K]; the library's own ``decompress`` would round it to bfloat16.
    """
    import torch
    from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed = tensors["weight_packed"]
    rows, width = packed.shape
    return dequantize(
        x_q=unpack_fp4_from_uint8(packed, rows, 2 * width, torch.float32),
        scale=tensors["weight_scale"].float(),
        args=scheme.weights,
        dtype=torch.float32,
        global_scale=tensors["weight_global_scale"],
    )


def decompress_modelopt(state: State, config: Mapping[str, Any]) -> State:
    """Weights that ModelOpt exported, FP8 and NVFP4, dequantized by its code."""
    try:
        from modelopt.torch.export.quant_utils import QUANTIZATION_FP8, from_quantized_weight
    except ImportError as error:
        raise backend_missing("modelopt") from error
    import torch

    result = {name: value for name, value in state.items() if not name.endswith(_UNUSED)}
    for name in [name for name in state if name.endswith("weight_scale")]:
        scale, whole = result.pop(name), result.pop(f"{name}_2", None)
        stem = name.removesuffix("weight_scale")
        weight = f"{stem}weight" if stem.endswith(".") else stem.removesuffix("_")
        codes = result[weight]
        if whole is not None:
            result[weight] = _nvfp4(codes, scale, whole)
            continue
        if scale.numel() > 1:  # one for each row, or for each expert
            scale = scale.reshape(-1, *[1] * (codes.ndim - 1))
        result[weight] = from_quantized_weight(codes, scale, QUANTIZATION_FP8, torch.float32)
    return result


def _nvfp4(packed: Any, scale: Any, whole: Any) -> Any:
    """Packed [N, K / 2] to [N, K], or of experts [E, K / 2, N] to [E, K, N]."""
    import torch
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    stacked = packed.ndim == 3
    if stacked:
        packed, scale = packed.mT.contiguous(), scale.mT.contiguous()
    shape = torch.Size([*packed.shape[:-1], 2 * packed.shape[-1]])
    tensor = NVFP4QTensor(shape, torch.float32, packed)
    weight = tensor.dequantize(dtype=torch.float32, scale=scale, double_scale=whole, block_sizes={-1: 16})
    return weight.mT if stacked else weight


def decompress_fbgemm(state: State, config: Mapping[str, Any]) -> State:
    """Weights of transformers' fbgemm_fp8: its kernels need a GPU, so its products of codes and scales in PyTorch."""
    result = dict(state)
    for name in [name for name in state if name.endswith("_scale")]:
        scale, weight = result.pop(name).float(), name.removesuffix("_scale")
        if weight.endswith("experts.down_proj"):
            scale = scale.mT  # stored [E, N, 1] for a weight [E, K, N]
        result[weight] = result[weight].float() * scale
    return result
