"""How exact rotary positions are, up to the last one of Llama 4 Scout: chunk-relative and absolute, against float64.

    python benchmarks/positions.py [--json OUT.json] [--plot OUT.svg] [--pairs N]

Two ways of rotating are compared, as they are, in float32:

- *chunk-relative*: the table of C rows that this package puts into its graphs (l4convert/frontend/rope.py), at p mod C;
- *absolute*: transformers' own ``Llama4TextRotaryEmbedding`` and ``apply_rotary_emb``, at p.

The reference is NumPy in float64, written here from the formulas, with absolute positions. At each position p:

- angle: the largest error over the frequencies of the rotation itself, in radians;
- score: the error of q . k, for random unit vectors q at p and k at a random position of p's chunk that q sees; the
  rotations are float32, the product is float64, so that the rotation is all that differs;
- attention: how much of a query's attention goes to wrong keys, half the L1 distance of the softmax over all keys of
  the chunk up to p, vectors having the length sqrt(D) that QK norm gives them: the largest of some queries.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from l4convert.bench.plot import COLOURS, draw
from l4convert.checkpoint.config import DecoderConfig
from l4convert.checkpoint.presets import MAVERICK, SCOUT
from l4convert.frontend.rope import rotary_tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MODELS = {"scout": SCOUT, "maverick": MAVERICK}
CHUNKS = {model: config.attention_chunk_size for model, config in MODELS.items()}
FORMS = ("chunk-relative", "absolute")
QUERIES = 8
SEED = 0

Rotate = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Vectors [N, D] and their positions [N] -> rotated vectors [N, D]."""


@dataclass(frozen=True)
class Form:
    """A way of rotating.

    Attributes:
        rotate: Its rotation, in float32.
        modulus: It stands for the angle of p modulo this; None: of p.
    """

    rotate: Rotate
    modulus: int | None = None


@dataclass(frozen=True)
class Row:
    """Errors of one form at one position; see the top of this file."""

    model: str
    form: str
    position: int
    angle_max: float
    score_max: float
    score_rms: float
    attention_max: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (.svg or .png)")
    parser.add_argument("--pairs", type=int, default=4096, metavar="N", help="pairs of vectors at each position")
    options = parser.parse_args(arguments)
    rows = [row for model, config in MODELS.items() for row in measured(model, config, options.pairs)]
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(content(rows, options.pairs), indent=1) + "\n")
    if options.plot is not None:
        draw(options.plot, (11, 4), (1, 2), lambda panels: paint(panels, rows))
    return 0


def positions(config: DecoderConfig, count: int = 25) -> list[int]:
    """Evenly spaced in the logarithm from 1000 to the last position, both sides of some chunk boundaries, and of 2^23.

    A float32 holds every whole number up to 2^24, so the positions themselves are exact; above 2^23 it holds no other.
    """
    last, chunk = config.max_position_embeddings - 1, config.attention_chunk_size
    spaced = {round(p) for p in np.geomspace(1000, last, count)}
    boundaries = {n * chunk + d for n in (1, 2, 16, 128, 1024) for d in (-1, 0, 1)}
    edges = {2**23 + d for d in (-1, 0, 1)}
    return sorted(p for p in spaced | boundaries | edges if p <= last)


def measured(model: str, config: DecoderConfig, pairs: int) -> list[Row]:
    """Every row of one model."""
    rng = np.random.default_rng(SEED)
    ours = Form(chunk_relative(config), config.attention_chunk_size)
    forms = dict(zip(FORMS, (ours, Form(transformers_absolute(config))), strict=True))
    rows = []
    for p in positions(config):
        q, k = unit_vectors(rng, pairs, config.head_dim), unit_vectors(rng, pairs, config.head_dim)
        seen = p - rng.integers(0, p % config.attention_chunk_size + 1, pairs)
        for name, form in forms.items():
            errors = score_errors(form.rotate, exact(config), q, k, p, seen)
            angle = angle_error(form, config, p)
            attention = attention_error(form.rotate, config, p, np.random.default_rng(p))
            score_rms = float(np.sqrt(np.mean(errors**2)))
            rows.append(Row(model, name, p, angle, float(np.abs(errors).max()), score_rms, attention))
    return rows


def unit_vectors(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Random directions, float32 [count, width]."""
    vectors = rng.standard_normal((count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def frequencies(config: DecoderConfig) -> np.ndarray:
    """The reference's, float64 [D/2]: theta^(-2i/D), and waves longer than the original context slowed by the factor.

    Source: "RoFormer" (Su et al. 2021), equation 15; Llama 3's scaling as in the model card of Llama 3.1, without the
    blend between its two factors because Llama 4 has them equal.
    """
    plain = np.array([config.rope_theta ** (-2 * i / config.head_dim) for i in range(config.head_dim // 2)])
    if config.rope_scaling is None:
        return plain
    assert config.rope_scaling.low_freq_factor == config.rope_scaling.high_freq_factor == 1
    turns = config.rope_scaling.original_max_position_embeddings * plain / (2 * math.pi)
    return np.where(turns < 1, plain / config.rope_scaling.factor, plain)


def exact(config: DecoderConfig) -> Rotate:
    """Absolute positions in float64; p times a frequency is then off by 2e-9 at most."""
    rates = frequencies(config)

    def rotate(vectors: np.ndarray, at: np.ndarray) -> np.ndarray:
        pairs = vectors.astype(np.float64).reshape(len(vectors), -1, 2)
        angles = at.astype(np.float64)[:, None] * rates
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(vectors.shape)

    return rotate


def chunk_relative(config: DecoderConfig) -> Rotate:
    """Ours: the graph's table at p mod C, in float32."""
    chunk = config.attention_chunk_size
    cos, sin = rotary_tables(config, chunk)

    def rotate(vectors: np.ndarray, at: np.ndarray) -> np.ndarray:
        real, imaginary = vectors[:, 0::2], vectors[:, 1::2]
        c, s = cos[at % chunk], sin[at % chunk]
        return np.stack([real * c - imaginary * s, real * s + imaginary * c], axis=-1).reshape(vectors.shape)

    return rotate


def transformers_absolute(config: DecoderConfig) -> Rotate:
    """transformers' module and function, on the model's configuration."""
    import torch
    from transformers import Llama4TextConfig, logging
    from transformers.models.llama4 import modeling_llama4 as llama4

    logging.set_verbosity_error()  # it warns of Scout's two equal factors, which are as published
    embedding = llama4.Llama4TextRotaryEmbedding(Llama4TextConfig(**text_config(config)))

    def rotate(vectors: np.ndarray, at: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(vectors)[None, :, None]  # [batch, tokens, heads, D]
        table = embedding(tensor, torch.from_numpy(at.astype(np.int64))[None])
        turned: np.ndarray = llama4.apply_rotary_emb(tensor, tensor, table)[0][0, :, 0].numpy()
        return turned

    return rotate


def text_config(config: DecoderConfig) -> dict[str, Any]:
    """What of transformers' config decides its rotary embedding."""
    scaling = {"rope_type": "default"} if config.rope_scaling is None else {
        "rope_type": "llama3", **asdict(config.rope_scaling)
    }  # fmt: skip
    return {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
    }


def angle_error(form: Form, config: DecoderConfig, p: int) -> float:
    """The largest over all frequencies, in radians."""
    ones = np.tile(np.array([1, 0], np.float32), config.head_dim // 2)[None]
    meant = p if form.modulus is None else p % form.modulus
    turned = form.rotate(ones, np.array([p])).astype(np.float64).reshape(-1, 2) @ [1, 1j]
    true = exact(config)(ones, np.array([meant])).reshape(-1, 2) @ [1, 1j]
    return float(np.abs(np.angle(turned * true.conj())).max())


def score_errors(rotate: Rotate, truth: Rotate, q: np.ndarray, k: np.ndarray, p: int, seen: np.ndarray) -> np.ndarray:
    """Errors of q . k for queries [N, D] at p and keys [N, D] at ``seen`` [N]: float64 [N]."""
    at = np.full(len(q), p)
    scores = [np.sum(turn(q, at).astype(np.float64) * turn(k, seen), axis=1) for turn in (rotate, truth)]
    return scores[0] - scores[1]


def attention_error(rotate: Rotate, config: DecoderConfig, p: int, rng: np.random.Generator) -> float:
    """Half the L1 distance between the two softmaxes over a chunk's keys: 0 is none wrong, 1 all."""
    at = np.arange(p - p % config.attention_chunk_size, p + 1)
    keys, queries = (unit_vectors(rng, n, config.head_dim) for n in (len(at), QUERIES))
    weights = []
    for turn in (rotate, exact(config)):
        # Lengths sqrt(D) each, over the square root of D that attention divides by.
        logits = math.sqrt(config.head_dim) * (
            turn(queries, np.full(QUERIES, p)).astype(np.float64) @ turn(keys, at).astype(np.float64).T
        )
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights.append(powers / powers.sum(axis=1, keepdims=True))
    return float(np.abs(weights[0] - weights[1]).sum(axis=1).max() / 2)


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown, the two forms beside each other."""
    heads = ["model", "position"]
    heads += [f"{what}, {form}" for what in ("angle (rad)", "score max", "score rms", "attention") for form in FORMS]
    lines = [heads, ["---"] * 2 + ["---:"] * (len(heads) - 2)]
    for model, p in dict.fromkeys((row.model, row.position) for row in rows):
        found = {row.form: row for row in rows if (row.model, row.position) == (model, p)}
        figures = [
            f"{getattr(found[form], field):.1e}"
            for field in ("angle_max", "score_max", "score_rms", "attention_max")
            for form in FORMS
        ]
        lines.append([model, f"{p:,}", *figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def content(rows: Sequence[Row], pairs: int) -> dict[str, Any]:
    """The JSON."""
    import transformers

    return {
        "schema": "l4convert.positions/1",
        "date": f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}",
        "versions": {"numpy": np.__version__, "transformers": transformers.__version__},
        "pairs": pairs,
        "queries": QUERIES,
        "rows": [asdict(row) for row in rows],
    }


def paint(panels: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Angles on the left, scores on the right."""
    colours = {
        ("scout", "absolute"): COLOURS["theirs"],
        ("maverick", "absolute"): COLOURS["fifth"],
        ("scout", "chunk-relative"): COLOURS["ours"],
        ("maverick", "chunk-relative"): COLOURS["sixth"],
    }
    for axes, field, title in (
        (panels[0], "angle_max", "Largest error of an angle (radians)"),
        (panels[1], "score_max", "Largest error of q . k of unit vectors"),
    ):
        for (model, form), colour in colours.items():
            # The first token of a chunk sees only itself: nothing is rotated against anything.
            found = [r for r in rows if (r.model, r.form) == (model, form) and r.position % CHUNKS[model]]
            style = "-" if form == "chunk-relative" else "--"
            label = f"{model}, {form}" + (" (transformers)" if form == "absolute" else " (ours)")
            axes.plot(
                [row.position for row in found], [getattr(row, field) for row in found], style,
                marker=".", color=colour, label=label,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", title=title, xlabel="position of the token")
    panels[0].legend(loc="upper left")


if __name__ == "__main__":
    sys.exit(main())
