"""Measure a checkpoint as transformers runs it: held-out perplexity, and how often each expert is used.

python evaluate.py checkpoint heldout.txt
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4Router


def token_windows(token_ids: list[int], window: int) -> torch.Tensor:
    """Consecutive windows of equal length, one a row; a shorter rest is left out."""
    count = len(token_ids) // window
    if count == 0:
        raise SystemExit(f"the text has {len(token_ids)} tokens, fewer than one window of {window}")
    return torch.tensor(token_ids[: count * window]).view(count, window)


def watch_routers(model: Llama4ForCausalLM) -> list[torch.Tensor]:
    """One tensor a layer that counts, from now on, how many tokens each expert is given."""

    def counter(count: torch.Tensor) -> Callable[..., None]:
        def add(_router: Llama4Router, _inputs: object, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
            count.add_(torch.bincount(outputs[1].argmax(-1), minlength=len(count)))

        return add

    routers = [module for module in model.modules() if isinstance(module, Llama4Router)]
    counts = [torch.zeros(router.num_experts, dtype=torch.long) for router in routers]
    for router, count in zip(routers, counts, strict=True):
        router.register_forward_hook(counter(count))
    return counts


@torch.inference_mode()
def evaluate(checkpoint: Path, text: str, window: int, changes: dict[str, object]) -> dict[str, object]:
    """Perplexity of `text` in windows of `window` tokens without BOS, computed in float32 with eager attention.

    The first token of a window has no context and is not scored. `changes` replace values of the configuration:
    what an architecture feature is worth shows in the perplexity of the same weights without it.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = Llama4TextConfig.from_pretrained(checkpoint, **changes)
    model = Llama4ForCausalLM.from_pretrained(
        checkpoint, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    windows = token_windows(tokenizer(text, add_special_tokens=False)["input_ids"], window)
    expert_tokens = watch_routers(model)
    losses, hits, scored_bytes = [], [], 0
    for row in windows:
        logits = model(row[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none"))
        hits.append(logits.argmax(-1) == row[1:])
        scored_bytes += len(str(tokenizer.decode(row[1:])).encode())
    loss = torch.cat(losses).double()
    return {
        "parameters": model.num_parameters(),
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.iterdir()),
        "windows": len(windows),
        "tokens_scored": len(loss),
        "perplexity": round(math.exp(loss.mean()), 3),
        "bits_per_byte": round(float(loss.sum()) / math.log(2) / scored_bytes, 3),
        "top_1_accuracy": round(float(torch.cat(hits).double().mean()), 3),
        "tokens_per_expert": [layer.tolist() for layer in expert_tokens],
    }


def main() -> None:
    """Print the measurements as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--config", type=json.loads, default={}, metavar="JSON", help="configuration values to replace")
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    print(json.dumps(evaluate(arguments.checkpoint, text, arguments.window, arguments.config)))


if __name__ == "__main__":
    main()
