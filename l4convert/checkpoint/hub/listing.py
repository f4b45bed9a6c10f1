"""What a model on the hub consists of: its commit, its small files in the cache, its weights wherever they are."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l4convert import __version__
from l4convert.checkpoint.hub.address import Address
from l4convert.checkpoint.hub.faults import trying
from l4convert.checkpoint.remote import HubSource, RemoteFile, complete
from l4convert.checkpoint.text import name_folder
from l4convert.errors import RemoteError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Of either kind. A repository with both is one of Hugging Face's: Meta's files are the same weights again.
_WEIGHTS = ((".safetensors",), (".pth", ".pt"))
# Configuration, index, tokenizer, chat template.
_SMALL = (".json", ".jinja", ".model")
# The largest that formats read whole (an index); Llama 4's tokenizer.json has 28 MB.
_SMALL_BYTES = 100_000_000
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Listed:
    """A file of a repository's root.

    Attributes:
        nbytes: Its size.
        etag: SHA-256 of its content for large files (Git LFS, Xet), the SHA-1 of its Git object for others.
    """

    name: str
    nbytes: int
    etag: str


@dataclass(frozen=True)
class Listing:
    """A repository at a commit."""

    source: HubSource
    files: tuple[Listed, ...]


@dataclass(frozen=True)
class Opened:
    """A model's folder in the cache, completed by the weights that are on the server.

    Attributes:
        unreachable: Why the folder is all there is, where the hub was not asked.
    """

    folder: Path
    source: HubSource
    unreachable: str | None = None


def open_folder(address: Address) -> Opened:
    """Pin an address to a commit and make its folder: small files are fetched, weights are only named.

    Raises:
        RemoteError: There is no such model, or it cannot be had: no access, no network and not in the cache ...
    """
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        return _cached(address, "HF_HUB_OFFLINE is set")
    try:
        listing = list_files(address)
    except RemoteError as error:
        if not _no_connection(error.__cause__):
            raise
        try:
            return _cached(address, "the hub cannot be reached")
        except RemoteError:
            raise error from error.__cause__
    kinds = [[file for file in listing.files if file.name.endswith(kind)] for kind in _WEIGHTS]
    weights = next(filter(None, kinds), None)
    if weights is None:
        raise RemoteError(
            f"{address}: holds no weights, neither {' nor '.join(kind[0] for kind in _WEIGHTS)} files",
            "of a repository, only the files that lie in no folder are read",
        )
    small = [file.name for file in listing.files if file.name.endswith(_SMALL) and file.nbytes <= _SMALL_BYTES]
    if not small:
        raise RemoteError(f"{address}: holds no config.json", "look at the model's page for what it holds")
    folder = fetch(address, listing, small)
    remote = [_remote(folder, listing.source, file) for file in weights if not (folder / file.name).exists()]
    name_folder(folder, str(listing.source))
    complete(folder, remote)
    _greet(remote)
    return Opened(folder, listing.source)


def list_files(address: Address) -> Listing:
    """Ask the hub which commit a revision is, and what the root of the repository holds.

    Raises:
        RemoteError: It does not say.
    """
    what = str(address)
    info = trying(lambda: _api().model_info(address.repo, revision=address.revision, files_metadata=True,
                                            timeout=_timeout()), what)  # fmt: skip
    commit = info.sha
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise RemoteError(f"{what}: the server names no commit", "check HF_ENDPOINT")
    files = []
    for sibling in info.siblings or ():
        etag = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
        nbytes = sibling.lfs.size if sibling.lfs is not None else sibling.size
        # Folders hold other formats (original/, onnx/); a name that is no plain one names nothing that we would read.
        if isinstance(sibling.rfilename, str) and _NAME.fullmatch(sibling.rfilename):
            if type(nbytes) is not int or nbytes < 0 or not isinstance(etag, str) or not _ETAG.fullmatch(etag):
                raise RemoteError(f"{what}: the server does not say what {sibling.rfilename} is", "check HF_ENDPOINT")
            files.append(Listed(sibling.rfilename, nbytes, etag))
    return Listing(HubSource(address.repo, commit), tuple(files))


def fetch(address: Address, listing: Listing, names: list[str]) -> Path:
    """Put files of a listing into the cache, unless they are there; the folder that holds them.

    Raises:
        RemoteError: They cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    def download(revision: str | None) -> Path:
        return Path(snapshot_download(address.repo, revision=revision, allow_patterns=names))

    with quiet():
        # By the revision first, so that the cache knows its commit when there is no network.
        folder = trying(lambda: download(address.revision), str(address))
        if folder.name != listing.source.commit:  # it moved on just now
            folder = trying(lambda: download(listing.source.commit), str(address))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise RemoteError(f"{address}: {absent[0]} was listed and cannot be fetched", "try again")
    return folder


def _cached(address: Address, why: str) -> Opened:
    """The folder that the cache has for an address."""
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            folder = Path(
                snapshot_download(
                    address.repo, revision=address.revision, local_files_only=True, allow_patterns=["config.json"]
                )
            )
    except Exception as error:
        hint = "once, with a network, fetch it: `hf download " + address.repo + "`"
        raise RemoteError(f"{address}: {why}, and the model is not in the cache", hint) from error
    source = HubSource(address.repo, folder.name)
    name_folder(folder, str(source))
    complete(folder, [])
    return Opened(folder, source, why)


def _remote(folder: Path, source: HubSource, file: Listed) -> RemoteFile:
    from huggingface_hub import constants, hf_hub_url

    url = hf_hub_url(source.repo, file.name, revision=source.commit, endpoint=constants.ENDPOINT)
    sha256 = file.etag if len(file.etag) == 64 else None
    return RemoteFile(folder / file.name, f"{source}/{file.name}", url, file.nbytes, file.etag, sha256)


def _greet(files: list[RemoteFile]) -> None:
    """Read the beginnings of all files at once: a header a file, one after the other, would take a minute."""
    if len(files) > 1:
        with ThreadPoolExecutor(8, thread_name_prefix="headers") as executor:
            list(executor.map(lambda file: file.read(0, 8), files))


def _no_connection(error: BaseException | None) -> bool:
    import httpx2

    return isinstance(error, httpx2.TransportError)


def _api() -> HfApi:
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT, library_name="l4convert", library_version=__version__)


def _timeout() -> float:
    from huggingface_hub import constants

    return float(constants.HF_HUB_ETAG_TIMEOUT)


@contextmanager
def quiet() -> Iterator[None]:
    """Without huggingface_hub's own bars and warnings: what fails is told once, by us."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    bars, level = not are_progress_bars_disabled(), get_verbosity()
    disable_progress_bars()
    set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        set_verbosity(level)
        if bars:
            enable_progress_bars()
