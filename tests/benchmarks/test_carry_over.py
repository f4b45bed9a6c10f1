from __future__ import annotations

import dataclasses

from tests.benchmarks.scripts import SMALL, load

carry_over = load("carry_over")


def test_both_cases_compute_the_same_layer() -> None:
    """Widths of at least a group of 128."""
    scout = carry_over.PRESETS["scout"]
    sizes = {key: max(128, int(value)) for key, value in (pair.split("=") for pair in SMALL)}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_local_experts": 2}
    config = dataclasses.replace(scout, layers=scout.layers[:1], vocab_size=128, **sizes)
    packed, plain = carry_over.measure(config, "cpu", repeat=1)
    assert (packed["case"], plain["case"]) == ("carried over", "from BF16")
    # As many codes for each byte and second, so as many codes in all.
    codes = [row["seconds"] * row["bytes_per_second"] for row in (packed, plain)]
    assert round(codes[0]) == round(codes[1]) > 0
