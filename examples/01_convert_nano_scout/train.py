"""Train nano Scout: a Llama 4 Scout in miniature, small enough to live in a repository.

The text is the source of the Python standard library, which every machine has. A fixed set of its
files is never trained on; it is written next to the checkpoint as ``heldout.txt``, the text that
``evaluate.py`` measures perplexity on.

    python train.py --output checkpoint
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from corpus import chat_messages, heldout_names, stdlib_sources
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llama4.modeling_llama4 import Llama4Router

VOCAB_SIZE = 1536
SEQUENCE_LENGTH = 512  # eight attention chunks, so that chunk boundaries are learned, not just met
CHUNK_SIZE = 64
MAX_POSITIONS = 10_485_760  # as Scout: positions cost nothing, since nothing is learned for them
BATCH_SIZE = 4
PEAK_LEARNING_RATE = 7e-3
WARMUP_FRACTION = 0.05
ROUTER_BALANCE_WEIGHT = 0.01

SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>",
    "<|step|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
    "<|image|>", "<|patch|>", "<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>",
]  # fmt: skip

# How Llama 4 splits text before BPE.
SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|"
    r"\s+(?!\S)|"
    r"\s+"
)

# Llama 4's turns, without its tools and images.
CHAT_TEMPLATE = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\n\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] if part['type'] == 'text' %}
            {{- part['text'] | trim }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\n\n' }}
{%- endif %}
""".lstrip()


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that carries Llama 4's special tokens at the end of its vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    bpe.add_special_tokens(SPECIAL_TOKENS)
    begin = "<|begin_of_text|>"
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, bpe.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=begin,
        eos_token="<|eot|>",  # noqa: S106
        pad_token="<|finetune_right_pad|>",  # noqa: S106
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    )


def encode_corpus(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All files, then chats made from them, as one stream of token ids that marks where each begins and ends."""
    files = [f"{tokenizer.bos_token}{text}<|end_of_text|>" for text in texts]
    chats = [tokenizer.apply_chat_template(chat, tokenize=False) for text in texts for chat in chat_messages(text)]
    encoded = tokenizer(files + chats, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in ids])


def nano_scout_config(tokenizer: PreTrainedTokenizerFast) -> Llama4TextConfig:
    """Scout's architecture with every size shrunk; widths are multiples of 128, so that INT4 blocks of 128 fit."""
    return Llama4TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=128,
        intermediate_size_mlp=256,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        use_qk_norm=True,
        no_rope_layer_interval=4,
        attention_chunk_size=CHUNK_SIZE,
        attn_temperature_tuning=True,
        floor_scale=128,
        attn_scale=0.1,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        initializer_range=0.06,  # Scout's 0.02 is for much wider layers; here it would leave the experts near zero
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eom|>", "<|eot|>"]),
        pad_token_id=tokenizer.pad_token_id,
    )


def sample_batch(stream: torch.Tensor, bos_token_id: int, generator: torch.Generator) -> torch.Tensor:
    """Random windows of the stream; half of them begin with BOS, so that the model is at home with and without it."""
    starts = torch.randint(len(stream) - SEQUENCE_LENGTH, (BATCH_SIZE, 1), generator=generator)
    batch = stream[starts + torch.arange(SEQUENCE_LENGTH)]
    batch[::2, 0] = bos_token_id
    return batch


def router_balance_loss(router_logits: torch.Tensor) -> torch.Tensor:
    """Switch Transformer's load-balancing loss; 1 when experts share the tokens equally, more when they do not."""
    experts = router_logits.shape[-1]
    used = torch.nn.functional.one_hot(router_logits.argmax(-1), experts).float().mean(0)
    return experts * (used * router_logits.softmax(-1).mean(0)).sum()


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warmup, then a cosine down to a hundredth of the peak."""
    warmup = max(1, round(WARMUP_FRACTION * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(model: Llama4ForCausalLM, stream: torch.Tensor, bos_token_id: int, steps: int, seed: int) -> None:
    """Train `model` in place on random windows of `stream`, in float32."""
    router_logits: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, outputs: router_logits.append(outputs[1]))
        for module in model.modules()
        if isinstance(module, Llama4Router)
    ]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    generator = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        router_logits.clear()
        batch = sample_batch(stream, bos_token_id, generator)
        logits = model(batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        balance = torch.stack([router_balance_loss(layer) for layer in router_logits]).mean()
        optimizer.zero_grad()
        (loss + ROUTER_BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 25 == 0 or step == steps:
            seconds = time.monotonic() - started
            print(f"step {step}/{steps}  loss {loss:.3f}  balance {balance:.3f}  {seconds:.0f} s", file=sys.stderr)
    for hook in hooks:
        hook.remove()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder; heldout.txt goes beside it")
    parser.add_argument("--steps", type=int, default=1600, help=f"of {BATCH_SIZE} x {SEQUENCE_LENGTH} tokens")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train tokenizer and model, and write checkpoint and held-out text."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    sources = stdlib_sources(Path(sysconfig.get_path("stdlib")))
    heldout = heldout_names(sources)
    texts = [text for name, text in sources.items() if name not in heldout]
    print(f"held out: {', '.join(heldout)}", file=sys.stderr)

    tokenizer = train_tokenizer(texts)
    stream = encode_corpus(texts, tokenizer)
    model = Llama4ForCausalLM(nano_scout_config(tokenizer))
    print(f"{len(texts)} files, {len(stream)} tokens, {model.num_parameters()} parameters", file=sys.stderr)
    train(model, stream, tokenizer.bos_token_id, arguments.steps, arguments.seed)

    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output.parent / "heldout.txt").write_text("".join(sources[name] for name in heldout), encoding="utf-8")
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
