"""A model of the hub as a folder of whole files, for those who can read nothing else: the reference of ``validate``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from l4convert.checkpoint.hub.address import find_address
from l4convert.checkpoint.hub.faults import trying
from l4convert.checkpoint.hub.listing import Opened, open_folder, quiet
from l4convert.checkpoint.remote import RemoteFile, remote_files
from l4convert.checkpoint.text import show
from l4convert.errors import InputError
from l4convert.progress import NO_PROGRESS, Progress, format_amount

# Files that are downloaded at the same time.
_TOGETHER = 4


def _ignore(_: str) -> None:
    """Nobody listens."""


def local_checkpoint(path: Path, progress: Progress = NO_PROGRESS, tell: Callable[[str], None] = _ignore) -> Path:
    """The folder of a CKPT; one on the hub is downloaded into huggingface_hub's cache, what is there is not again.

    Args:
        path: A folder, which is returned as it is, or an address.
        progress: Told of every file.
        tell: Called before anything large is fetched, with how large it is.

    Raises:
        RemoteError: It cannot be fetched.
        InputError: The disk is too small for it.
    """
    address = find_address(path)
    if address is None:
        return path
    opened = open_folder(address)
    files = remote_files(opened.folder)
    if files:
        total = sum(file.size for file in files)
        what = f"{format_amount(total, 'B')} in {len(files)} files"
        _require_room(opened, total, what)
        tell(f"{address}: downloading {what} into {opened.folder}")
        _download(opened, files, progress)
    return opened.folder


def _require_room(opened: Opened, total: int, what: str) -> None:
    free = shutil.disk_usage(opened.folder).free
    if free < total:
        raise InputError(
            f"{opened.source}: {what} are to be downloaded, {show(opened.folder.anchor)} has "
            f"{format_amount(free, 'B')} free",
            "set HF_HUB_CACHE to a folder on a larger disk",
        )


def _download(opened: Opened, files: Sequence[RemoteFile], progress: Progress) -> None:
    from huggingface_hub import hf_hub_download

    source = opened.source
    with quiet(), progress.task("Downloading", total=sum(file.size for file in files), unit="B") as task:

        def download(file: RemoteFile) -> None:
            name = file.path.name
            trying(lambda: hf_hub_download(source.repo, name, revision=source.commit), file.name)
            task.advance(file.size)

        with ThreadPoolExecutor(_TOGETHER, thread_name_prefix="download") as executor:
            list(executor.map(download, files))
