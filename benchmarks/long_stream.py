"""A long stream: the artifact beside transformers over 100,000 tokens, on both sides of chunk boundaries all along it.

    python benchmarks/long_stream.py CKPT [--tokens 100000] [--kv-cache static windowed growing] [--json OUT.json]

The checkpoint is converted without quantization, once for each form of cache, and fed the same tokens in several
splits. Logits are compared at sampled positions: four before and four after each of 50 chunk boundaries that are spread
over the stream, and 1,000 between. The reference is transformers' own code and cache, in steps: as it is, and with RoPE
angles that are multiplied in float64 instead of float32, which tells its error from ours. Logits at the samples, of
both, are kept in --scratch, so that another run with the same tokens goes on where one was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from l4convert.checkpoint import open_checkpoint
from l4convert.checkpoint.config import DecoderConfig
from l4convert.parity import TransformersReference
from l4convert.pipeline import ConvertOptions, convert
from l4convert.progress import terminal_progress
from l4convert.runtime import OrtSession, OrtStream, TextTokenizer
from l4convert.runtime.prefill import prefill_steps, step_limit

SCHEMA = "l4convert.long_stream/1"
BOUND = 1e-3  # of max |difference| over max |logit of the reference|
BOUNDARIES, AROUND, BETWEEN = 50, 4, 1000
STEP = 512  # tokens of a call at most, of the reference's and of the artifact's
REFERENCES = {"transformers": False, "transformers, angles in float64": True}
PARTS = 10  # of the stream, at whose ends the caches are looked at
SEED = 0

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Stream:
    """What is streamed, and where it is looked at.

    Attributes:
        ids: Tokens, [N]; ``source``: where they come from, in words.
        config: The model's hyperparameters.
        marks: The sampled chunk boundaries; ``places``: the sampled positions, increasing.
    """

    ids: Ids
    source: str
    config: DecoderConfig
    marks: Ids
    places: Ids


def main() -> int:
    """Measure, print tables, write the JSON."""
    options = parse()
    options.scratch.mkdir(parents=True, exist_ok=True)
    stream = make_stream(options)
    print(
        f"{len(stream.ids):,} tokens ({stream.source}), chunks of {stream.config.attention_chunk_size}; "
        f"{len(stream.places)} positions compared, around {len(stream.marks)} chunk boundaries and between"
    )
    fed = [] if options.only_reference else list(feed_all(options, stream))
    expected = {name: reference(options, name, stream) for name in REFERENCES}
    own = difference(*expected.values(), stream)
    print(f"transformers against itself with angles in float64: {own['max_rel_logit']:.2e}\n\n{HEADER}")
    rows = [one.row(expected, stream) for one in fed]
    for row in rows:
        print(markdown(row))
    if options.json:
        result = {
            "schema": SCHEMA, "date": datetime.now(UTC).date().isoformat(), "checkpoint": options.checkpoint.name,
            "tokens": len(stream.ids), "source": stream.source, "chunk": stream.config.attention_chunk_size,
            "boundaries": stream.marks.tolist(), "positions": len(stream.places), "bound": BOUND,
            "between_references": own, "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--text", type=Path, help="random tokens follow where it ends  [default: CKPT/heldout.txt]")
    parser.add_argument("--kv-cache", nargs="+", default=["static"], choices=("static", "windowed", "growing"))
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--recipe", default="none")
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=SPLITS)
    parser.add_argument("--threads", type=int, help="of ONNX Runtime")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "long_stream")
    parser.add_argument("--only-reference", action="store_true", help="make the reference's logits and stop")
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_args()


def make_stream(options: argparse.Namespace) -> Stream:
    """The tokens of a text, and random ones after its end."""
    config = open_checkpoint(options.checkpoint).config
    text = options.text or options.checkpoint / "heldout.txt"
    own: list[int] = []
    if text.is_file():
        own = TextTokenizer.open(options.checkpoint).encode(text.read_text(encoding="utf-8"))[: options.tokens]
    random = np.random.default_rng(SEED).integers(0, config.vocab_size, options.tokens - len(own))
    source = f"{len(own):,} of {text.name}" if own else ""
    if len(random):
        source += f"{' and then ' if own else ''}{len(random):,} random ones"
    ids = np.concatenate([np.array(own, np.int64), random])
    marks = boundaries(len(ids), config.attention_chunk_size)
    return Stream(ids, source, config, marks, sampled(len(ids), marks))


def boundaries(tokens: int, chunk: int) -> Ids:
    """Positions of the chunk boundaries to look at: the first, the last and some evenly between."""
    count = (tokens - 1) // chunk
    return np.unique(np.linspace(1, count, min(BOUNDARIES, count)).round().astype(np.int64)) * chunk


def sampled(tokens: int, marks: Ids) -> Ids:
    """Positions on both sides of the boundaries, and evenly between."""
    around = (marks[:, None] + np.arange(-AROUND, AROUND)).ravel()
    between = np.linspace(0, tokens - 1, min(BETWEEN, tokens)).astype(np.int64)
    places = np.unique(np.concatenate([around, between]))
    return places[(places >= 0) & (places < tokens)]


def chunk_steps(stream: Stream) -> list[int]:
    """Steps of which none crosses a boundary."""
    config = stream.config
    limit = min(STEP, step_limit(config, len(stream.ids)))
    return list(prefill_steps(0, len(stream.ids), config.attention_chunk_size, limit))


def odd_steps(stream: Stream) -> list[int]:
    """Sizes without a common measure, which cross boundaries at all sorts of places."""
    chunk, left = stream.config.attention_chunk_size, len(stream.ids)
    limit = min(STEP, step_limit(stream.config, left))
    wanted = (1, 3, chunk // 2 + 1, 2, chunk + 3, 5, 2 * chunk + 7, chunk // 3 + 1)
    sizes = []
    for size in cycle(wanted):
        if left == 0:
            return sizes
        sizes.append(min(size, limit, left))
        left -= sizes[-1]
    raise AssertionError("a cycle has no end")


def single_tokens(stream: Stream) -> list[int]:
    """Single tokens around the sampled boundaries, chunk steps between."""
    chunk, end = stream.config.attention_chunk_size, len(stream.ids)
    limit = min(STEP, step_limit(stream.config, end))
    sizes: list[int] = []
    at = 0
    for mark in stream.marks:
        start, stop = max(at, int(mark) - AROUND), min(int(mark) + AROUND, end)
        sizes += [*prefill_steps(at, start - at, chunk, limit), *[1] * (stop - start)]
        at = stop
    return [*sizes, *prefill_steps(at, end - at, chunk, limit)]


SPLITS = {"chunk steps": chunk_steps, "odd steps": odd_steps, "single tokens": single_tokens}


def reference(options: argparse.Namespace, name: str, stream: Stream) -> Logits:
    """The reference's logits [positions, vocabulary] at the sampled positions: kept ones, or computed ones."""
    weights = sorted((file.name, file.stat().st_size) for file in options.checkpoint.glob("*.safetensors"))
    key = repr((name, options.checkpoint.name, weights, STEP)).encode() + stream.ids.tobytes() + stream.places.tobytes()
    file = options.scratch / f"{hashlib.sha256(key).hexdigest()[:16]}.npy"
    if file.is_file():
        return np.load(file)
    chunk, total = stream.config.attention_chunk_size, len(stream.ids)
    width = chunk * (STEP // chunk) or STEP  # whole chunks where several fit
    with TransformersReference(options.checkpoint, exact_angles=REFERENCES[name]) as model:
        text = model.stream()
        steps = (text.step(stream.ids[at : at + width]) for at in range(0, total, width))
        logits = collect(steps, stream.places, name, total)
    np.save(file, logits)
    return logits


def collect(steps: Iterator[Logits], places: Ids, name: str, total: int) -> Logits:
    """The rows of the sampled positions out of the logits [S, vocabulary] of consecutive steps."""
    parts, at = [], 0
    with terminal_progress().task(name, total=total, unit="tokens") as task:
        for logits in steps:
            low, high = np.searchsorted(places, (at, at + len(logits)))
            parts.append(logits[places[low:high] - at])  # a copy, so that the rest is forgotten
            at += len(logits)
            task.advance(len(logits))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Fed:
    """What came of feeding the stream to an artifact once.

    Attributes:
        kv_cache: Form of its caches; ``split``: how it was fed, in so many ``calls``.
        logits: At the sampled positions, [positions, vocabulary].
        caches: After each call: tokens so far, and the bytes of global and of chunked layers' caches, [calls, 3].
        seconds: That it took.
    """

    kv_cache: str
    split: str
    logits: Logits
    caches: Ids
    seconds: float

    def row(self, expected: Mapping[str, Logits], stream: Stream) -> dict[str, Any]:
        """A row of the results."""
        against = {name: difference(self.logits, wanted, stream) for name, wanted in expected.items()}
        names = {"kv_cache": self.kv_cache, "split": self.split, "calls": len(self.caches), "seconds": self.seconds}
        return {**names, "against": against, **cache_facts(self.caches)}


def feed_all(options: argparse.Namespace, stream: Stream) -> Iterator[Fed]:
    """Every form of cache in every split; what an earlier run kept in --scratch is taken from there."""
    for form in options.kv_cache:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            out = Path(folder) / "artifact"
            convert(
                ConvertOptions(options.checkpoint, out, target=options.target, recipe=options.recipe, kv_cache=form)
            )
            manifest = (out / "l4convert.json").read_bytes()
            with OrtSession.open(out, max_length=len(stream.ids), threads=options.threads) as session:
                for split in options.splits:
                    key = manifest + repr((split, STEP)).encode() + stream.ids.tobytes() + stream.places.tobytes()
                    file = options.scratch / f"{hashlib.sha256(key).hexdigest()[:16]}.npz"
                    if not file.is_file():
                        np.savez(file, **feed(session, split, stream))
                    kept = np.load(file)
                    print(f"{form}, {split}: {kept['seconds']:.0f} s", file=sys.stderr, flush=True)
                    yield Fed(form, split, kept["logits"], kept["caches"], float(kept["seconds"]))


def feed(session: OrtSession, split: str, stream: Stream) -> dict[str, Any]:
    """Feed the stream once: the fields of :class:`Fed`."""
    text = session.start(1)
    caches: list[tuple[int, int, int]] = []

    def steps() -> Iterator[Logits]:
        at = 0
        for size in SPLITS[split](stream):
            yield text.step(stream.ids[None, at : at + size])[0]
            at += size
            caches.append((at, *held(text)))

    start = time.perf_counter()
    logits = collect(steps(), stream.places, split, len(stream.ids))
    return {"logits": logits, "caches": np.array(caches), "seconds": time.perf_counter() - start}


def held(text: OrtStream) -> tuple[int, int]:
    """Bytes of the caches of global and of chunked layers."""
    now = text.cache_bytes()
    return now["global"], now["chunked"]


def cache_facts(caches: Ids) -> dict[str, Any]:
    """The most bytes in each tenth of the stream, and the tokens at its end."""
    tokens, whole, chunked = caches.T
    parts = [part for part in np.array_split(np.arange(len(tokens)), PARTS) if len(part)]
    return {
        "tokens": [int(tokens[part[-1]]) for part in parts],
        "global_bytes": [int(whole[part].max()) for part in parts],
        "chunked_bytes": [int(chunked[part].max()) for part in parts],
    }


def difference(logits: Logits, wanted: Logits, stream: Stream) -> dict[str, Any]:
    """Over all sampled positions: max |difference| / max |logit|, where it is, and how the others are."""
    scale = float(np.abs(wanted).max())
    each = np.abs(logits.astype(np.float64) - wanted).max(axis=1) / scale
    near = np.isin(stream.places, (stream.marks[:, None] + np.arange(-AROUND, AROUND)).ravel())
    return {
        "max_rel_logit": float(each.max()),
        "at": int(stream.places[each.argmax()]),
        "max_rel_at_boundaries": float(each[near].max()),
        "p50": float(np.median(each)),
        "p99": float(np.quantile(each, 0.99)),
        "over_bound": int((each > BOUND).sum()),
        "max_abs_reference": scale,
        "top1": float((logits.argmax(axis=1) == wanted.argmax(axis=1)).mean()),
    }


HEADER = (
    "| cache | split | calls | max rel. | at boundaries | over 1e-3 | angles in float64: max rel. | at boundaries "
    "| over 1e-3 | chunked MB | global MB, first to last tenth | s |\n" + "|---" * 12 + "|"
)


def markdown(row: Mapping[str, Any]) -> str:
    """One line of the table."""
    cells = [row["kv_cache"], row["split"], f"{row['calls']}"]
    for one in row["against"].values():
        cells += [f"{one['max_rel_logit']:.1e}", f"{one['max_rel_at_boundaries']:.1e}", f"{one['over_bound']}"]
    low, high = min(row["chunked_bytes"]) / 1e6, max(row["chunked_bytes"]) / 1e6
    cells.append(f"{high:.3f}" if low == high else f"{low:.3f} to {high:.3f}")
    cells += [f"{row['global_bytes'][0] / 1e6:.1f} to {row['global_bytes'][-1] / 1e6:.1f}", f"{row['seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
