"""Whether to go on from what an earlier run left, and whether to leave something for a later one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from l4convert.emit.identity import SOURCE
from l4convert.emit.jobs import total_jobs
from l4convert.emit.journal import Journal, Recorded, changed_facts, read_journal
from l4convert.emit.plan import WEIGHTS_FILE, WeightsPlan
from l4convert.emit.staging import Staging, allocated_bytes, reported, sync
from l4convert.errors import BackendMissing, ClusterError, InputError, L4Error, RemoteError, UsageError

AGAIN = "run the same command again: it goes on from what is written"
_MAX_NAMED = 3


@contextmanager
def open_journal(staging: Staging, plan: WeightsPlan, facts: Mapping[str, Any], restart: bool) -> Iterator[Journal]:
    """The journal of a run, which knows the jobs that an earlier run of the same work finished.

    Raises:
        UsageError: What an earlier run left is of other options, or of another version of this tool.
        InputError: It is of another source, or the journal cannot be read or written.
    """
    with reported(f"{staging.journal}: cannot be read"):
        recorded = read_journal(staging.journal) if staging.keep else None
    if recorded is not None and recorded.digests and not restart:
        _require_same(staging, recorded, facts)
    else:
        recorded = Recorded(facts)
        with reported(f"{staging.room}: what an earlier run left cannot be removed"):
            staging.clear()
    with reported(f"{staging.journal}: cannot be written"):
        _remove_all_but_weights(staging)
        journal = Journal(staging.journal, recorded, total_jobs(plan))
    try:
        with reported(f"{staging.room}: cannot be written"):
            sync(staging.room)
            sync(staging.room.parent)
        yield journal
    finally:
        journal.close()


@contextmanager
def continued(staging: Staging, journal: Journal) -> Iterator[None]:
    """Keep what was written when the block fails for a reason that can pass: disk, memory, machine, network, user."""
    try:
        yield
    except BaseException as error:
        known = UsageError | BackendMissing | ClusterError | RemoteError
        passing = isinstance(error, known) or not isinstance(error, L4Error)
        passing = passing or isinstance(error.__cause__, OSError)
        staging.keep = staging.folder.exists() and journal.committed > 0 and passing
        if staging.keep and isinstance(error, L4Error):
            error.hint = f"{error.hint}; then {AGAIN}" if error.hint else AGAIN
        raise


def _require_same(staging: Staging, recorded: Recorded, facts: Mapping[str, Any]) -> None:
    changed = changed_facts(recorded.facts, facts)
    if not changed:
        return
    files = [name for name in changed if name.startswith(SOURCE) or name == "source"]
    named = list(files or changed)
    if len(named) > 1 and "source" in named:
        named.remove("source")
    more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
    what = ", ".join("the source" if name == "source" else name for name in named[:_MAX_NAMED]) + more
    written = allocated_bytes(staging.folder / WEIGHTS_FILE)
    message = f"{staging.out}: {staging.room.name} holds an unfinished run that cannot be continued; changed: {what}"
    hint = f"pass --restart to discard it ({written} bytes)"
    if files:
        raise InputError(message, hint=f"put the source back as it was, or {hint}")
    raise UsageError(message, hint=f"give the options of that run, or {hint}")


def _remove_all_but_weights(staging: Staging) -> None:
    for path in staging.folder.iterdir():
        if path.name != WEIGHTS_FILE:
            path.unlink()
