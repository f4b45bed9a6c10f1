"""What a call of each plugin must at least move and multiply, and how long a GPU takes for that at its limits.

    python benchmarks/roofline.py [moe|attention] [--hardware h100]

prints the roofline tables of the plugins' READMEs, for a bundled hardware profile or a file. The same formulas are the
bytes and FLOPs of ``benchmarks/gpu.py``, which puts measured limits in the profile's place.

Every input is read once and every output written once; nothing else is counted: no second reading, and no workspace
(plugins/moe/README.md adds the rows between the two products, which matter for long prompts only).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from l4convert.errors import L4Error
from l4convert.targets.hardware import Hardware, load_hardware

HERE = Path(__file__).resolve().parent

FLOAT = 2  # bytes of bfloat16 and float16: activations, scales of weights, weights that are not quantized
POSITION = 8  # int64
FLOAT32 = 4  # router logits, rotary tables, scales of caches


@dataclass(frozen=True)
class Limits:
    """What a GPU does at most.

    Attributes:
        bandwidth: Bytes a second of its memory, read and written together.
        flops: "bf16" and "fp8" -> multiplications and additions a second; what is not known is left out.
    """

    bandwidth: float
    flops: Mapping[str, float]


@dataclass(frozen=True)
class Work:
    """One call.

    Attributes:
        read, written: Bytes of device memory.
        flops: Multiplications and additions of its matrix products.
        rate: Which rate they can have: "bf16" or "fp8".
    """

    read: int
    written: int
    flops: int
    rate: str = "bf16"

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def seconds(self, limits: Limits) -> float:
        """The longer of moving and multiplying: no kernel is faster."""
        return max(self.moved / limits.bandwidth, self.matrix_seconds(limits))

    def matrix_seconds(self, limits: Limits) -> float:
        """Of multiplying alone; 0 where the rate is not known."""
        rate = limits.flops.get(self.rate)
        return self.flops / rate if rate else 0.0

    def bound(self, limits: Limits) -> str:
        """What limits it: "memory" or "matrix"."""
        return "matrix" if self.matrix_seconds(limits) > self.moved / limits.bandwidth else "memory"


@dataclass(frozen=True)
class Experts:
    """The routed experts of a layer: E of them, H x 2I and I x H each, K chosen by a token.

    Attributes:
        weights: "int4", "fp8" (activations rounded to FP8, too) or "plain" (16 bits).
        block: K of a scale, INT4 only.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    weights: str
    block: int = 0

    @property
    def expert_bytes(self) -> int:
        """Of one expert's two matrices with their scales."""
        hidden, width = self.hidden_size, self.intermediate_size
        return self._matrix_bytes(hidden, 2 * width) + self._matrix_bytes(width, hidden)

    def _matrix_bytes(self, inner: int, columns: int) -> int:
        if self.weights == "int4":
            return inner * columns // 2 + inner // self.block * columns * FLOAT
        return inner * columns + columns * FLOAT if self.weights == "fp8" else inner * columns * FLOAT

    def work(self, tokens: int, chosen: int) -> Work:
        """Of ``tokens`` tokens that choose ``chosen`` different experts: each of those is read once."""
        row = self.hidden_size * FLOAT
        read = chosen * self.expert_bytes + tokens * (row + self.num_experts * FLOAT32)
        flops = 6 * tokens * self.top_k * self.hidden_size * self.intermediate_size  # 2 x (H x 2I + I x H)
        return Work(read, tokens * row, flops, "fp8" if self.weights == "fp8" else "bf16")


@dataclass(frozen=True)
class Attention:
    """The attention of a layer: Hq query heads over Hk cached heads, D wide.

    Attributes:
        chunk_size: C, or 0 for a global layer, which does not rotate.
        kv: How the cache is stored: "none" (16 bits), "fp8" or "int8".
    """

    num_heads: int
    kv_num_heads: int
    head_dim: int
    chunk_size: int
    kv: str = "none"

    @property
    def slot_bytes(self) -> int:
        """Key and value of one token in the cache."""
        return 2 * self.kv_num_heads * self.head_dim * (FLOAT if self.kv == "none" else 1)

    def work(self, batch: int, new: int, context: int) -> Work:
        """Of ``batch`` sequences whose last ``new`` of ``context`` tokens are given in this call."""
        token = self.head_dim * FLOAT
        queries, keys = new * self.num_heads * token, 2 * new * self.kv_num_heads * token
        tables = min(new, self.chunk_size) * self.head_dim * FLOAT32  # D/2 cosines and sines a row; shared by the batch
        scales = 2 * self.kv_num_heads * self.head_dim * FLOAT32 if self.kv != "none" else 0
        read = batch * (self.past(new, context) * self.slot_bytes + queries + keys + new * POSITION) + tables + scales
        written = batch * (self.kept(new, context) * self.slot_bytes + queries)
        return Work(read, written, 4 * batch * self.num_heads * self.head_dim * self.pairs(new, context))

    def past(self, new: int, context: int) -> int:
        """Cached tokens that the first new token, and so any, can see."""
        before = context - new
        return before % self.chunk_size if self.chunk_size else before

    def kept(self, new: int, context: int) -> int:
        """New tokens that go to the cache: in a chunked layer those of the last token's chunk."""
        return min(new, (context - 1) % self.chunk_size + 1) if self.chunk_size else new

    def pairs(self, new: int, context: int) -> int:
        """Keys that the new tokens see, all of them together."""
        return self._seen(context) - self._seen(context - new)

    def _seen(self, tokens: int) -> int:
        """The same for the first tokens of a sequence."""
        full, rest = divmod(tokens, self.chunk_size) if self.chunk_size else (0, tokens)
        return full * (self.chunk_size * (self.chunk_size + 1) // 2) + rest * (rest + 1) // 2


def limits_of(hardware: Hardware) -> Limits:
    """A profile's published limits.

    Raises:
        ValueError: It has no bandwidth.
    """
    if not hardware.bandwidth_bytes_per_second:
        raise ValueError(f"the profile {hardware.name} has no bandwidth")
    return Limits(hardware.bandwidth_bytes_per_second, dict(hardware.peak_flops))


def markdown(rows: Sequence[tuple[str, Work]], limits: Limits) -> str:
    """The table of a README: bytes, operations and the least time of each call."""
    lines = ["| Call | GB read | GB written | TFLOP | bound by | at least, us |", "|---|---|---|---|---|---|"]
    for name, work in rows:
        numbers = (work.read / 1e9, work.written / 1e9, work.flops / 1e12)
        cells = [name, *(f"{number:.4g}" for number in numbers), work.bound(limits)]
        lines.append(f"| {' | '.join(cells)} | {work.seconds(limits) * 1e6:,.4g} |")
    return "\n".join(lines)


def published(parser: argparse.ArgumentParser, name: str) -> tuple[Hardware, Limits]:
    """A hardware profile by its name or file, and its limits; a wrong one ends the script as a wrong option does."""
    try:
        hardware = load_hardware(name)
        return hardware, limits_of(hardware)
    except (L4Error, ValueError) as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    from gpu_workloads import ATTENTION, MOE

    tables = {"moe": MOE, "attention": ATTENTION}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="?", choices=tuple(tables), help="only this plugin")
    parser.add_argument("--hardware", default="h100", metavar="NAME|FILE", help="profile (default: h100)")
    options = parser.parse_args(arguments)
    hardware, limits = published(parser, options.hardware)
    print(f"{hardware.summary}: {limits.bandwidth / 1e12:.3g} TB/s, as published")
    for op in [options.op] if options.op else tables:
        print(f"\n{markdown([(row.name, row.work) for row in tables[op]], limits)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
