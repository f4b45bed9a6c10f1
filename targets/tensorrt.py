"""Full TensorRT with l4convert's plugin library: experts and attention stay calls, which the plugins compute."""

SUMMARY = "TensorRT engines: MoE and LongContextAttention are left as nodes for the plugin library"
LOWERING = ("store_compute_type", "pack_experts", "move_activation_scales")
