"""``l4convert verify``: is an artifact still what was written?"""

from __future__ import annotations

from pathlib import Path

import click

from l4convert.cli._render import size
from l4convert.cli._settings import global_options, settings_of
from l4convert.errors import CheckFailed

EPILOG = """\b
Examples:
  l4convert verify scout-int4
  l4convert verify scout-int4 --quiet && deploy scout-int4

\b
Exit code 0 when every file and tensor has the digest in the manifest; 4 when one has not.
"""


@click.command("verify", epilog=EPILOG)
@click.argument("artifact", metavar="OUT", type=click.Path(path_type=Path))
@global_options
@click.pass_context
def command(ctx: click.Context, artifact: Path) -> None:
    """Check every file and tensor of the artifact in folder OUT against the manifest's SHA-256 digests."""
    from l4convert.checkpoint.text import and_more
    from l4convert.emit import verify_artifact

    settings = settings_of(ctx)
    report = verify_artifact(artifact, settings.progress())
    checked = f"{report.files} files and {report.tensors:,} tensors, {size(report.nbytes)}"
    text = f"{artifact}: intact ({checked})" if report.ok else "\n".join(report.problems)
    settings.emit("verify", report.as_dict(), text, summary=report.ok)
    if not report.ok:
        raise CheckFailed(
            f"{artifact}: not what was written: {report.problems[0]}{and_more(len(report.problems) - 1)}",
            "copy the artifact again from its source, or convert again",
        )
