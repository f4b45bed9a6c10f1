"""``tokenizer.model``, as Meta ships it, to the files that other tokenizers read.

A line of the file is a token's bytes in base64 and its rank (``llama_models/tokenizer_utils.py``). The pattern that
cuts a text into pieces, and the special tokens that follow the ranks, are those of
``llama_models/llama4/tokenizer.py``.

tiktoken merges, in a piece, the two neighbours whose joined bytes have the lowest rank, again and again; a piece that
is a token as a whole is taken at once. The Hugging Face form lists pairs instead. Every pair of tokens that makes a
token up is listed, in the order of the token's rank, which gives the same merges; ``ignore_merges`` gives the short
cut.
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from l4convert.checkpoint.text import read_bytes, show
from l4convert.errors import InputError

RESERVED = 2048  # special tokens of Llama 4, named or not
# Llama 4's has 200,000 tokens of up to 128 bytes in 3.6 MB, and 0.5 M pairs.
MAX_FILE_BYTES = 8 << 20
MAX_TOKENS = 400_000
MAX_TOKEN_BYTES = 256
MAX_MERGES = 2_000_000
_BYTES = 256
BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad|>"
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a ``tokenizer.model``, in the order of their ranks, which must count from 0.

    Raises:
        InputError: The file is unusable, a line is no token with its rank, a rank or token occurs twice or a rank is
            left out, or a byte has no token of its own.
    """
    file = show(path)
    ranks: dict[int, bytes] = {}
    lines = read_bytes(path, MAX_FILE_BYTES).split(b"\n", MAX_TOKENS + 1)
    if len(lines) > MAX_TOKENS + 1:
        raise InputError(f"{file}: more than {MAX_TOKENS:,} lines")
    for number, line in enumerate(lines, 1):
        if line.strip():
            token, rank = _line(line, f"{file}: line {number:,}")
            if rank in ranks:
                raise InputError(f"{file}: line {number:,}: rank {rank:,} occurs twice")
            ranks[rank] = token
    if max(ranks, default=-1) != len(ranks) - 1:
        raise InputError(f"{file}: {len(ranks):,} tokens, but ranks up to {max(ranks, default=0):,}")
    tokens = [ranks[rank] for rank in range(len(ranks))]
    if len(set(tokens)) != len(tokens):
        raise InputError(f"{file}: a token occurs twice")
    absent = _BYTES - sum(len(token) == 1 for token in tokens)
    if absent:
        raise InputError(f"{file}: {absent} of 256 bytes have no token of their own", "download the file again")
    return tokens


def _line(line: bytes, where: str) -> tuple[bytes, int]:
    parts = line.split()
    if len(parts) != 2 or not parts[1].isdigit() or len(parts[1]) > 9:
        raise InputError(f"{where}: not a token in base64 and its rank", "download the file again")
    try:
        token = binascii.a2b_base64(parts[0], strict_mode=True)
    except binascii.Error as error:
        raise InputError(f"{where}: not a token in base64: {show(error)}", "download the file again") from error
    if not 0 < len(token) <= MAX_TOKEN_BYTES:
        raise InputError(f"{where}: a token of {len(token):,} bytes")
    return token, int(parts[1])


@cache
def special_tokens() -> tuple[str, ...]:
    """All special tokens in the order of their ids, which follow the ranks."""
    named = (BEGIN, END, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", *_text(), *_vision(), *_reasoning())
    return (*named, *(f"<|reserved_special_token_{i}|>" for i in range(RESERVED - len(named))))


def special_token_ids(vocab_size: int) -> Mapping[str, int]:
    """Their ids in a vocabulary of this size, of which they are the last; none in one that is too small for them."""
    first = vocab_size - RESERVED
    return {name: first + i for i, name in enumerate(special_tokens())} if first > 0 else {}


def _text() -> Iterator[str]:
    kind = "text_post_train"
    yield from ("<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>")
    yield from _reserved(kind, 0, 6)
    yield from ("<|python_start|>", "<|python_end|>", PAD)
    yield from _reserved(kind, 8, 69)


def _vision() -> Iterator[str]:
    kind = "vision"
    yield from ("<|image_start|>", "<|image_end|>", *_reserved(kind, 0, 2), "<|tile_x_separator|>")
    yield from ("<|tile_y_separator|>", *_reserved(kind, 2, 6), "<|image|>", *_reserved(kind, 6, 7), "<|patch|>")
    yield from _reserved(kind, 7, 1048)


def _reasoning() -> Iterator[str]:
    yield from _reserved("reasoning", 0, 8)
    yield from ("<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>")


def _reserved(kind: str, start: int, stop: int) -> Iterator[str]:
    return (f"<|{kind}_reserved_special_token_{i}|>" for i in range(start, stop))


def tokenizer_json(tokens: list[bytes], where: str = "tokenizer.model") -> bytes:
    """``tokenizer.json`` of Hugging Face's tokenizers library, which puts the beginning-of-text token before a text.

    Args:
        tokens: As :func:`read_ranks` gives them.
        where: What a message calls their file.

    Raises:
        InputError: More pairs of them make a token up than any vocabulary that merges made has.
    """
    letters = _byte_letters()
    names = ["".join(letters[byte] for byte in token) for token in tokens]
    first = len(tokens)
    added = [
        {"id": first + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, name in enumerate(special_tokens())
    ]
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                _byte_level(),
            ],
        },
        "post_processor": {"type": "Sequence", "processors": [_byte_level(), _beginning(first)]},
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {name: rank for rank, name in enumerate(names)},
            "merges": _merges(tokens, names, where),
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _byte_level() -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def _beginning(token: int) -> dict[str, Any]:
    special, text = {"SpecialToken": {"id": BEGIN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": BEGIN, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, *second],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [token], "tokens": [BEGIN]}},
    }


def _merges(tokens: list[bytes], names: list[str], where: str) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token up, in the order of its rank, then of theirs."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    for token in tokens:
        pairs = [
            (left, right)
            for cut in range(1, len(token))
            if (left := ranks.get(token[:cut])) is not None and (right := ranks.get(token[cut:])) is not None
        ]
        merges += [(names[left], names[right]) for left, right in sorted(pairs)]
        if len(merges) > MAX_MERGES:
            raise InputError(f"{where}: its tokens can be made in more than {MAX_MERGES:,} ways")
    return merges


def _byte_letters() -> list[str]:
    """A printable character for every byte, as GPT-2's ``bytes_to_unicode`` chooses them.

    Bytes that print as themselves in Latin-1 stand for themselves, the others for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(_BYTES)]
