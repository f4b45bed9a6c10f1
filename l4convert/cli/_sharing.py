"""How it is shown that weights stay in files of the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from l4convert.cli._render import size

if TYPE_CHECKING:
    from l4convert.planning.sharing import SharingPlan


def sharing_payload(sharing: SharingPlan) -> dict[str, Any]:
    """JSON fields."""
    return {
        "tensors": sharing.tensors,
        "bytes": sharing.bytes,
        "by": sharing.by,
        "files": dict(sharing.files),
        "written": [{"reason": reason, "bytes": nbytes} for reason, nbytes in sharing.written.items()],
    }


def sharing_rows(sharing: SharingPlan) -> list[tuple[str, str]]:
    """Two rows of a summary."""
    number = len(sharing.files)
    files = f"{number} file{'s' if number > 1 else ''} of the checkpoint"
    by = "" if sharing.by is None else f", each one a {sharing.by}"
    written = ", ".join(f"{size(nbytes)} {reason}" for reason, nbytes in sharing.written.items())
    return [
        ("shared", f"{size(sharing.bytes)} in {sharing.tensors:,} tensors, in {files}{by}"),
        ("not shared", written or "nothing"),
    ]
