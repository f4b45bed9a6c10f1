"""``l4convert plugins``: the library of GPU kernels and TensorRT plugins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l4convert.cli._complete import sm_numbers
from l4convert.cli._render import size, table
from l4convert.cli._settings import global_options, settings_of
from l4convert.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from l4convert.plugins.library.build import BuildOptions, Built
    from l4convert.plugins.library.compile import Job
    from l4convert.plugins.library.native import Kernel, Library

EPILOG = """\b
Examples:
  l4convert plugins build                        for SM 80, 89, 90, 100 and 120; no GPU is needed
  l4convert plugins build --sm 90 --output lib   for H100 only
  l4convert plugins list lib/libl4convert_plugins.so
  l4convert plugins check lib/libl4convert_plugins.so
"""

BUILD_EPILOG = """\b
Examples:
  l4convert plugins build
  l4convert plugins build --sm 90 --sm 103 --jobs 8
  l4convert plugins build --head-dim 64 --head-dim 128   attention kernels for models of other shapes too
  l4convert plugins build --compute bf16                 half of the kernels, in half the time
  l4convert plugins build --dry-run                      what would be compiled?

\b
What it needs: pip install 'l4convert[plugins]', and a C++ compiler. TensorRT's headers are those of the environment
variable TENSORRT_ROOT, else of the package kernel-lens; without any, the library has no TensorRT plugins. Compiled
kernels are kept in a cache, so a build that was interrupted goes on where it was.
"""

LIST_EPILOG = """\b
Examples:
  l4convert plugins list build/plugins/libl4convert_plugins.so
  l4convert plugins list build/plugins/libl4convert_plugins.so --sm 90 --json
"""

CHECK_EPILOG = """\b
Examples:
  l4convert plugins check build/plugins/libl4convert_plugins.so

\b
The program l4convert_conformance, which the build puts beside the library, loads it as TensorRT would and drives every
method of its plugins; neither TensorRT nor a GPU is needed. The exit code is 4 where a check fails.
"""

DEFAULT_OUTPUT = Path("build/plugins")  # native.DEFAULT_LIBRARY is there


@click.group("plugins", epilog=EPILOG)
@global_options
def command() -> None:
    """Build and look into the library of GPU kernels and TensorRT plugins."""


@command.command("build", epilog=BUILD_EPILOG)
@click.option("--sm", type=int, multiple=True, metavar="NN", shell_complete=sm_numbers,
              help="Compute capability to compile for, as 90 for 9.0; may be given several times.  "
                   "[default: 80, 89, 90, 100, 120]")  # fmt: skip
@click.option("--head-dim", type=int, multiple=True, metavar="N",
              help="Head dimension of attention kernels; may be given several times.  [default: 128]")  # fmt: skip
@click.option("--compute", type=click.Choice(["bf16", "fp16"]), multiple=True,
              help="Type of activations to compile for; may be given twice.  [default: both]")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), default=DEFAULT_OUTPUT, show_default=True,
              metavar="DIR", help="Folder for libl4convert_plugins.so.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), metavar="N",
              help="Compilations at a time.  [default: the number of cores]")  # fmt: skip
@click.option("--cache", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder for compiled kernels.  [default: ~/.cache/l4convert/plugins]")  # fmt: skip
# For developers: rewrites plugins/library/resources.json, which the tests compare with.
@click.option("--update-resources", is_flag=True, hidden=True)
@click.option("--dry-run", is_flag=True, help="Show what would be compiled; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace the library that is there.")
@global_options
@click.pass_context
def build(ctx: click.Context, /, *, dry_run: bool, update_resources: bool, **values: Any) -> None:
    """Compile the kernels and link libl4convert_plugins.so; no GPU, CUDA or TensorRT is needed."""
    from l4convert.plugins.library import build as library
    from l4convert.plugins.library.resources import make_table, write_table

    settings = settings_of(ctx)
    options = _options(**values)
    if update_resources and (values["sm"] or values["head_dim"] or values["compute"]):
        raise UsageError("--update-resources is for the kernels of the default library: no --sm, --head-dim, --compute")
    if dry_run:
        jobs = library.plan(options)
        missing = library.missing(options, jobs)
        settings.emit("plugins.build", _plan_payload(options, jobs, missing), _plan_text(options, jobs, missing))
        return
    built = library.build(options, settings.progress())
    if update_resources:
        write_table(make_table((k.job.variant.name, k.job.sm, k.resources) for k in built.kernels))
    settings.emit("plugins.build", _payload(built), _text(built), summary=True)


@command.command("list", epilog=LIST_EPILOG)
@click.argument("library", metavar="LIB", type=click.Path(path_type=Path))
@click.option("--sm", type=int, metavar="NN", help="Only the kernels compiled for this compute capability.")
@global_options
@click.pass_context
def list_kernels(ctx: click.Context, library: Path, sm: int | None) -> None:
    """List the kernels in a library: for which GPUs, how large, and what they take of a multiprocessor."""
    from l4convert.plugins.library.native import load

    loaded = load(library)
    sms = sorted({kernel.sm for kernel in loaded.kernels})
    if sm not in (None, *sms):
        raise UsageError(f"--sm {sm}: {library} has kernels for {', '.join(map(str, sms))}")
    kernels = [kernel for kernel in loaded.kernels if sm in (None, kernel.sm)]
    settings_of(ctx).emit("plugins.list", _list_payload(loaded, kernels), _list_text(loaded, kernels))


@command.command("check", epilog=CHECK_EPILOG)
@click.argument("library", metavar="LIB", type=click.Path(path_type=Path))
@global_options
@click.pass_context
def check(ctx: click.Context, library: Path) -> None:
    """Drive the TensorRT plugins of a library through TensorRT's contract, without TensorRT."""
    from l4convert.plugins.library.checking import check_library

    settings = settings_of(ctx)
    report = check_library(library)
    rows = [(row["subject"], row["name"], "ok" if row["ok"] else row["wrong"]) for row in report["checks"]]
    text = table(["what", "check", "result"], rows)
    settings.emit("plugins.check", report, f"{text}\n\n{len(rows)} checks, {report['failed']} failed.")
    if report["failed"]:
        raise CheckFailed(f"{library}: {report['failed']} of {len(rows)} checks failed")


def _options(
    *,
    sm: tuple[int, ...],
    head_dim: tuple[int, ...],
    compute: tuple[str, ...],
    output: Path,
    jobs: int | None,
    cache: Path | None,
    overwrite: bool,
) -> BuildOptions:
    from l4convert.plugins.library.build import BuildOptions, cache_folder
    from l4convert.plugins.library.variants import COMPUTES, DEFAULT_HEAD_DIMS, DEFAULT_SMS

    return BuildOptions(
        output=output,
        sms=sm or DEFAULT_SMS,
        head_dims=head_dim or DEFAULT_HEAD_DIMS,
        computes=compute or COMPUTES,
        jobs=jobs or len(os.sched_getaffinity(0)),
        cache=cache or cache_folder(),
        overwrite=overwrite,
    )


def _plan_payload(options: BuildOptions, jobs: list[Job], missing: list[Job]) -> dict[str, Any]:
    waiting = {id(job) for job in missing}
    kernels = [
        {"op": job.op, "name": job.variant.name, "sm": job.sm, "compiled": id(job) not in waiting} for job in jobs
    ]
    return {"dry_run": True, "library": str(options.library), "kernels": kernels}


def _plan_text(options: BuildOptions, jobs: list[Job], missing: list[Job]) -> str:
    waiting = {id(job) for job in missing}
    rows = []
    for sm in sorted({job.sm for job in jobs}):
        of_sm = [job for job in jobs if job.sm == sm]
        rows.append((sm, len(of_sm), sum(id(job) in waiting for job in of_sm)))
    listed = table(["SM", "kernels", "to compile"], rows, right=(0, 1, 2))
    return f"{listed}\n\n{options.library} would have {len(jobs)} kernels; {len(missing)} of them are not compiled yet."


def _payload(built: Built) -> dict[str, Any]:
    kernels = [
        {"op": kernel.job.op, "name": kernel.job.variant.name, "sm": kernel.job.sm, "bytes": len(kernel.image)}
        for kernel in built.kernels
    ]
    return {
        "dry_run": False,
        "library": str(built.library),
        "bytes": built.library.stat().st_size,
        "tensorrt": built.tools.tensorrt_include is not None,
        "compiled": built.compiled,
        "kernels": kernels,
    }


def _text(built: Built) -> str:
    rows = []
    for sm in sorted({kernel.job.sm for kernel in built.kernels}):
        of_sm = [kernel for kernel in built.kernels if kernel.job.sm == sm]
        spilling = sum(kernel.resources.spills > 0 for kernel in of_sm)
        rows.append((sm, len(of_sm), size(sum(len(kernel.image) for kernel in of_sm)), spilling))
    parts = [table(["SM", "kernels", "size", "that spill"], rows, right=(0, 1, 2, 3))]
    parts.append(f"{built.library}: {size(built.library.stat().st_size)}, {built.compiled} kernels newly compiled.")
    if built.tools.tensorrt_include is None:
        parts.append("It has no TensorRT plugins: set TENSORRT_ROOT, or pip install kernel-lens for the headers.")
    return "\n\n".join(parts)


_COLUMNS = ("op", "name", "sm", "exact", "size", "warps", "registers", "spills", "shared", "blocks")


def _list_payload(library: Library, kernels: list[Kernel]) -> dict[str, Any]:
    rows = [{**{name: getattr(kernel, name) for name in _COLUMNS}, "constants": kernel.constants} for kernel in kernels]
    return {"library": str(library.path), "version": library.version, "sms": list(library.sms), "kernels": rows}


def _list_text(library: Library, kernels: list[Kernel]) -> str:
    rows = [
        (k.name, k.sm, size(k.size), 32 * k.warps, k.registers, k.spills, size(k.shared), k.blocks) for k in kernels
    ]
    headers = ["kernel", "SM", "size", "threads", "registers", "spilled", "shared", "blocks"]
    listed = table(headers, rows, right=range(1, 8))
    return (
        f"{listed}\n\nBuilt by l4convert {library.version}. registers and spilled bytes: of a thread; shared memory: "
        "of a block; blocks: that fit a multiprocessor at once."
    )
