"""What the compiler makes of the INT4 loop: few instructions a weight, nothing dequantized through shared memory."""

from __future__ import annotations

import pytest

from tests.plugins.sass import compiled, inner_loop, weights_of_a_thread


@pytest.mark.parametrize("product", ["gate_up", "down"])
def test_an_h100_needs_three_instructions_a_weight(product):
    """Measured 2.72 and 2.95. An H100 can issue 4.5 in the time in which it reads an INT4 weight (README.md)."""
    kernel = compiled(f"moe_{product}_int4_bf16_m8", 90)
    loop, weights = inner_loop(kernel), weights_of_a_thread(kernel)
    assert loop.total() <= 3.1 * weights
    # Two weights an instruction, and the mask and the exclusive or are one.
    for name in ("HADD2.BF16_V2", "HMUL2.BF16_V2"):
        assert loop[name] == weights / 2
    assert weights / 2 <= loop["LOP3.LUT"] <= weights / 2 + 8
    assert not [name for name in loop if name.startswith(("STS", "LDG.", "F2FP", "PRMT"))]
    # Copies to shared memory of 16 bytes; only the few scales come in 8.
    copies = [name for name in loop if name.startswith("LDGSTS")]
    assert copies
    assert all(name.endswith((".128", ".64")) for name in copies)
