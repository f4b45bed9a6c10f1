"""The options that say how a checkpoint is converted; ``convert`` and ``plan`` take the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from l4convert.cli._complete import folders, recipe_names, target_names

F = TypeVar("F", bound=Callable[..., Any])

EPILOG = """\b
Recipes:
  int4          weights of attention, MLP and experts in 4 bits, one scale a block
  fp8           the same weights in E4M3, activations quantized per token at run time
  fp8-experts   only the routed experts in E4M3
  keep          what the checkpoint stores in INT4 or FP8 with the same codes, the rest unquantized
  none          no quantization: what the checkpoint stores quantized is dequantized exactly
  FILE.toml     your own: a scheme for each name pattern, the first match wins

\b
KV caches:
  growing       the past is an input that grows; what ONNX Runtime GenAI and optimum expect by default
  static        preallocated buffers, updated in place
  windowed      growing, but chunked layers keep at most one chunk: least memory

\b
Types of keys and values (their scales are found on a text: `convert --calibration FILE`):
  fp8           E4M3, one byte
  int8          one byte
  int4          half a byte
"""


def adapter_option(text: str) -> Callable[[F], F]:
    """The option ``--adapter``, as ``adapters``."""
    return click.option("--adapter", "adapters", multiple=True, type=click.Path(path_type=Path), metavar="DIR",
                        shell_complete=folders, help=text)  # fmt: skip


def conversion_options(function: F) -> F:
    """Decorator: target, recipe, block size, form and type of the cache, compute type, sharing."""
    options = [
        click.option("--target", default="cpu", show_default=True, metavar="NAME", shell_complete=target_names,
                     help="What to make it for; `l4convert targets` lists them."),
        click.option("--recipe", default="int4", show_default=True, metavar="NAME|FILE", shell_complete=recipe_names,
                     help="How to quantize; see below."),
        click.option("--block-size", type=click.Choice([32, 64, 128]),
                     help="Weights that share an INT4 scale."
                          "  [default: the checkpoint's groups, else 128 for TensorRT, else the recipe's]"),
        click.option("--kv-cache", type=click.Choice(["growing", "static", "windowed"]),
                     help="Form of the key/value cache; see below.  [default: the target's first]"),
        click.option("--kv-dtype", type=click.Choice(["fp8", "int8", "int4", "none"]),
                     help="Quantize keys and values; see below.  [default: the recipe's, else none]"),
        click.option("--kv-granularity", type=click.Choice(["head", "channel"]),
                     help="What shares a scale in them.  [default: the recipe's, else head for fp8, else channel]"),
        click.option("--kv-layers", type=click.Choice(["all", "global"]),
                     help="Layers in which they are: all, or those that see the whole context.  [default: all]"),
        click.option("--compute", type=click.Choice(["float32", "bfloat16", "float16"]),
                     help="Type of activations and caches.  [default: the target's first]"),
        adapter_option("Merge a LoRA adapter, as PEFT saves it: DIR or hf://org/name; repeat for more, in order."),
        click.option("--share-weights", is_flag=True,
                     help="Leave weights that need no change in the checkpoint's own files; OUT gets links to them."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function
