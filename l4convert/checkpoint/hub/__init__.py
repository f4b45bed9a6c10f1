"""Checkpoints on the Hugging Face Hub: ``hf://org/name`` or ``hf://org/name@revision`` in the place of a folder.

The revision is pinned to a commit first. Small files (configuration, index, tokenizer) are put into huggingface_hub's
cache; weights that are in that cache already are used from there, others stay on the server and are read in ranges.
docs/adr/0022-range-reads.md has the reasons.
"""

from __future__ import annotations

from l4convert.checkpoint.hub.address import Address, find_address
from l4convert.checkpoint.hub.listing import Opened, open_folder
from l4convert.checkpoint.hub.snapshot import local_checkpoint
from l4convert.checkpoint.traffic import TRAFFIC, Traffic

__all__ = ["TRAFFIC", "Address", "Opened", "Traffic", "find_address", "local_checkpoint", "open_folder"]
