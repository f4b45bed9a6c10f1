"""params.json and tokenizer.model of Meta's format, and which files there are."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.case import Damage, Family, cases
from tests.hostile.files import edit_json, folder_instead, link, outside, pipe, remove, sparse, text
from tests.hostile.meta_base import PARAMS, PTH, meta_checkpoint

FILE, TOKENIZER = "params.json", "tokenizer.model"
NOT_COUNTS = {
    "-1": -5,
    "0": 0,
    "4e9": 4 * 10**9,
    "10**400": 10**400,
    "NaN": math.nan,
    "text": "8",
    "1.5": 1.5,
    "[]": [],
}


def having(**values: Any) -> Callable[[Path], None]:
    return edit_json(FILE, lambda params: params.update(values))


def bad(key: str, value: Any, *names: str) -> tuple[Damage, tuple[str, ...]]:
    return having(**{key: value}), (FILE, key, *names)


def moe(**values: Any) -> tuple[Damage, tuple[str, ...]]:
    return having(moe_args={**PARAMS["moe_args"], **values}), (FILE, "moe_args", next(iter(values)))


def raw(content: str | bytes, *names: str) -> tuple[Damage, tuple[str, ...]]:
    return text(FILE, content), (FILE, *names)


def ranks(content: str | bytes) -> tuple[Damage, tuple[str, ...]]:
    return text(TOKENIZER, content), (TOKENIZER,)


def copied(file: str) -> Callable[[Path], object]:
    """One .pth more."""
    return lambda folder: shutil.copy(folder / PTH, folder / file)


FAMILY = Family(
    base=meta_checkpoint,
    real=False,
    cases=cases(
        {
            **{
                f"{key} is {what}": bad(key, value)
                for key in ("dim", "n_layers", "n_heads", "vocab_size")
                for what, value in NOT_COUNTS.items()
            },
            "1e9 layers": bad("n_layers", 10**9),
            "1e9 experts": moe(num_experts=10**9),
            "-1 experts": moe(num_experts=-1),
            "experts are text": moe(num_experts="2"),
            "top-k above the experts": moe(top_k=3),
            "a capacity of NaN": moe(capacity_factor=math.nan, auto_scale_F=True),
            "a capacity of -1": (
                having(moe_args={**PARAMS["moe_args"], "capacity_factor": -1, "auto_scale_F": True}),
                (FILE,),
            ),
            "moe_args is a list": bad("moe_args", []),
            "ffn_exp is NaN": bad("ffn_exp", math.nan),
            "ffn_exp is 1e300": bad("ffn_exp", 1e300),
            "ffn_exp is tiny": (having(ffn_exp=1e-30), (FILE, "0 wide")),
            "a multiplier of infinity": bad("ffn_dim_multiplier", math.inf),
            "a multiplier of 1e299": bad("ffn_dim_multiplier", 1e299),
            "a multiple of 2**31": (having(multiple_of=2**31 - 1), (PTH, "2147483647")),
            "a multiple of 0": bad("multiple_of", 0),
            "theta is negative": bad("rope_theta", -1),
            "scaling is text": bad("use_scaled_rope", "yes"),
            "more layers than tensors": (having(n_layers=500), (PTH, "layers.2.", "missing")),
            "another width": (having(dim=64), (PTH, "tok_embeddings.weight")),
            "heads that do not divide": bad("n_kv_heads", 3),
            "quantized by torchao": bad("quantization_args", {"scheme": "int8"}),
            "with adapters": bad("lora_args", {"rank": 8}),
            "a key twice": raw('{"dim": 1, "dim": 2}', "dim", "twice"),
            "nested": raw('{"a":' * 100_000, "nested too deeply"),
            "a list": raw("[]", "object"),
            "empty": raw(""),
            "Python": raw(repr(dict(PARAMS)), "not valid JSON"),
            "a terabyte": (sparse(FILE, 1 << 40), (FILE, "bytes")),
            "a pipe": (pipe(FILE), (FILE,)),
            "a folder": (folder_instead(FILE), (FILE,)),
            "a device": (link(FILE, "/dev/zero"), (FILE,)),
            "gone": (remove(FILE), (FILE, "no such file")),
            "no weights": (remove(PTH), (PTH,)),
            "weights are a pipe": (pipe(PTH), (PTH,)),
            "weights are a device": (link(PTH, "/dev/zero"), (PTH,)),
            "weights link to themselves": (link(PTH, PTH), (PTH,)),
            "a terabyte of zeros for weights": (sparse(PTH, 1 << 40), (PTH,)),
            "a part too many": (copied("consolidated.01.pth"), ("files",)),
            "a part of another name": (copied("evil.pth"), ("consolidated.01.pth", "no such file")),
            "a part that is far away": (copied("consolidated.07.pth"), ("consolidated.0",)),
            "elsewhere": (outside(FILE), (FILE, "outside of its folder")),
            "weights are an endless file of procfs": (link(PTH, "/proc/kmsg"), (PTH,)),
            "template elsewhere": (
                lambda p: ((p / "chat_template.jinja").write_text("x"), outside("chat_template.jinja")(p)),
                ("chat_template.jinja", "outside of its folder"),
            ),
            "tokens that are no base64": ranks("!!! 0\n"),
            "tokens without ranks": ranks("YQ==\n"),
            "tokens of NaN": ranks("YQ== nan\n"),
            "tokens with gaps": ranks("YQ== 0\nYg== 5\n"),
            "tokens twice": ranks("YQ== 0\nYQ== 1\n"),
            "ranks twice": ranks("YQ== 0\nYg== 0\n"),
            "a token of 1 MB": ranks("YWFh" * 250_000 + " 0\n"),
            "a million tokens": ranks("".join(f"YQ== {i}\n" for i in range(600_000))),
            "a tokenizer of a terabyte": (sparse(TOKENIZER, 1 << 40), (TOKENIZER, "bytes")),
            "a tokenizer that is a pickle": ranks(b"\x80\x04\x95cos\nsystem\n."),
            "a tokenizer of SentencePiece": ranks(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"),
        }
    ),
)
