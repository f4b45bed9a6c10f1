"""``l4convert generate``: continue a text with an artifact."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from l4convert.cli._running import remarks, running_options
from l4convert.cli._settings import Settings, global_options, settings_of
from l4convert.cli._text import read_text
from l4convert.errors import UsageError

if TYPE_CHECKING:
    from l4convert.runtime import RunWith, SamplingOptions
    from l4convert.runtime.providers import Provider

EPILOG = """\b
Examples:
  l4convert generate scout-int4 --prompt "def main():"
  l4convert generate scout-int4 --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 1
  l4convert generate scout-int4 --prompt-file book.txt --max-new-tokens 200
  l4convert generate scout-rtx --engine rtx-5090 --prompt "Once"
  cat notes.txt | l4convert generate scout-int4 --prompt - --max-new-tokens 300

\b
The prompt is given to the model as it is, without a chat template; special tokens may be written in it.
"""


@click.command("generate", epilog=EPILOG)
@click.argument("artifact", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Text to continue; - reads it from standard input.")
@click.option("--prompt-file", type=click.Path(path_type=Path), metavar="FILE",
              help="UTF-8 text to continue, of any size the model has positions for.")  # fmt: skip
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
    prompt: str | None,
    prompt_file: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    engine: str | None,
    provider: Provider | None,
    plugins: Path | None,
) -> None:
    """Continue a text with the artifact in folder OUT, printing as the tokens come.

    ONNX Runtime runs it on the CPU, unless an engine or a provider is named.
    """
    from l4convert.runtime import RunWith, SamplingOptions

    options = SamplingOptions(temperature=temperature, top_p=top_p, seed=seed)
    text = _prompt_text(prompt, prompt_file)
    asked = (
        {"prompt": text, "prompt_file": None}
        if prompt_file is None
        else {"prompt": None, "prompt_file": str(prompt_file)}
    )
    _generate(artifact, text, asked, max_new_tokens, options, RunWith(engine, provider, plugins), settings_of(ctx))


def _prompt_text(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise UsageError("give the text to continue by --prompt TEXT or by --prompt-file FILE, one of the two")
    if file is not None:
        return read_text(file, "--prompt-file")
    return sys.stdin.read() if prompt == "-" else str(prompt)


class Watch:
    """When the prompt was read and when the text ended.

    Attributes:
        prompt: Seconds up to the first token; ``rest``: seconds from there to the last.
    """

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self.prompt = self.rest = 0.0

    def token(self) -> None:
        """A token came."""
        now = time.perf_counter() - self._begun
        self.prompt, self.rest = (self.prompt, now - self.prompt) if self.prompt else (now, 0.0)

    def rates(self, prompt_tokens: int, new_tokens: int) -> dict[str, float | None]:
        """Seconds, and tokens a second, of the prompt and of the steps after it; the first new token needs no step."""
        steps = new_tokens - 1
        return {
            "prompt_seconds": round(self.prompt, 3),
            "prompt_tokens_per_second": round(prompt_tokens / self.prompt, 2),
            "generation_seconds": round(self.rest, 3),
            "generation_tokens_per_second": round(steps / self.rest, 2) if steps and self.rest else None,
        }


def _generate(
    artifact: Path,
    text: str,
    asked: dict[str, str | None],
    max_new_tokens: int,
    options: SamplingOptions,
    run_with: RunWith,
    settings: Settings,
) -> None:
    from l4convert.runtime import Sampler, TextTokenizer, check_positions, eos_token_ids, generate, read_artifact

    tokenizer = TextTokenizer.open(artifact)
    ids = tokenizer.encode(text)
    ids = ids[: len(ids) - len(tokenizer.suffix_ids)]  # an end-of-text token would end the text before it begins
    info = read_artifact(artifact)
    check_positions(len(ids), info.config)
    # Buffers that are allocated in advance get exactly the size this text needs.
    room = min(len(ids) + max_new_tokens, info.config.max_position_embeddings) if info.kv_cache == "static" else None
    with settings.progress().task("Loading the model", unit="artifacts"):
        runner = run_with.open(artifact, max_length=room)
    eos_ids, sampler, progress = eos_token_ids(artifact), Sampler(options), settings.progress()
    tokens: list[int] = []
    pieces: list[str] = []
    stream = tokenizer.stream()
    watch = Watch()
    with runner:
        for token in generate(
            runner, ids, max_new_tokens=max_new_tokens, sampler=sampler, eos_ids=eos_ids, progress=progress
        ):
            watch.token()
            tokens.append(token)
            _show(stream.push(token), pieces, settings)
        _show(stream.finish(), pieces, settings)
    ended = "end of text" if tokens[-1] in eos_ids else "max new tokens"
    rates = watch.rates(len(ids), len(tokens))
    payload = {
        "artifact": str(artifact),
        **asked,
        "prompt_tokens": len(ids),
        "text": "".join(pieces),
        "token_ids": tokens,
        "stopped_by": ended,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
        "seconds": round(watch.prompt + watch.rest, 3),
        **rates,
        "runner": runner.name,
        "remarks": list(remarks(runner)),
    }
    settings.emit("generate", payload, "")
    for line in (_summary(len(ids), len(tokens), rates, ended), *remarks(runner)):
        settings.note(line)


def _summary(prompt_tokens: int, new_tokens: int, rates: dict[str, float | None], ended: str) -> str:
    """How long it took, on one line."""
    read = (
        f"read {prompt_tokens:,} tokens in {rates['prompt_seconds']} s ({rates['prompt_tokens_per_second']} tokens/s)"
    )
    rate = rates["generation_tokens_per_second"]
    wrote = f"wrote {new_tokens:,} in {rates['generation_seconds']} s"
    return f"{read}, {wrote}{f' ({rate} tokens/s)' if rate else ''}, stopped by {ended}"


def _show(piece: str, pieces: list[str], settings: Settings) -> None:
    """Keep a piece of text, and print it at once unless the result is to be JSON."""
    pieces.append(piece)
    if piece and not settings.json:
        click.echo(piece, nl=False)
