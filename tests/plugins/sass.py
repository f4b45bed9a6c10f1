"""Count the instructions of a kernel's inner loop, as the GPU gets them.

    python -m tests.plugins.sass moe_gate_up_int4_bf16_m8 90

compiles the kernel (or takes it from build/plugins/cache) and shows what its loop is made of.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import click

from l4convert.plugins.library.compile import Compiled, compile_all, jobs_of
from l4convert.plugins.moe.variants import variants

CUBINS = Path(__file__).resolve().parents[2] / "build" / "plugins" / "cache" / "cubins"
TENSOR_CORES = ("HMMA", "HGMMA", "QMMA", "QGMMA")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH = re.compile(r"BRA.*`\((\.L_x_\d+)\)")


def compiled(variant: str, sm: int) -> Compiled:
    """A kernel of the MoE op."""
    chosen = [v for v in variants() if v.name == variant]
    return compile_all(jobs_of({"moe": chosen}, [sm]), CUBINS, 1)[0]


def inner_loop(kernel: Compiled) -> Counter[str]:
    """How often each instruction stands in the smallest loop that uses the tensor cores."""
    lines = _disassemble(kernel.image)
    labels = {match[1]: number for number, line in enumerate(lines) if (match := _LABEL.match(line))}
    loops = []
    for number, line in enumerate(lines):
        branch = _BRANCH.search(line)
        if branch and labels.get(branch[1], number) < number:
            names = [match[1] for text in lines[labels[branch[1]] : number + 1] if (match := _INSTRUCTION.match(text))]
            loops.append(names)
    return Counter(min((names for names in loops if any(n.startswith(TENSOR_CORES) for n in names)), key=len))


def weights_of_a_thread(kernel: Compiled) -> float:
    """Weights that one thread of 32 a warp dequantizes in one turn of the loop."""
    constants = kernel.job.variant.constants
    sizes = [int(constants[name]) for name in ("SPLIT", "COLUMNS", "DEPTH")]
    return sizes[0] * sizes[1] * sizes[2] * (1 + int(constants["GATED"])) / (32 * kernel.warps)


def _disassemble(image: bytes) -> list[str]:
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout.splitlines()


def _main(variant: str, sm: str) -> None:
    kernel = compiled(variant, int(sm))
    loop, weights = inner_loop(kernel), weights_of_a_thread(kernel)
    families = Counter[str]()
    for name, count in loop.items():
        families[name.split(".")[0]] += count
    click.echo(f"{variant}, SM {sm}: {kernel.resources}")
    click.echo(f"{loop.total()} instructions for {weights:g} weights of a thread: {loop.total() / weights:.2f}")
    click.echo(", ".join(f"{count} {name}" for name, count in families.most_common()))


if __name__ == "__main__":
    _main(*sys.argv[1:])
