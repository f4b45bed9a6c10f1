"""What merging LoRA adapters costs a conversion: time, processor time and memory, beside the same without an adapter.

Adapters are made up: random factors for the given checkpoint, of the modules that trainers commonly adapt.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from measuring import Unavailable, run, warm
from safetensors.numpy import save_file

from l4convert.checkpoint import open_checkpoint

PARAMETERS = ("gate_up_proj", "down_proj")
LINEAR = ("self_attn", "shared_expert", "feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj")
KINDS = ("linear", "linear and experts")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="of real shapes: see make_checkpoint.py")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--recipes", nargs="+", default=["none", "int4"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR")
    parser.add_argument("--convert-options", default="", metavar="TEXT", help='more for l4convert: "--jobs 2"')
    options = parser.parse_args()
    more = options.convert_options.split()
    with tempfile.TemporaryDirectory(prefix="l4convert-adapters-", dir=options.scratch) as folder:
        scratch = Path(folder)
        adapters: dict[str, Path | None] = {"none": None}
        for kind in KINDS:
            for rank in options.ranks:
                path = scratch / f"{len(adapters)}"
                adapters[f"{kind}, rank {rank}"] = write_adapter(options.checkpoint, path, rank, kind == KINDS[1])
        print("| recipe | adapter | its bytes | weights merged | seconds | processor seconds | peak memory |")
        print("|---|---|---|---|---|---|---|")
        for recipe in options.recipes:
            for name, adapter in adapters.items():
                try:
                    print(row(options, recipe, name, adapter, scratch / "out", more), flush=True)
                except Unavailable as error:
                    print(f"error: {error}", file=sys.stderr)
                    return 3
    return 0


def write_adapter(checkpoint: Path, path: Path, rank: int, experts: bool) -> Path:
    """An adapter of every attention and MLP matrix, and of the stacked experts where asked for."""
    tensors = open_checkpoint(checkpoint).tensors
    factors = {f"base_model.model.{name}": array for name, array in make_factors(tensors, rank, experts)}
    path.mkdir()
    save_file(factors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "peft_version": "0.21.2", "r": rank, "lora_alpha": 2 * rank, "target_modules": []}
    parameters = [f"feed_forward.experts.{name}" for name in PARAMETERS] if experts else None
    (path / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": parameters}))
    return path


def make_factors(tensors: Mapping[str, object], rank: int, experts: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 content of factors; a stack of experts [E, n, m] has A [E r, m] and B [n, r E]."""
    random = np.random.default_rng(0)
    for name, tensor in tensors.items():
        shape = getattr(tensor, "dims", ())
        module = name.removesuffix(".weight")
        if experts and name.endswith(tuple(f".experts.{parameter}" for parameter in PARAMETERS)):
            inner = ".base_layer" if name.endswith(PARAMETERS[0]) else ""
            module, _, _ = name.rpartition(".")
            module, a, b = f"{module}{inner}", (shape[0] * rank, shape[2]), (shape[1], rank * shape[0])
        elif len(shape) == 2 and any(f".{part}" in name for part in LINEAR):
            a, b = (rank, shape[1]), (shape[0], rank)
        else:
            continue
        yield f"{module}.lora_A.weight", random.standard_normal(a, np.float32) * np.float32(0.01)
        yield f"{module}.lora_B.weight", random.standard_normal(b, np.float32) * np.float32(0.01)


def row(options: argparse.Namespace, recipe: str, name: str, adapter: Path | None, out: Path, more: list[str]) -> str:
    """The median of the rounds of one conversion, as a row of a table."""
    command = [sys.executable, "-m", "l4convert", "-q", "convert", str(options.checkpoint), "-o", str(out)]
    command += ["--recipe", recipe, *more, *([] if adapter is None else ["--adapter", str(adapter)])]
    seconds, processor, peaks = [], [], []
    warm(sorted(options.checkpoint.glob("*.safetensors")))
    for _ in range(options.rounds):
        shutil.rmtree(out, ignore_errors=True)
        before = processor_seconds()
        done = run(command)
        seconds.append(done.seconds)
        processor.append(processor_seconds() - before)
        peaks.append(done.peak_rss)
    shutil.rmtree(out, ignore_errors=True)
    merged, size = share(options.checkpoint, adapter)
    return (
        f"| {recipe} | {name} | {size} | {merged} | {statistics.median(seconds):.1f} | "
        f"{statistics.median(processor):.1f} | {max(peaks) / 1e6:,.0f} MB |"
    )


def share(checkpoint: Path, adapter: Path | None) -> tuple[str, str]:
    """What share of the weights is merged, and the adapter's bytes."""
    from l4convert.checkpoint.adapters import merge_adapters

    if adapter is None:
        return "0%", ""
    found = merge_adapters(open_checkpoint(checkpoint), [adapter])
    whole = sum(tensor.size for tensor in found.tensors.values())
    merged = sum(found.tensors[name].size for name in found.adapters[0].merged)
    return f"{merged / whole:.0%}", f"{(adapter / 'adapter_model.safetensors').stat().st_size / 1e6:,.0f} MB"


def processor_seconds() -> float:
    """Of all ended children of this process."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
