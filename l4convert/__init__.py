"""L4convert: Llama 4 checkpoints to ONNX and TensorRT, proven equal to the reference."""

import os

__version__ = "0.1.0"

# Unless this is set before it is loaded, ONNX Runtime reports its use to its maker over the network and keeps an
# identifier in the user's cache (its Privacy.md). A command that reads local files must open nothing else.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
