"""ONNX Runtime on NVIDIA GPUs, in bfloat16 or float16: its CUDA kernels of attention and experts know no other type.

A float32 artifact of this target is for checks on a CPU: it is the same graph, with the same kernels.
"""

SUMMARY = "ONNX Runtime, CUDA: QMoE, MatMulNBits and GroupQueryAttention kernels, bfloat16 or float16 compute"
LOWERING = (
    "store_compute_type",
    "lower_attention_to_cuda_gqa",
    "lower_moe_to_cuda_qmoe",
    "lower_moe_to_expert_products",
    "lower_matmul_to_nbits",
    "move_activation_scales",
    "lower_matmul_to_fp8_weights",
    "widen_dequantization",
    "inline_functions",
)
KV_CACHES = ("static", "growing")
