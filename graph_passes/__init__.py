"""Graph passes: one file each, and the tables that say which run, in which order."""

from __future__ import annotations

from functools import partial

from l4convert.graph_passes import (
    expand_rotary_embedding,
    fuse_experts,
    inline_functions,
    lower_attention_to_gqa,
    lower_attention_to_tensor_scatter,
    lower_matmul_to_fp8_weights,
    lower_matmul_to_nbits,
    lower_moe_to_expert_products,
    lower_moe_to_loop,
    lower_moe_to_qmoe,
    move_activation_scales,
    name_weights,
    normalize_experts,
    normalize_linear,
    normalize_norms,
    outline_attention,
    outline_exported_attention,
    pack_experts,
    quantize_kv_cache,
    quantize_weights,
    split_activation_scales,
    store_compute_type,
    upgrade_opset,
    widen_dequantization,
)
from l4convert.graph_passes.base import Pass, PassReport
from l4convert.graph_passes.providers import CUDA

__all__ = ["CANONICAL_PASSES", "LOWERING_PASSES", "NORMALIZING_PASSES", "PASSES", "Pass", "PassReport"]

#: Run on graphs that somebody else exported, in this order, before all others.
NORMALIZING_PASSES: tuple[Pass, ...] = (
    Pass(
        "upgrade_opset",
        "a model for older standard operators is declared one for opset 23, where its own mean the same there",
        upgrade_opset.run,
    ),
    Pass(
        "name_weights",
        "weights get the names that recipes know, from the modules that an exporter noted down",
        name_weights.run,
    ),
    Pass(
        "normalize_linear",
        "Gemm, and Transpose of a stored weight, become MatMul with a matrix [in,out]",
        normalize_linear.run,
    ),
    Pass(
        "normalize_norms",
        "a root mean square that was taken apart becomes RMSNormalization",
        normalize_norms.run,
    ),
    Pass(
        "outline_exported_attention",
        "scores, mask and softmax become one call of l4convert::LongContextAttention",
        outline_exported_attention.run,
    ),
    Pass(
        "normalize_experts",
        "products of all tokens with all experts become the canonical form, of which only chosen experts compute",
        normalize_experts.run,
    ),
)

#: Run for every target, in this order.
CANONICAL_PASSES: tuple[Pass, ...] = (
    Pass(
        "outline_attention",
        "each layer's attention becomes one call of l4convert::LongContextAttention",
        outline_attention.run,
    ),
    Pass(
        "fuse_experts",
        "routed experts, stacked or one by one, become one call of l4convert::MoE",
        fuse_experts.run,
    ),
    Pass(
        "quantize_weights",
        "weights that the recipe names become INT4 or FP8 with DequantizeLinear",
        quantize_weights.run,
        exact=False,
    ),
    Pass(
        "quantize_kv_cache",
        "key/value caches that the recipe names hold FP8, INT8 or INT4 elements, with scales that are calibrated",
        quantize_kv_cache.run,
        exact=False,
    ),
)

#: Chosen by targets, in the order that the target lists.
LOWERING_PASSES: tuple[Pass, ...] = (
    Pass(
        "store_compute_type",
        "weights are stored in the type they are computed with, where that is not wider",
        store_compute_type.run,
        exact=False,
    ),
    Pass(
        "pack_experts",
        "MoE takes quantized weights as the plugin's kernels read them, packed in words, with their scales",
        pack_experts.run,
    ),
    Pass(
        "lower_attention_to_gqa",
        "LongContextAttention becomes ONNX Runtime's GroupQueryAttention, the definition where that does not apply",
        lower_attention_to_gqa.run,
    ),
    Pass(
        "lower_attention_to_cuda_gqa",
        "LongContextAttention becomes GroupQueryAttention, which rotates and norms heads itself on CUDA",
        partial(lower_attention_to_gqa.run, provider=CUDA),
    ),
    Pass(
        "lower_attention_to_tensor_scatter",
        "LongContextAttention writes its caches in place with TensorScatter and reads them whole, under a mask",
        lower_attention_to_tensor_scatter.run,
    ),
    Pass(
        "lower_moe_to_loop",
        "MoE becomes a Loop over tiles of tokens, each with the packed weights of one expert",
        lower_moe_to_loop.run,
    ),
    Pass(
        "lower_moe_to_qmoe",
        "MoE becomes ONNX Runtime's QMoE (INT4 experts) or MoE (any other weights)",
        lower_moe_to_qmoe.run,
    ),
    Pass(
        "lower_moe_to_cuda_qmoe",
        "MoE becomes QMoE (INT4 experts) or MoE (unquantized ones) as the CUDA provider takes them",
        partial(lower_moe_to_qmoe.run, provider=CUDA),
    ),
    Pass(
        "lower_moe_to_expert_products",
        "MoE becomes a product for each expert with the tokens that chose it",
        lower_moe_to_expert_products.run,
    ),
    Pass(
        "lower_matmul_to_nbits",
        "MatMul with an INT4 matrix becomes ONNX Runtime's MatMulNBits",
        lower_matmul_to_nbits.run,
    ),
    Pass(
        "split_activation_scales",
        "FP8 activations are rescaled by a Mul, which ONNX Runtime does not fuse into a kernel that refuses FP8",
        split_activation_scales.run,
    ),
    Pass(
        "move_activation_scales",
        "FP8 activations are rounded with scale 1, and the product is multiplied by the tokens' scales",
        move_activation_scales.run,
    ),
    Pass(
        "lower_matmul_to_fp8_weights",
        "MatMul with an FP8 matrix becomes ONNX Runtime's MatMulBlockQuantizedFp8Weight, which only CUDA has",
        lower_matmul_to_fp8_weights.run,
    ),
    Pass(
        "widen_dequantization",
        "DequantizeLinear to bfloat16, which ONNX Runtime does not have, goes through float32",
        widen_dequantization.run,
    ),
    Pass(
        "expand_rotary_embedding",
        "RotaryEmbedding becomes products and sums of pairs",
        expand_rotary_embedding.run,
    ),
    Pass(
        "inline_functions",
        "calls that are left become plain ONNX; repeated subexpressions are shared",
        inline_functions.run,
    ),
)

PASSES: tuple[Pass, ...] = CANONICAL_PASSES + LOWERING_PASSES + NORMALIZING_PASSES
