"""What quantized key/value caches save and cost: bytes a token, KL and perplexity by context length.

    python benchmarks/kv_cache.py CKPT --text FILE [--recipe none --recipe int4] [--window 16384] [--json OUT.json]

Every row is an artifact of its own for the CPU, converted into a temporary folder and calibrated on the first tokens of
the text; what follows them is compared, in windows, with the float32 artifact of recipe ``none`` whose caches are not
quantized (which `l4convert validate` compares with transformers). So the rows of recipe ``none`` show the cost of the
caches alone, and those of another recipe the cost of both.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from l4convert.parity.by_length import TextComparison
from l4convert.parity.metrics import NO_TARGET, measure
from l4convert.pipeline import ConvertOptions, convert
from l4convert.quantization.kv import KvScheme, kv_scheme
from l4convert.runtime import OrtSession, TextTokenizer
from l4convert.runtime.prefill import prefill_steps, step_limit

FORMATS = [*product(("fp8", "int8", "int4"), ("head", "channel"), ("all", "global"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--recipe", action="append", help="once or more  [default: none and int4]")
    parser.add_argument("--window", type=int, default=16384, help="tokens in a window  [default: 16384]")
    parser.add_argument("--windows", type=int, default=2, help="how many  [default: 2]")
    parser.add_argument("--calibration-tokens", type=int, default=4096, help="[default: 4096]")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    calibration, windows = split_text(options)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "calibration.txt"
        text.write_text(calibration, encoding="utf-8")
        plain = artifact(options, Path(folder) / "plain", "none", None, text)
        with OrtSession.open(plain) as session:
            expected = [logits(session, ids) for ids in windows]
            rows: list[dict[str, Any]] = []
            for recipe in options.recipe or ["none", "int4"]:
                for scheme in (None, *(kv_scheme(*words) for words in FORMATS)):
                    out = artifact(options, Path(folder) / "row", recipe, scheme, text)
                    rows.append(row(out, recipe, scheme, windows, expected))
                    write(options, windows, rows)
                    print(*([header(rows[0])] if len(rows) == 1 else []), markdown(rows[-1]), sep="\n", flush=True)
    return 0


def write(options: argparse.Namespace, windows: Sequence[np.ndarray], rows: list[dict[str, Any]]) -> None:
    """The rows so far; the last call's are all."""
    if options.json:
        sizes = {"window": len(windows[0]), "windows": len(windows), "calibration_tokens": options.calibration_tokens}
        content = {"schema": "l4convert.kv_cache/1", **sizes, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def split_text(options: argparse.Namespace) -> tuple[str, list[np.ndarray]]:
    """The text to calibrate on, and windows of tokens of what follows it."""
    tokenizer = TextTokenizer.open(options.checkpoint)
    content = options.text.read_text(encoding="utf-8")
    ids = tokenizer.encode(content, special=False)
    calibration = tokenizer.decode(ids[: options.calibration_tokens])
    rest = np.array(ids[options.calibration_tokens :], np.int64)
    own = options.window - len(tokenizer.prefix_ids)
    parts = [rest[start : start + own] for start in range(0, own * options.windows, own)]
    windows = [np.append(tokenizer.prefix_ids, part).astype(np.int64) for part in parts if len(part) > 1]
    if not windows:
        sys.exit(f"{options.text}: {len(ids)} tokens, and nothing is left to compare after calibration")
    return calibration, windows


def artifact(options: argparse.Namespace, out: Path, recipe: str, scheme: KvScheme | None, text: Path) -> Path:
    """Convert."""
    quantized = scheme and {
        "kv_dtype": scheme.dtype,
        "kv_granularity": scheme.granularity,
        "kv_layers": scheme.layers,
        "calibration": text,
        "calibration_tokens": options.calibration_tokens,
    }
    convert(ConvertOptions(options.checkpoint, out, recipe=recipe, overwrite=True, **(quantized or {})))
    return out


def row(
    out: Path, recipe: str, scheme: KvScheme | None, windows: Sequence[np.ndarray], expected: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Compare one artifact."""
    comparison = TextComparison(max(map(len, windows)))
    with OrtSession.open(out) as session:
        for ids, reference in zip(windows, expected, strict=True):
            targets = np.append(ids[1:], NO_TARGET)
            for start, part in steps(session, ids):
                rows = slice(start, start + len(part))
                comparison.add(start, measure(reference[rows], part, targets[rows]))
        stream = session.start(1)
        stream.step(windows[0][None, :64])
        held = {kind: nbytes // 64 for kind, nbytes in stream.cache_bytes().items()}
    return {
        "recipe": recipe,
        "cache": "float32" if scheme is None else scheme.to_dict(),
        "bytes_per_token": held,
        "whole": comparison.whole.result().to_json(),
        "by_length": [part.to_json() for part in comparison.by_length.rows()],
    }


def logits(session: OrtSession, ids: np.ndarray) -> np.ndarray:
    """Logits of a window [tokens, vocabulary]."""
    return np.concatenate([part for _, part in steps(session, ids)])


def steps(session: OrtSession, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """A window step by step: the first token's place, and the logits."""
    stream, start, config = session.start(1), 0, session.config
    for count in prefill_steps(0, len(ids), 4 * config.attention_chunk_size, lambda n: step_limit(config, n)):
        yield start, stream.step(ids[None, start : start + count])[0]
        start += count


def header(first: dict[str, Any]) -> str:
    """Of the table."""
    ranges = [f"KL at {part['from']}-{part['to'] - 1}" for part in first["by_length"]]
    names = ["recipe", "cache", "bytes a token: global", "chunked", *ranges, "mean KL", "top-1", "perplexity"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def markdown(row: dict[str, Any]) -> str:
    """One row of the table."""
    cache = row["cache"]
    cells = [
        row["recipe"],
        cache if isinstance(cache, str) else f"{cache['dtype']} {cache['granularity']}, {cache['layers']} layers",
        *(f"{row['bytes_per_token'][kind]:,}" for kind in ("global", "chunked")),
        *(f"{part['mean_kl']:.2e}" for part in row["by_length"]),
        f"{row['whole']['mean_kl']:.2e}",
        f"{row['whole']['top1']:.4f}",
        f"{row['whole']['ppl_artifact']:.3f} for {row['whole']['ppl_reference']:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
