"""Accuracy of every recipe on every target: convert, validate, print a table.

    python benchmarks/accuracy.py CKPT --text FILE [--json OUT.json]

Each row is what ``l4convert validate`` reports for one artifact: the whole text in windows, each in one call. The last
column is the worst over all ways of splitting the first window, too. Nothing is kept but the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGETS = ("portable", "cpu")
RECIPES = {
    "none": ["--recipe", "none"],
    "int4, block 32": ["--recipe", "int4", "--block-size", "32"],
    "int4, block 64": ["--recipe", "int4", "--block-size", "64"],
    "int4, block 128": ["--recipe", "int4", "--block-size", "128"],
    "fp8": ["--recipe", "fp8"],
    "fp8-experts": ["--recipe", "fp8-experts"],
}


def main() -> int:
    """Measure and print; exit code 1 where an artifact breaks the default policy of its recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--window", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    print("| recipe | target | weights | mean KL | p99 KL | top-1 | perplexity | max \\|Δlogit\\| / max \\|logit\\| |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for recipe in RECIPES:
        for target in TARGETS:
            row = measure(options, recipe, target)
            rows.append(row)
            print(markdown(row), flush=True)
    print(
        f"\nReference: {rows[0]['reference']}; perplexity {rows[0]['ppl_reference']:.3f} on {rows[0]['tokens']} tokens."
    )
    if options.json:
        options.json.write_text(json.dumps({"schema": "l4convert.accuracy/1", "rows": rows}, indent=2) + "\n")
    return 0 if all(row["passed"] for row in rows) else 1


def measure(options: argparse.Namespace, recipe: str, target: str) -> dict[str, Any]:
    """Convert and validate in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "artifact"
        l4convert("convert", options.checkpoint, "--output", out, *RECIPES[recipe], "--target", target, "--quiet")
        sizes = ["--tokens", str(options.tokens), "--window", str(options.window)]
        l4convert("validate", out, "--reference", options.checkpoint, "--text", options.text, *sizes, "--quiet")
        report = json.loads((out / "parity.json").read_text())
        weights = (out / "model.safetensors").stat().st_size
    whole = report["rows"][0]["reference"]
    worst = max(row["reference"]["max_rel_logit"] for row in report["rows"])
    names = {"recipe": recipe, "target": target, "weights_bytes": weights, "passed": report["passed"]}
    return {**names, "reference": report["reference"], **whole, "worst_rel_logit": worst}


def l4convert(*arguments: object) -> None:
    """Run the command line; a broken policy (4) is a result, any other failure is not."""
    run = subprocess.run([sys.executable, "-m", "l4convert", *map(str, arguments)], check=False)
    if run.returncode not in (0, 4):
        raise SystemExit(run.returncode)


def markdown(row: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [
        row["recipe"],
        row["target"],
        f"{row['weights_bytes'] / 1e6:.1f} MB",
        f"{row['mean_kl']:.2e}",
        f"{row['p99_kl']:.2e}",
        f"{row['top1']:.4f}",
        f"{row['ppl_artifact']:.3f}",
        f"{row['worst_rel_logit']:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
