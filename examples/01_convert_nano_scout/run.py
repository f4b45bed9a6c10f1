"""Convert the bundled nano Scout to INT4 and FP8, validate, generate text, build engines for GPUs, print the tables.

Every step is a command of the command line, printed before it runs; nothing here uses the library directly.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "checkpoint"
HELDOUT = HERE / "heldout.txt"
#: Folder name of the artifact -> options of ``convert``.
ARTIFACTS = {
    "none-cpu": ["--recipe", "none", "--target", "cpu"],
    "int4-cpu": ["--recipe", "int4", "--target", "cpu"],
    "int4-static": ["--recipe", "int4", "--target", "cpu", "--kv-cache", "static"],
    "fp8-portable": ["--recipe", "fp8", "--target", "portable"],
    "int4-rtx": ["--recipe", "int4", "--target", "tensorrt-rtx"],
    "fp8-rtx": ["--recipe", "fp8", "--target", "tensorrt-rtx"],
}
#: Artifact -> hardware profiles to build engines for, without any of these GPUs: SM 8.0 (which has no FP8), 8.9, 12.0.
ENGINES = {
    "int4-rtx": ["a100-80g", "rtx-4090", "rtx-5090"],
    "fp8-rtx": ["rtx-4090", "rtx-5090"],
}
PROMPT = "def __init__(self, "


def main() -> int:
    """Run all steps; the exit code is that of the first command that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "out", help="folder for the artifacts (default: out)")
    parser.add_argument("--tokens", type=int, default=3000, help="held-out tokens to compare on")
    options = parser.parse_args()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    print("$ cd", shlex.quote(os.path.relpath(HERE)))
    try:
        rows = [convert_and_validate(output / name, flags, options.tokens) for name, flags in ARTIFACTS.items()]
        artifact = shown(output / "int4-static")
        l4convert(
            "generate", artifact, "--prompt", PROMPT, "--max-new-tokens", "100", "--temperature", "0.7", "--seed", "7"
        )
        engines = [row for name, gpus in ENGINES.items() for row in build(output / name, gpus, rows)]
    except subprocess.CalledProcessError as error:
        return error.returncode
    print(f"\nParity with transformers (eager, float32) on {options.tokens} held-out tokens, every split of them\n")
    print(table(rows))
    print("\nEngines built here, each for the GPU named; parity is that of the ONNX that the builder was given\n")
    print(table(engines))
    return 0


def convert_and_validate(artifact: Path, flags: list[str], tokens: int) -> dict[str, Any]:
    """Make one artifact, check its digests, compare it; returns its row of the table."""
    out = shown(artifact)
    l4convert("convert", shown(CHECKPOINT), "--output", out, *flags, "--overwrite", "--quiet")
    l4convert("verify", out)
    l4convert(
        *["validate", out, "--reference", shown(CHECKPOINT), "--text", shown(HELDOUT)],
        *["--tokens", str(tokens), "--window", "600", "--quiet"],
    )
    report = json.loads((artifact / "parity.json").read_text())
    whole = report["rows"][0]["reference"]
    return {
        "artifact": artifact.name,
        "weights": f"{(artifact / 'model.safetensors').stat().st_size / 1e6:.2f} MB",
        "max |d| / max |logit|": f"{max(row['reference']['max_rel_logit'] for row in report['rows']):.1e}",
        "mean KL": f"{whole['mean_kl']:.2e}",
        "p99 KL": f"{whole['p99_kl']:.2e}",
        "top-1": f"{whole['top1']:.4f}",
        "perplexity": f"{whole['ppl_artifact']:.3f}",
        "reference": f"{whole['ppl_reference']:.3f}",
        "parity": "pass" if report["passed"] else "FAIL",
    }


def build(artifact: Path, gpus: list[str], parity: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make engines of an artifact and check their digests; returns a row of the table for each."""
    out = shown(artifact)
    targets = [word for gpu in gpus for word in ("--target", gpu)]
    l4convert("build", out, *targets, "--max-context", "2048", "--overwrite", "--quiet")
    l4convert("verify", out)
    engines = json.loads((artifact / "l4convert.json").read_text())["engines"]
    (own,) = (row for row in parity if row["artifact"] == artifact.name)
    return [
        {
            "artifact": artifact.name,
            "GPU": engine["hardware"],
            "SM": engine["compute_capability"],
            "plan": f"{engine['bytes'] / 1e6:.2f} MB",
            "weights in it": f"{engine['weights_bytes'] / 1e6:.2f} MB",
            "scratch": f"{max(engine['scratch_bytes']) / 1e6:.0f} MB",
            "mean KL": own["mean KL"],
            "top-1": own["top-1"],
            "parity": own["parity"],
        }
        for engine in engines
    ]


def l4convert(*arguments: str) -> None:
    """Show a command and run it in this folder."""
    print("$", shlex.join(["l4convert", *arguments]), flush=True)
    subprocess.run([sys.executable, "-m", "l4convert", *arguments], check=True, cwd=HERE)


def shown(path: Path) -> str:
    """A path as a person would type it in this folder."""
    return str(path.relative_to(HERE)) if path.is_relative_to(HERE) else str(path)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned columns."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
