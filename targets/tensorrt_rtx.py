"""TensorRT-RTX: engines that are built without a GPU. Its ONNX parser decides what the graph may hold (DESIGN 7)."""

from l4convert.quantization.kv import KvDtype

SUMMARY = "TensorRT-RTX engines: in-place caches, packed experts in a loop, fused INT4 and FP8 products"
LOWERING = (
    "store_compute_type",
    "lower_attention_to_tensor_scatter",
    "lower_moe_to_loop",
    "move_activation_scales",
    "expand_rotary_embedding",
    "inline_functions",
)
# Its KV-cache layer takes caches of floats only, and nothing else writes them in place (docs/adr/0017).
KV_DTYPES: tuple[KvDtype, ...] = ()
