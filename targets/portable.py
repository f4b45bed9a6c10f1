"""Any ONNX runtime: standard operators of opset 23 only, quantization as DequantizeLinear."""

SUMMARY = "any ONNX runtime: standard operators of opset 23 only"
LOWERING = ("split_activation_scales", "inline_functions")
