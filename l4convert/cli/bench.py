"""``l4convert bench``: speed and memory of an artifact against the length of the context."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from l4convert.cli._network import local_folder
from l4convert.cli._render import fields, size, table
from l4convert.cli._running import running_options
from l4convert.cli._settings import global_options, settings_of

if TYPE_CHECKING:
    from l4convert.bench.results import BenchReport, Curve, Dtype
    from l4convert.runtime.providers import Provider

EPILOG = """\b
Examples:
  l4convert bench scout-int4
  l4convert bench scout-int4 --reference Llama-4-Scout --context 1k,4k,16k,64k --plot bench.svg
  l4convert bench scout-int4 --synthetic --context 64k,256k,1M --json > bench.json

\b
A length of 4k is 4,096 tokens. The last --decode-tokens of each length go in one by one and are timed; a quarter of
them is warm-up. transformers runs in a process of its own, so its memory is its own; it needs the checkpoint's
parameters in memory (four bytes each in float32).
"""


def _contexts(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Lengths from ``1k,4k``; whether the model has so many positions is looked at later."""
    from l4convert.planning.tokens import parse_context

    return None if value is None else tuple(parse_context(part, 1 << 62) for part in value.split(","))


@click.command("bench", epilog=EPILOG)
@click.argument("artifact", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--reference", type=click.Path(path_type=Path), metavar="CKPT",
              help="Run transformers on this checkpoint, too: the one OUT was made from.")  # fmt: skip
@click.option("--reference-dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
              help="In which type transformers computes.")  # fmt: skip
@click.option("--context", metavar="N,N,...", callback=_contexts,
              help="Lengths to measure, ascending.  [default: 1k,4k,16k,64k]")  # fmt: skip
@click.option("--decode-tokens", type=click.IntRange(min=1), default=32, show_default=True, metavar="N",
              help="Time so many single tokens at each length.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), metavar="N",
              help="Threads of both runtimes.  [default: what each takes]")  # fmt: skip
@click.option("--synthetic", is_flag=True,
              help="Fill the caches with random numbers: no prefill, for lengths where that takes hours.")  # fmt: skip
@click.option("--no-breakdown", is_flag=True, help="Do not run again under a profiler to see where the time goes.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the result (.svg or .png).")
@running_options
@global_options
@click.pass_context
def command(
    ctx: click.Context,
    artifact: Path,
    reference: Path | None,
    reference_dtype: Dtype,
    context: tuple[int, ...] | None,
    decode_tokens: int,
    threads: int | None,
    synthetic: bool,
    no_breakdown: bool,
    plot: Path | None,
    engine: str | None,
    provider: Provider | None,
    plugins: Path | None,
) -> None:
    """Measure the artifact in folder OUT: tokens a second, milliseconds a token, memory; by length of context."""
    from l4convert.bench.plot import check_plot_file
    from l4convert.bench.results import BenchOptions
    from l4convert.bench.run import bench
    from l4convert.runtime import RunWith

    settings = settings_of(ctx)
    if plot is not None:
        check_plot_file(plot)
    options = BenchOptions(
        artifact=artifact,
        contexts=context,
        reference=None if reference is None else local_folder(reference, settings),
        reference_dtype=reference_dtype,
        decode_tokens=decode_tokens,
        threads=threads,
        synthetic=synthetic,
        breakdown=not no_breakdown,
        run_with=RunWith(engine, provider, plugins),
    )
    report = bench(options, settings.progress())
    if plot is not None:
        from l4convert.bench.figure import draw_report

        draw_report(report, plot)
    settings.emit("bench", report.to_json(), _text(report))


def _text(report: BenchReport) -> str:
    parts = [_summary(report)]
    for curve in (report.ours, report.reference):
        if curve is not None:
            parts += [f"{curve.name} ({curve.dtype}, {curve.caches})", _table(curve)]
    if report.ours.points[0].breakdown is not None:
        parts += ["A decode step under the profiler, milliseconds by kind of work", _breakdown(report)]
    return "\n\n".join(parts)


def _summary(report: BenchReport) -> str:
    facts = report.facts
    machine, model = facts["machine"], facts["model"]
    computer = f"{machine['processor']}, {machine['cores']} cores, {size(machine['memory_bytes'])}"
    return fields(
        [
            ("artifact", f"{facts['artifact']}: recipe {facts['recipe']}, target {facts['target']}"),
            ("layers", f"{model['layers']}, {model['global_layers']} of them global; chunks of {model['chunk']:,}"),
            ("machine", f"{computer}; load {machine['load']}"),
            ("context", "caches filled with random numbers" if facts["synthetic"] else "random tokens, prefilled"),
        ]
    )


def _table(curve: Curve) -> str:
    """One row a length; the rate of prefill is that since the length before."""
    from l4convert.planning.tokens import short_tokens

    rows = []
    for point in curve.points:
        prefill, held = point.prefill, point.cache_used_bytes or point.cache_bytes or {}
        rows.append(
            (
                short_tokens(point.context),
                "-" if prefill is None else f"{prefill.last_tokens / prefill.last_seconds:,.0f}",
                "-" if prefill is None else f"{prefill.seconds:,.1f}",
                f"{point.decode_median_ms:.2f}",
                f"{1000 / point.decode_median_ms:,.1f}",
                size(held["global"]) if held else "-",
                size(held["chunked"]) if held else "-",
                size(point.peak_rss),
            )
        )
    heads = ["context", "prefill tok/s", "prompt s", "decode ms", "tok/s", "KV global", "KV chunked", "peak memory"]
    return table(heads, rows, right=range(8))


def _breakdown(report: BenchReport) -> str:
    from l4convert.bench.results import KINDS, growth
    from l4convert.planning.tokens import short_tokens

    rows = [
        (
            short_tokens(p.context),
            *(f"{p.breakdown.parts_ms[kind]:.2f}" for kind in KINDS),
            f"{p.breakdown.total_ms:.2f}",
        )
        for p in report.ours.points
        if p.breakdown is not None
    ]
    grown = growth(report.ours)
    if grown is not None:
        rows.append(("growth", *(f"{grown.parts_ms[kind]:+.2f}" for kind in KINDS), f"{grown.total_ms:+.2f}"))
    return table(["context", *KINDS, "together"], rows, right=range(len(KINDS) + 2))
