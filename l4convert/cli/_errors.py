"""From an exception to what the user sees: one line, a hint, and the exit code of DESIGN section 6."""

from __future__ import annotations

import errno
import os
import sys
import traceback

import click
from click.core import ParameterSource

from l4convert.cli._settings import Settings
from l4convert.errors import INSTALL, InputError, L4Error, UsageError, backend_missing

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader of our output (head, less) went away

_NO_THREAD = "can't start new thread"  # CPython's threading: no memory for its stack, or too many processes
# What the file system may refuse through no fault of ours.
_REFUSALS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EISDIR, errno.ENOTDIR,
}  # fmt: skip


def report(error: BaseException, settings: Settings) -> int:
    """Explain ``error`` on stderr and return the process's exit code."""
    if isinstance(error, BrokenPipeError):
        return drop_output()
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    if settings.debug:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, click.Abort | KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    known = _translate(error)
    if known is None:
        hint = "run again with --debug for the traceback, and report it"
        known = L4Error(f"internal error: {type(error).__name__}: {error}", hint)
    click.echo(f"error: {known.message}", err=True)
    if known.hint:
        click.echo(f"hint: {known.hint}", err=True)
    return known.exit_code


def drop_output() -> int:
    """Let Python's last flush of stdout, whose reader is gone, go nowhere; the exit code for that."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def _translate(error: BaseException) -> L4Error | None:
    """The error as one of ours; None when it is a defect."""
    if isinstance(error, L4Error):
        return error
    if isinstance(error, click.ClickException):
        return UsageError(error.format_message().removesuffix("."), _usage_hint(error))
    if isinstance(error, ModuleNotFoundError):
        module = str(error.name).partition(".")[0]
        return backend_missing(module) if module in INSTALL else None
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return InputError(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror))
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and str(error) == _NO_THREAD):
        return L4Error(f"out of memory: {error}" if str(error) else "out of memory")
    return None


def _usage_hint(error: click.ClickException) -> str | None:
    """Where a rejected value came from, if not from the command line; else which help to read."""
    ctx = getattr(error, "ctx", None)
    if ctx is None:
        return None
    if isinstance(error, click.BadParameter) and error.param is not None and error.param.name is not None:
        source = ctx.get_parameter_source(error.param.name)
        if source is ParameterSource.DEFAULT_MAP:
            return f"the value comes from {ctx.find_root().obj.config}"
        if source is ParameterSource.ENVIRONMENT:
            return f"the value comes from the environment variable {ctx.auto_envvar_prefix}_{error.param.name.upper()}"
    return f"see {ctx.command_path} --help"
