"""``l4convert generate``: continue a text with an artifact."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from l4convert.cli._running import remarks, running_options
from l4convert.cli._settings import Settings, global_options, settings_of

if TYPE_CHECKING:
    from l4convert.runtime import RunWith, SamplingOptions
    from l4convert.runtime.providers import Provider

EPILOG = """\b
Examples:
  l4convert generate scout-int4 --prompt "def main():"
  l4convert generate scout-int4 --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 1
  l4convert generate scout-rtx --engine rtx-5090 --prompt "Once"
  cat notes.txt | l4convert generate scout-int4 --prompt - --max-new-tokens 300

\b
The prompt is given to the model as it is, without a chat template; special tokens may be written in it.
"""


@click.command("generate", epilog=EPILOG)
@click.argument("artifact", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, metavar="TEXT", help="Text to continue; - reads it from standard input.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=100, show_default=True, metavar="N",
              help="Stop after so many tokens, if the text has not ended before.")  # fmt: skip
@click.option("--temperature", type=float, default=0.0, show_default=True, metavar="T",
              help="0 takes the most likely token always; more is more varied.")  # fmt: skip
@click.option("--top-p", type=float, default=1.0, show_default=True, metavar="P",
              help="Choose among the fewest tokens whose probabilities add up to P.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same text.")
@running_options
@global_options
@click.pass_context
def command(
    ctx: click.Context,
    artifact: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    engine: str | None,
    provider: Provider | None,
) -> None:
    """Continue a text with the artifact in folder OUT, printing as the tokens come.

    ONNX Runtime runs it on the CPU, unless an engine or a provider is named.
    """
    from l4convert.runtime import RunWith, SamplingOptions

    options = SamplingOptions(temperature=temperature, top_p=top_p, seed=seed)
    text = sys.stdin.read() if prompt == "-" else prompt
    _generate(artifact, text, max_new_tokens, options, RunWith(engine, provider), settings_of(ctx))


def _generate(
    artifact: Path, prompt: str, max_new_tokens: int, options: SamplingOptions, run_with: RunWith, settings: Settings
) -> None:
    from l4convert.runtime import Sampler, TextTokenizer, eos_token_ids, generate, read_artifact

    tokenizer = TextTokenizer.open(artifact)
    ids = tokenizer.encode(prompt)
    ids = ids[: len(ids) - len(tokenizer.suffix_ids)]  # an end-of-text token would end the text before it begins
    info = read_artifact(artifact)
    # Buffers that are allocated in advance get exactly the size this text needs.
    room = min(len(ids) + max_new_tokens, info.config.max_position_embeddings) if info.kv_cache == "static" else None
    with settings.progress().task("Loading the model", unit="artifacts"):
        runner = run_with.open(artifact, max_length=room)
    eos_ids = eos_token_ids(artifact)
    begun = time.perf_counter()
    tokens: list[int] = []
    pieces: list[str] = []
    stream = tokenizer.stream()
    with runner:
        for token in generate(runner, ids, max_new_tokens=max_new_tokens, sampler=Sampler(options), eos_ids=eos_ids):
            tokens.append(token)
            _show(stream.push(token), pieces, settings)
        _show(stream.finish(), pieces, settings)
    seconds = time.perf_counter() - begun
    ended = "end of text" if tokens[-1] in eos_ids else "max new tokens"
    payload = {
        "artifact": str(artifact),
        "prompt": prompt,
        "prompt_tokens": len(ids),
        "text": "".join(pieces),
        "token_ids": tokens,
        "stopped_by": ended,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
        "seconds": round(seconds, 3),
        "runner": runner.name,
        "remarks": list(remarks(runner)),
    }
    settings.emit("generate", payload, "")
    settings.note(f"{len(ids)} + {len(tokens)} tokens in {seconds:.1f} s, stopped by {ended}")
    for line in remarks(runner):
        settings.note(line)


def _show(piece: str, pieces: list[str], settings: Settings) -> None:
    """Keep a piece of text, and print it at once unless the result is to be JSON."""
    pieces.append(piece)
    if piece and not settings.json:
        click.echo(piece, nl=False)
