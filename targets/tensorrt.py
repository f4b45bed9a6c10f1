"""Full TensorRT with l4convert's plugin library: experts and attention stay calls, which the plugins compute."""

from l4convert.quantization.kv import KvDtype

SUMMARY = "TensorRT engines: MoE and LongContextAttention are left as nodes for the plugin library"
LOWERING = ("store_compute_type", "pack_experts", "move_activation_scales")
# What the attention plugin has kernels for (l4_kv in plugins/long_context_attention/launch.h). INT4 has none:
# two codes a byte along the head want a tile of another width in every kernel (docs/adr/0018).
KV_DTYPES: tuple[KvDtype, ...] = ("fp8", "int8")
