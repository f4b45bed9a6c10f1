"""llama.cpp's converter and quantizer, to be timed; runs in the environment of ``llama_environment.py``.

    python benchmarks/peer_llama.py convert LLAMA_CPP CKPT OUT.gguf
    python benchmarks/peer_llama.py quantize IN.gguf OUT.gguf --type Q4_0 --threads 2

``convert`` is the class behind llama.cpp's own ``convert_hf_to_gguf.py --outtype bf16``, from the source that the
library was built of, without the tokenizer (checkpoints made for benchmarks have none). It reads lazily, turns each
tensor into float32, transposes experts, rounds to BF16 and writes. ``quantize`` is ``llama_model_quantize``, the
function behind ``llama-quantize``: every linear layer and expert in one type (``pure``), embedding and head left in
BF16, as our recipe leaves them. Prints one JSON object: seconds of the work alone, without start and imports.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    step = steps.add_parser("convert")
    step.add_argument("source", type=Path, metavar="LLAMA_CPP", help="llama.cpp's source folder")
    step.add_argument("checkpoint", type=Path, metavar="CKPT")
    step.add_argument("output", type=Path, metavar="OUT.gguf")
    step.set_defaults(run=convert)
    step = steps.add_parser("quantize")
    step.add_argument("input", type=Path, metavar="IN.gguf")
    step.add_argument("output", type=Path, metavar="OUT.gguf")
    step.add_argument("--type", choices=["Q4_0", "Q4_K_S"], default="Q4_0")
    step.add_argument("--threads", type=int, default=os.cpu_count())
    step.set_defaults(run=quantize)
    options = parser.parse_args()
    print(json.dumps({"seconds": options.run(options)}))


def convert(options: argparse.Namespace) -> float:
    """Safetensors to a GGUF file of the same precision: experts transposed and split, as llama.cpp wants them."""
    sys.path[:0] = [str(options.source), str(options.source / "gguf-py")]
    import gguf
    import torch
    from conversion.llama import Llama4Model

    class WithoutTokenizer(Llama4Model):
        model_arch = Llama4Model.model_arch

        def set_vocab(self) -> None:
            self._set_vocab_none()

    logging.basicConfig(level=logging.WARNING)
    start = time.perf_counter()
    with torch.inference_mode():
        WithoutTokenizer(options.checkpoint, gguf.LlamaFileType.MOSTLY_BF16, options.output).write()
    return time.perf_counter() - start


def quantize(options: argparse.Namespace) -> float:
    """A BF16 GGUF file to one in 4 bits."""
    import ctypes

    import gguf
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = options.threads
    params.ftype = gguf.LlamaFileType[f"MOSTLY_{options.type}"]
    params.pure = True
    params.token_embedding_type = params.output_tensor_type = gguf.GGMLQuantizationType.BF16
    start = time.perf_counter()
    failed = llama_cpp.llama_model_quantize(bytes(options.input), bytes(options.output), ctypes.byref(params))
    seconds = time.perf_counter() - start
    if failed:
        sys.exit(f"llama_model_quantize returned {failed}")
    return seconds


if __name__ == "__main__":
    main()
