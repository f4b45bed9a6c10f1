"""``l4convert validate``: is an artifact equal to the model it was made from?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from l4convert.cli._adapters import adapter_folders
from l4convert.cli._conversion import adapter_option
from l4convert.cli._network import local_folder
from l4convert.cli._running import running_options
from l4convert.cli._settings import global_options, settings_of
from l4convert.cli._text import read_text
from l4convert.errors import CheckFailed

if TYPE_CHECKING:
    from l4convert.parity.outcome import ParityReport
    from l4convert.runtime.providers import Provider

# The widest row of the table of results; a narrower terminal wraps it rather than losing numbers.
_TABLE_WIDTH = 250

EPILOG = """\b
Examples:
  l4convert validate scout-int4 --reference Llama-4-Scout --text sample.txt
  l4convert validate scout-int4 --reference Llama-4-Scout --text sample.txt --policy strict.toml --junit parity.xml
  l4convert validate scout-rtx --engine rtx-5090 --reference Llama-4-Scout --text sample.txt
  l4convert validate scout-int4 --reference Llama-4-Scout --text book.txt --window 100000
  l4convert validate scout-tuned --reference Llama-4-Scout --adapter my-lora --text sample.txt
  l4convert validate scout-int4 --reference Llama-4-Scout --json > parity.json

\b
The reference is transformers (eager attention, float32), so it needs memory for four bytes a parameter.
The report is also kept in the artifact, as parity.json.
Exit code 0 when every threshold of the policy holds; 4 when one does not, or nothing was compared.
"""


@click.command("validate", epilog=EPILOG)
@click.argument("artifact", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--reference", required=True, type=click.Path(path_type=Path), metavar="CKPT",
              help="The checkpoint that OUT was made from; one on the hub is downloaded into its cache.")  # fmt: skip
@adapter_option("LoRA adapter that was merged into it (`convert --adapter`); may be repeated, in the same order.")
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE",
              help="Text to compare on (UTF-8).  [default: random tokens]")  # fmt: skip
@click.option("--tokens", type=click.IntRange(min=2), metavar="N",
              help="Use so many tokens of the text.  [default: 3000, or one window]")  # fmt: skip
@click.option("--window", type=click.IntRange(min=2), default=1000, show_default=True, metavar="N",
              help="Tokens of one text, from position 0 on. More than a chunk, or no chunk boundary is tested. "
                   "Any number: in steps where they are too many for one call.")  # fmt: skip
@click.option("--exact-angles", is_flag=True,
              help="Have the reference multiply RoPE's angles in float64; its float32 ones are off at far positions."
              )  # fmt: skip
@click.option("--policy", type=click.Path(path_type=Path), metavar="FILE",
              help="Thresholds, as TOML.  [default: those of the recipe]")  # fmt: skip
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write the result as JUnit XML.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write the result as an HTML page.")
@running_options
@global_options
@click.pass_context
def command(
    ctx: click.Context,
    artifact: Path,
    reference: Path,
    text: Path | None,
    tokens: int | None,
    window: int,
    exact_angles: bool,
    policy: Path | None,
    junit: Path | None,
    html: Path | None,
    engine: str | None,
    provider: Provider | None,
    plugins: Path | None,
    adapters: tuple[Path, ...],
) -> None:
    """Compare the artifact in folder OUT with the reference model, and hold it to a policy.

    One call for the whole text, odd splits, token by token, across chunk boundaries, and padded batches must all agree.
    """
    from l4convert.parity.outcome import REPORT_FILE, write_report
    from l4convert.parity.policy import load_policy
    from l4convert.parity.report import headline, write_html, write_junit
    from l4convert.parity.validate import validate
    from l4convert.runtime import RunWith, read_artifact

    settings = settings_of(ctx)
    info = read_artifact(artifact)
    reference = local_folder(reference, settings)
    report = validate(
        artifact,
        reference,
        text=None if text is None else read_text(text, "--text"),
        text_name="given text" if text is None else text.name,
        policy=None if policy is None else load_policy(policy, info.target, info.compute, info.kv_scheme),
        progress=settings.progress(),
        tokens=tokens,
        window=window,
        run_with=RunWith(engine, provider, plugins),
        exact_angles=exact_angles,
        adapters=adapter_folders(adapters, settings),
    )
    settings.emit("validate", report.to_json(), _table(report), summary=report.passed)
    if junit is not None:
        write_junit(report, junit)
    if html is not None:
        write_html(report, html)
    write_report(report, artifact / REPORT_FILE)
    if not report.passed:
        raise CheckFailed(headline(report))


def _table(report: ParityReport) -> str:
    """The report with colours where stdout is a terminal."""
    from rich.console import Console

    from l4convert.parity.report import render

    console = Console(file=sys.stdout)
    console.width = max(console.width, _TABLE_WIDTH)
    with console.capture() as captured:
        console.print(render(report))
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())
