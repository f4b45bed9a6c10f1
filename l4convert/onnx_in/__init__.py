"""Reading an ONNX model that somebody else wrote: everything is checked first, and weights stay where they are."""

from l4convert.onnx_in.model_file import OnnxInput, open_onnx

__all__ = ["OnnxInput", "open_onnx"]
