"""Which GPU is here, and whether this Python can measure on it: run with nothing installed, before anything is.

``--probe`` names the GPU; where there is none: one line and exit code 5. ``--ready`` ends with 0 when this Python has
what ``make gpu`` needs, else with 1.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from l4convert.gpus import Gpus, find_gpus

# What the kernels' part of `make gpu` imports, by its modules' names.
NEEDED = ("torch", "triton", "numpy", "ml_dtypes", "onnx", "onnx_ir", "click", "rich", "safetensors", "xxhash")


def probe() -> Gpus:
    """Print the first GPU, or on stderr why there is none."""
    found = find_gpus()
    if found.devices:
        gpu = found.devices[0]
        print(f"{gpu.name}, compute capability {gpu.compute_capability}, CUDA driver {found.driver}", flush=True)
    else:
        print(f"error: {found.problem} on this machine; `make gpu` needs an NVIDIA GPU", file=sys.stderr)
    return found


def missing() -> str | None:
    """What this Python lacks, in one line; None where it has everything."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        return ", ".join(lacking)
    import torch

    return None if torch.version.cuda else f"torch with CUDA (this is {torch.__version__})"


def main(arguments: list[str]) -> int:
    if "--probe" in arguments:
        return 0 if probe().devices else 5
    return 0 if missing() is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
