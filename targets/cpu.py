"""ONNX Runtime on CPU, in float32: it has no BF16 kernels to speak of, and all of these kernels in float32."""

SUMMARY = "ONNX Runtime, CPU: QMoE, MatMulNBits and GroupQueryAttention kernels, float32 compute"
LOWERING = (
    "lower_attention_to_gqa",
    "lower_moe_to_qmoe",
    "lower_matmul_to_nbits",
    "split_activation_scales",
    "inline_functions",
)
