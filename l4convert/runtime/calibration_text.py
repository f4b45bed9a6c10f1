"""The text that caches are calibrated on: a file of any size, of which the beginning is used."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l4convert.errors import InputError, UsageError
from l4convert.runtime.runner import IntArray
from l4convert.runtime.tokenizer import TextTokenizer

DEFAULT_TOKENS = 4096
#: With fewer, a maximum says little about the next text.
MIN_TOKENS = 100

_BLOCK_BYTES = 1 << 20
# No more is decoded and tokenized than so many characters a token; usual text has about four.
_MOST_CHARACTERS = 64


@dataclass(frozen=True)
class CalibrationText:
    """Tokens to calibrate on.

    Attributes:
        name: The file's name, without its folder.
        sha256: Of the whole file.
        prefix: What a text begins with (the beginning-of-text token, or nothing).
        ids: Its tokens without the prefix, [n].
    """

    name: str
    sha256: str
    prefix: tuple[int, ...]
    ids: IntArray

    def windows(self, length: int) -> Iterator[IntArray]:
        """The text in parts of at most ``length`` tokens, each of which begins as a text does."""
        prefix = np.array(self.prefix, np.int64)
        own = max(1, length - len(prefix))
        for start in range(0, len(self.ids), own):
            yield np.concatenate([prefix, self.ids[start : start + own]])

    def to_dict(self) -> dict[str, object]:
        """For the manifest."""
        return {"file": self.name, "sha256": self.sha256, "tokens": len(self.ids)}


def read_calibration_text(
    file: Path, checkpoint: Path, tokens: int, vocab_size: int, tokenizer: TextTokenizer | None = None
) -> CalibrationText:
    """Read the beginning of a file in bounded memory.

    Args:
        file: UTF-8 text.
        checkpoint: The folder with ``tokenizer.json``.
        tokens: The most to use.
        vocab_size: Of the model.
        tokenizer: Where the folder has none of its own.

    Raises:
        UsageError: Fewer than ``MIN_TOKENS`` tokens are asked for.
        InputError: The file cannot be read, is not UTF-8, or is too short; or the tokenizer cannot be used.
    """
    if tokens < MIN_TOKENS:
        raise UsageError(f"{tokens} tokens are too few to calibrate on", f"at least {MIN_TOKENS}")
    tokenizer = tokenizer or TextTokenizer.open(checkpoint)
    text, digest = _beginning(file, tokens * _MOST_CHARACTERS)
    ids = np.array(tokenizer.encode(text, special=False)[:tokens], np.int64)
    if len(ids) < MIN_TOKENS:
        raise InputError(
            f"{file}: {len(ids)} tokens are too few to calibrate on", f"give a text of at least {MIN_TOKENS} tokens"
        )
    if (highest := max(ids.max(), *tokenizer.prefix_ids, 0)) >= vocab_size:
        raise InputError(f"{checkpoint}/tokenizer.json: token {highest} is outside the model's vocabulary")
    return CalibrationText(file.name, digest, tokenizer.prefix_ids, ids)


def _beginning(file: Path, characters: int) -> tuple[str, str]:
    """The first characters of a file, and the SHA-256 of all of it; all of it must be UTF-8."""
    decoder, digest, parts, left = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256(), [], characters
    try:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                part = decoder.decode(block)
                parts.append(part[:left])
                left -= len(parts[-1])
        decoder.decode(b"", final=True)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}", "give --calibration a text file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8: {error.reason}", "give --calibration a text in UTF-8") from error
    return "".join(parts), digest.hexdigest()
