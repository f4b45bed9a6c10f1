"""L4convert: Llama 4 checkpoints to ONNX and TensorRT, proven equal to the reference."""

__version__ = "0.1.0"
