"""Text to tokens and back, by the artifact's ``tokenizer.json``: the tokens that transformers' AutoTokenizer gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from l4convert.checkpoint.templates import TOKENIZER_BYTES
from l4convert.checkpoint.text import require_file, require_inside, show
from l4convert.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextTokenizer:
    """A checkpoint's tokenizer.

    Attributes:
        prefix_ids: What it puts before a text (usually the beginning-of-text token, or nothing); ``suffix_ids``: after.
    """

    def __init__(self, backend: Tokenizer, prefix_ids: Sequence[int], suffix_ids: Sequence[int]) -> None:
        self._backend = backend
        self.prefix_ids = tuple(prefix_ids)
        self.suffix_ids = tuple(suffix_ids)

    @classmethod
    def open(cls, folder: Path) -> TextTokenizer:
        """Load ``tokenizer.json`` from an artifact or checkpoint.

        Raises:
            InputError: The file is absent or damaged.
        """
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        if not file.is_file():
            hint = "Copy the checkpoint's tokenizer.json beside the model, or work with token ids."
            raise InputError(f"{file}: no such file", hint)
        size = require_file(file)
        require_inside(file)
        if size > TOKENIZER_BYTES:
            raise InputError(f"{show(file)}: {size:,} bytes, more than a tokenizer can sensibly have")
        with _reported(f"{show(file)}: not a tokenizer"):
            backend = Tokenizer.from_file(str(file))
            return cls._prepared(backend, show(file))

    @classmethod
    def parse(cls, content: bytes, name: str) -> TextTokenizer:
        """A ``tokenizer.json`` that is in memory; ``name`` is what messages call it."""
        from tokenizers import Tokenizer

        with _reported(f"{show(name)}: not a tokenizer"):
            return cls._prepared(Tokenizer.from_str(content.decode()), name)

    @classmethod
    def _prepared(cls, backend: Tokenizer, name: str) -> TextTokenizer:
        backend.no_truncation()  # some training scripts save a limit, and dropping text silently is never right
        backend.no_padding()
        return cls(backend, *_special_ids(backend, name))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in it become special tokens.

        Args:
            text: Any text.
            special: Put ``prefix_ids`` before and ``suffix_ids`` after.

        Raises:
            InputError: The text has lone surrogates, which is how Python reads bytes that are not UTF-8.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError("the text is not UTF-8", "give it in UTF-8")
        with _reported("tokenizer.json: cannot encode the text"):
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [*self.prefix_ids, *ids, *self.suffix_ids] if special else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        with _reported("tokenizer.json: cannot decode tokens"):
            text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self) -> TextStream:
        """A decoder for tokens that come one at a time."""
        return TextStream(self)


class TextStream:
    """Turns tokens into text as they come; a character whose bytes are spread over tokens comes out once, whole.

    Llama 4's tokenizer is byte-level: a token is a string of bytes whatever its neighbours are, so after a complete
    character everything decoded so far can be forgotten. A decoder shows the incomplete tail as one U+FFFD, which is
    therefore held back until it is complete, turns out to be invalid, or the text ends.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._shown = 0  # characters of the pending tokens' text that were given out

    def push(self, token: int) -> str:
        """Add a token; give the text that is certain now, often ``""``."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        certain = text.removesuffix(REPLACEMENT)
        piece = certain[self._shown :]
        self._shown = len(certain)
        if certain == text:
            self._pending, self._shown = [], 0
        return piece

    def finish(self) -> str:
        """End the text; give what was held back."""
        piece = self._tokenizer.decode(self._pending)[self._shown :]
        self._pending, self._shown = [], 0
        return piece


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Turn what the library raises into an InputError that begins with ``what``.

    It raises bare Exception; where its Rust panics (``pyo3_runtime.PanicException``), a BaseException.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InputError(f"{what}: {show(error)}") from error
        raise


def _special_ids(backend: Tokenizer, file: str) -> tuple[list[int], list[int]]:
    """What the tokenizer's own post-processor puts before and after a text.

    Nothing else has a say: transformers 5 drops ``add_bos_token`` from ``tokenizer_config.json`` when there is a
    ``tokenizer.json``.
    """
    probe = "a"
    bare = backend.encode(probe, add_special_tokens=False).ids
    dressed = backend.encode(probe).ids
    start = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), None)
    if not bare or start is None:
        raise InputError(f"{file}: its post-processor changes tokens of the text, which no Llama 4 tokenizer does")
    return dressed[:start], dressed[start + len(bare) :]
