"""A small byte-level BPE like Llama 4's, as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|begin_of_text|>", "<|eot|>"
TEMPLATE = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
# Llama 4's own tokenizer.json has these two in a sequence.
SEQUENCE = processors.Sequence([processors.ByteLevel(trim_offsets=False), TEMPLATE])
BOTH = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)])
NOTHING = processors.TemplateProcessing(single="$A", special_tokens=[])


def write_tokenizer(folder: Path, post_processor: Any = None, **config: Any) -> Path:
    """A byte-level BPE like Llama 4's, with few merges, so that most characters beyond ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, then the dog sleeps"], trainer)
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    base = {"tokenizer_class": "TokenizersBackend", "bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(base | config))
    return folder
