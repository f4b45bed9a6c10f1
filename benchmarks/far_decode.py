"""Decode one token far into a text, on caches that were made up, and compare it with float64.

    python benchmarks/far_decode.py [--checkpoint DIR] [--position 10485759] [--json FILE]

Scout's last position is 10,485,759. No machine here can read a text to there, but one step at that position needs only
the caches, and any content does: keys and values are random, a few keys much larger than the others, so that every
part of the text matters. The step is run by an artifact with static caches (``OrtSession.restore``), and computed
again in float64 (float64_step.py), which knows absolute positions only.

Without ``--checkpoint`` a random model of four layers is made, one of them global, with one key/value head of width 8:
0.67 GB of caches. A real model's global layers need their full size: 8 * positions * heads * width bytes each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from float64_step import BLOCK, Model, Past

from l4convert.pipeline import ConvertOptions, convert
from l4convert.runtime import OrtSession

SMALL = ("hidden_size=64", "intermediate_size=64", "num_attention_heads=2", "num_key_value_heads=1", "head_dim=8",
         "num_local_experts=4", "intermediate_size_mlp=64")  # fmt: skip
PATTERN = 1 << 22  # values that are drawn; a cache is these over and over, scaled anew each time
STRIDE = 65_536  # slots from one large key to the next


@dataclass
class Synthetic:
    """Made-up caches: what the artifact is given, and what the float64 computation is given.

    Attributes:
        model: The checkpoint.
        position: Tokens in the caches.
        past: Filled as the artifact asks: name of a cache -> keys or values [Hk, N, D], keys before rotation.
    """

    model: Model
    position: int
    key_scale: float = 4.0
    past: dict[str, np.ndarray] = field(default_factory=dict)

    def __call__(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """The content of one cache [1, Hk, slots, D]; see ``OrtSession.restore``."""
        _, layer, kind = name.split(".")
        rng = np.random.default_rng([int(layer), kind == "key"])
        rotated = bool(self.model.config["no_rope_layers"][int(layer)])
        cache = np.zeros(shape, dtype)
        used = self.position % self.model.config["attention_chunk_size"] if rotated else self.position
        if not rotated:
            _fill(cache[0, :, :used], rng, self.key_scale if kind == "key" else 1.0, beacons=kind == "key")
            self.past[name] = cache[0, :, :used]
            return cache
        drawn = rng.standard_normal((shape[1], used, shape[3]))
        if kind == "key":
            drawn = self.model.unit(drawn) if self.model.config["use_qk_norm"] else drawn
            # Chunked layers turn by positions within the chunk, the float64 computation by absolute ones.
            cache[0, :, :used] = self.model.rotate(drawn, np.arange(used))
        else:
            cache[0, :, :used] = drawn
        self.past[name] = drawn
        return cache

    def layers(self) -> list[Past]:
        """What each layer remembers, for the float64 computation."""
        count = len(self.past) // 2
        return [Past(*(self.past[f"past_key_values.{i}.{kind}"] for kind in ("key", "value"))) for i in range(count)]


def _fill(cache: np.ndarray, rng: np.random.Generator, scale: float, beacons: bool) -> None:
    """Random numbers in [Hk, N, D], in place and without a second array of that size."""
    pattern = rng.standard_normal(PATTERN, np.float32) * np.float32(scale)
    width = cache.shape[-1]
    rows = PATTERN // width
    block = pattern[: rows * width].reshape(rows, width)
    for head in cache:
        for begin in range(0, len(head), rows):
            part = head[begin : begin + rows]
            np.multiply(block[: len(part)], np.float32(rng.uniform(0.8, 1.2)), out=part, casting="unsafe")
        if beacons:
            head[::STRIDE] *= 4


def far_step(artifact: Path, model: Model, position: int, token: int = 5, key_scale: float = 4.0) -> dict[str, Any]:
    """Run the step and compute it again; see ``main`` for what the results mean."""
    caches = Synthetic(model, position, key_scale)
    with OrtSession.open(artifact, max_length=position + 1) as session:
        begun = time.perf_counter()
        stream = session.restore(np.array([position]), caches)
        made = time.perf_counter()
        logits = stream.step(np.array([[token]]))[0, 0]
        stepped = time.perf_counter()
        written = stream.lengths.tolist()
        sizes = stream.cache_bytes()
        stream.rollback(1)
        again = time.perf_counter()
        repeated = stream.step(np.array([[token]]))[0, 0]
        second = time.perf_counter() - again
    begun64 = time.perf_counter()
    expected = model.step(token, position, caches.layers())
    return {
        "position": position,
        "lengths": written,
        "cache_bytes": sizes,
        "bytes_read": sum(cache.size * 4 for cache in caches.past.values()),
        "make_seconds": made - begun,
        "first_step_seconds": stepped - made,
        "step_seconds": second,
        "float64_seconds": time.perf_counter() - begun64,
        "error": float(np.abs(logits - expected).max() / np.abs(expected).max()),
        "repeat_error": float(np.abs(logits - repeated).max() / np.abs(expected).max()),
        "same_token": bool(logits.argmax() == expected.argmax()),
        "mass": {layer: mass.tolist() for layer, mass in model.mass.items()},
    }


def make_artifact(folder: Path, checkpoint: Path | None) -> tuple[Path, Path]:
    """The artifact with static caches, and the checkpoint that it is of."""
    if checkpoint is None:
        checkpoint = folder / "checkpoint"
        sizes = [part for size in SMALL for part in ("--set", size)]
        script = Path(__file__).with_name("make_checkpoint.py")
        command = [sys.executable, script, "--layers", "4", "--vocab", "512", "--output", checkpoint, *sizes]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
    artifact = folder / "artifact"
    convert(ConvertOptions(checkpoint=checkpoint, output=artifact, target="cpu", recipe="none", kv_cache="static"))
    return artifact, checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: a small random model")
    parser.add_argument("--position", type=int, action="append", help="may be given several times; default: the last")
    parser.add_argument("--key-scale", type=float, default=4.0, help="standard deviation of the made-up keys")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        artifact, checkpoint = make_artifact(Path(folder), options.checkpoint)
        model = Model.open(checkpoint)
        for position in options.position or [model.config["max_position_embeddings"] - 1]:
            rows.append(far_step(artifact, model, position, key_scale=options.key_scale))
            show(rows[-1])
    if options.json:
        options.json.write_text(json.dumps({"block": BLOCK, "rows": rows}, indent=1) + "\n")
    return 0


def show(row: dict[str, Any]) -> None:
    """One line for a position."""
    read = row["bytes_read"] / 1e9
    least = min(min(mass[:-1]) for mass in row["mass"].values())
    print(
        f"p = {row['position']:>10,}: step {row['step_seconds']:.3f} s (first {row['first_step_seconds']:.3f} s), "
        f"{read:.3f} GB of caches read, {read / row['step_seconds']:.2f} GB/s; relative error {row['error']:.1e}; "
        f"least share of {BLOCK:,} tokens {least:.3f}; float64 {row['float64_seconds']:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
