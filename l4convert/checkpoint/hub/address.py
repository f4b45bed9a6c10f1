"""``hf://org/name[@revision]``, taken apart by huggingface_hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from l4convert.checkpoint.text import address_text, is_address, show
from l4convert.errors import UsageError, backend_missing

_FORM = "write it as hf://org/name or hf://org/name@revision"


@dataclass(frozen=True)
class Address:
    """A model on the hub.

    Attributes:
        repo: ``org/name``.
        revision: A branch, tag or commit; None: the default branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repo}" + (f"@{self.revision}" if self.revision else "")


def find_address(path: Path | str) -> Address | None:
    """The model that a CKPT names; None where it is a folder.

    Raises:
        UsageError: It begins with ``hf://`` and is no address of a model.
        BackendMissing: huggingface_hub is not installed.
    """
    if not is_address(path):
        return None
    text = address_text(path)
    try:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import parse_hf_uri
    except ModuleNotFoundError as error:
        raise backend_missing("huggingface_hub") from error
    try:
        found = parse_hf_uri(text)
    except (ValueError, HFValidationError) as error:
        raise UsageError(f"{show(text)}: no address of a model", _FORM) from error
    if found.type != "model" or found.path_in_repo:
        raise UsageError(f"{show(text)}: no address of a model", _FORM)
    return Address(found.id, found.revision)
